# SPDX-License-Identifier: Apache-2.0
"""How a model remembers what was attached to it."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn

from samfast.adapters.wrappers import ATTACHMENT

if TYPE_CHECKING:
    from samfast.adapters.method import Method


@dataclass
class Attachment:
    """What ``attach`` did to a model. The model carries it, so copies and pickles do too.

    layers: full names of the adapted modules
    trained: full names of the tensors outside the adapters that ``train`` un-froze
    base_dtype: dtype that the frozen encoder was cast to; None if it was not cast
    fingerprints: fingerprints before the cast, for tensors whose fingerprint it changed
    """

    method: "Method"
    layers: tuple[str, ...]
    trained: tuple[str, ...]
    base_dtype: torch.dtype | None = None
    fingerprints: dict[str, str] = field(default_factory=dict)


def attachment(model: nn.Module) -> Attachment | None:
    """Return the record that ``attach`` left on this module; None if there is none."""
    return getattr(model, ATTACHMENT, None)


def attachment_within(model: nn.Module) -> Attachment | None:
    """Return the one record in the model or its parts; None if there are none or several."""
    found = [m for m in model.modules() if attachment(m) is not None]
    return attachment(found[0]) if len(found) == 1 else None


def remember(model: nn.Module, record: Attachment) -> None:
    """Store on the model what was attached to it."""
    setattr(model, ATTACHMENT, record)

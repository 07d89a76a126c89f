# SPDX-License-Identifier: Apache-2.0
"""Translate adapters between Hugging Face's SAM and segment_anything's.

Both have the same tensors under different names (``samfast.models.hf_names``). A folder holds the
names of the model that was saved.
"""

import dataclasses
from collections.abc import Callable, Mapping

from torch import nn

from samfast.adapters.base_digest import identity_of
from samfast.adapters.wrappers import ENCODER, ENCODER_OF_HF, encoder_name
from samfast.files.format import AdapterFile
from samfast.models import hf_names


def base_identity(prints: Mapping[str, str]) -> str:
    """Return ``identity_of`` a model's fingerprints, equal for the SAM of both libraries."""
    if not hf_names.is_hugging_face(prints):
        return identity_of(prints)
    plain = {name.replace("_orig_mod.", ""): value for name, value in prints.items()}
    return identity_of(hf_names.to_segment_anything(plain))


def spelled_for(model: nn.Module, adapter: AdapterFile) -> AdapterFile:
    """Rename the adapter's tensors if they have the other library's names."""
    pair = _encoder_of(adapter), encoder_name(model)
    if pair == (ENCODER_OF_HF, ENCODER):
        return _renamed(adapter, hf_names.spelled)
    if pair == (ENCODER, ENCODER_OF_HF):
        own = [*(name for name, _ in model.named_modules() if name), *model.state_dict()]
        known = {other: name for name, other in hf_names.spellings(own).items()}
        return _renamed(adapter, lambda name: hf_names.spelled_back(name, known))
    return adapter


def _encoder_of(adapter: AdapterFile) -> str:
    """Return the image encoder's name in the model that was saved."""
    if "encoder" in adapter.record:
        return adapter.record["encoder"]
    for name in (*adapter.layers, *adapter.tensors):  # of PEFT, or of an older samfast
        part = name.partition(".")[0]
        if part in (ENCODER, ENCODER_OF_HF):
            return part
    return ""


def _renamed(adapter: AdapterFile, rename: Callable[[str], str]) -> AdapterFile:
    return dataclasses.replace(
        adapter,
        layers=tuple(map(rename, adapter.layers)),
        tensors={rename(name): value for name, value in adapter.tensors.items()},
    )

# SPDX-License-Identifier: Apache-2.0
"""``_LoRA_qkv`` of SAMed, Sam_LoRA and SAM-COBOT's baseline, on its own or in a fused block.

Other programs have other classes with that name. They are left alone.
"""

from collections.abc import Iterator
from typing import ClassVar

from torch import nn

from samfast.integrations.packed_qkv import FusedPackedQkv
from samfast.integrations.wrapper_proof import problem, stock_of

OWNER = None
CALLS = {
    "keep": (
        "samfast.fuse(model) fuses it, and load_lora_parameters(file) of its LoRA_Sam reads a file"
    ),
    "save": "save them with save_lora_parameters(file) of their LoRA_Sam",
    "merge": (
        "save them with save_lora_parameters(file) of their LoRA_Sam; samfast.load_adapter loads "
        "that file onto a plain Sam, which can be merged"
    ),
    "loss": "they add nothing to the loss, so leave aux_loss out",
}


class FusedLoraQkv(FusedPackedQkv):
    """SAMed's packed qkv layer with LoRA on q and v, unscaled, by samfast's operators.

    See ``FusedPackedQkv``. If x is not a batch of maps, the owner's forward runs.
    """

    base = "qkv"
    pairs = {"q": ("linear_a_q", "linear_b_q"), "v": ("linear_a_v", "linear_b_v")}  # noqa: RUF012
    needed = ("q", "v")
    reads: ClassVar[tuple[str, ...]] = (
        "qkv",
        "linear_a_q",
        "linear_b_q",
        "linear_a_v",
        "linear_b_v",
        "dim",
    )


def objection(module: nn.Module) -> str | None:
    """Say why a wrapper of qkv is not fused; None if it is."""
    reason = problem(module, FusedLoraQkv)
    return None if reason is None else f"which {reason}"


def mixin_of(module: nn.Module) -> type:
    """Return the mixin for a wrapper of qkv."""
    return FusedLoraQkv


def kind_of(module: nn.Module) -> str:
    """Return the module's name for sentences."""
    return stock_of(module).__name__


def parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield all parameters except the packed layer's."""
    for name, parameter in module.named_parameters():
        if name.partition(".")[0] != FusedLoraQkv.base:
            yield name, parameter

# SPDX-License-Identifier: Apache-2.0
"""micro-sam's adapters: LoRA on attention and on the MLP, and AdaptFormer (read at 1.8.14).

Other programs have other classes with these names. They are left alone, like micro-sam's other
classes.
"""

from collections.abc import Iterator

from torch import nn

from samfast.integrations.mlp_branch import FusedBranchMlp
from samfast.integrations.mlp_lora import FusedMlpLora
from samfast.integrations.packed_qkv import FusedPackedQkv
from samfast.integrations.wrapper_proof import Wrapper, problem, stock_of

OWNER = None
CALLS = {
    "keep": "samfast.fuse(model) fuses the adapters that it knows; attach takes a plain Sam",
    "save": "save model.state_dict(), as micro_sam's trainer does",
    "merge": "micro_sam has no call that folds them into the weights",
    "loss": "they add nothing to the loss, so leave aux_loss out",
}
_ADAPTED = ("qkv_proj", "mlp_layer", "mlp_proj", "layer", "activation")  # there before


class FusedAttentionLora(FusedPackedQkv):
    """micro-sam's packed qkv layer with LoRA on some of q, k and v, times ``alpha``.

    See ``FusedPackedQkv``. alpha is a number and is not divided by the rank.
    """

    base = "qkv_proj"
    pairs = {t: (f"w_a_linear_{t}", f"w_b_linear_{t}") for t in "qkv"}  # noqa: RUF012
    scale = "alpha"
    reads = ("qkv_proj", "dim", "alpha", *(f"w_{s}_linear_{t}" for s in "ab" for t in "qkv"))


_MIXINS: dict[str, type[Wrapper]] = {
    "AttentionLoRA": FusedAttentionLora,
    "MLPLoRA": FusedMlpLora,
    "AdaptFormer": FusedBranchMlp,
}


def objection(module: nn.Module) -> str | None:
    """Say why a module with a micro-sam name is not fused; None if it is."""
    mixin = mixin_of(module)
    if mixin is None:
        return "which samfast does not know"
    reason = problem(module, mixin)
    return None if reason is None else f"which {reason}"


def mixin_of(module: nn.Module) -> type[Wrapper] | None:
    """Return the mixin for a micro-sam module; None if there is none."""
    names = (base.__name__ for base in stock_of(module).__mro__)
    return next((_MIXINS[name] for name in names if name in _MIXINS), None)


def kind_of(module: nn.Module) -> str:
    """Return the module's name for sentences."""
    return stock_of(module).__name__


def parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield all parameters except those of the adapted layers."""
    for name, parameter in module.named_parameters():
        if name.partition(".")[0] not in _ADAPTED:
            yield name, parameter

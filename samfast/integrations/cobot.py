# SPDX-License-Identifier: Apache-2.0
"""SAM-COBOT's layers: LoRA and AdaptFormer, alone and with coefficients related across blocks.

Other programs have other classes of these names. Those are left alone.
"""

from collections.abc import Iterator

from torch import nn

from samfast.integrations.cobot_branch import FusedAdapter, FusedRelatedAdapter
from samfast.integrations.cobot_qkv import FusedRelatedQkv
from samfast.integrations.wrapper_proof import Wrapper, problem, stock_of

OWNER = None
CALLS = {
    "keep": "samfast.fuse(model) runs fused what it knows, and attach takes a plain Sam",
    "save": "save model.state_dict(), as SAM-COBOT's scripts do",
    "merge": "SAM-COBOT has no call that folds them into the weights",
    "loss": "they add nothing to the loss, so leave aux_loss out",
}
_ADAPTED = ("qkv", "mlp")  # what was there before
_MIXINS: dict[str, type[Wrapper]] = {
    "_LoRA_qkv_relation_add": FusedRelatedQkv,
    "Adapter": FusedAdapter,
    "Adapter_relation": FusedRelatedAdapter,
}


def objection(module: nn.Module) -> str | None:
    """Say why a module with one of SAM-COBOT's names is not fused; None if it is."""
    reason = problem(module, mixin_of(module))
    return None if reason is None else f"which {reason}"


def mixin_of(module: nn.Module) -> type[Wrapper]:
    """Return the mixin for a module of SAM-COBOT's."""
    names = [base.__name__ for base in stock_of(module).__mro__]
    return next(_MIXINS[name] for name in names if name in _MIXINS)


def kind_of(module: nn.Module) -> str:
    """Return what sentences call the module."""
    return stock_of(module).__name__


def parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield all but those of the layers it adapts."""
    for name, parameter in module.named_parameters():
        if name.partition(".")[0] not in _ADAPTED:
            yield name, parameter

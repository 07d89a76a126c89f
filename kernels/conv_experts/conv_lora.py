# SPDX-License-Identifier: Apache-2.0
"""Conv-LoRA (Zhong et al. 2024): the middle map h + E_e(h) with its gate, and the layer around it.

y = x Wᵀ + b + s · (h + E_e(h)) Bᵀ, h = drop(x) Aᵀ, one expert e per sample, chosen by the gate.
"""

import dataclasses
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from samfast.kernels._common import backends, middle
from samfast.kernels._common.arguments import check_devices, drawn_seed
from samfast.kernels._common.autocast import autocast_input, without_autocast
from samfast.kernels._common.philox import keep_mask
from samfast.kernels._common.windows import Windows
from samfast.kernels.conv_experts import op, reference
from samfast.kernels.expert_gate import reference as gate_reference
from samfast.kernels.expert_gate.op import TABLE as GATE
from samfast.kernels.expert_gate.op import check_gate, usable_noise
from samfast.kernels.lora_linear.op import TABLE as PRODUCTS
from samfast.kernels.lora_linear.op import check_arguments, low_rank_linear

FORMULAS = ("code", "paper")


_TABLES = {table.operation: table for table in (op.TABLE, GATE, PRODUCTS)}


def part_backend(operation: str, backend: str) -> str:
    """What runs a part of a layer on this backend."""
    return _TABLES[operation].part(backend)


@middle.register
@dataclasses.dataclass(frozen=True)
class RoutedExperts:
    """f(h) = h + E_e(h). params: expert weight and bias, w_gate, w_noise, then what was given of
    noise and expert_index; geometry: the numbers of Windows, then two flags for these."""

    ratios: tuple[int, ...]
    coefficient: float
    backend: str
    zero_preserving = False
    saves = 4

    def forward(self, h, geometry, weight, bias, w_gate, w_noise, *given):
        windows, (has_noise, has_index) = list(geometry[:5]), geometry[5:]
        noise = given[0] if has_noise else None
        index = given[-1] if has_index else None
        index, aux, dpool, dgate = torch.ops.samfast.expert_gate_forward(
            h, w_gate, w_noise, noise, index, windows, self.coefficient,
            part_backend("expert_gate", self.backend),
        )  # fmt: skip
        z, z_pad = torch.ops.samfast.conv_experts_forward(
            h, weight, bias, index, windows, list(self.ratios), True, "gelu", self.backend
        )
        return z, aux, z_pad, [h, index, dpool, dgate]

    def backward(self, dz, daux, dz_pad, saved, params, geometry, needs):
        h, index, dpool, dgate = saved
        weight, bias, w_gate, w_noise = params[:4]
        need_h, *need_params = needs
        need_experts, need_gate = any(need_params[:2]), any(need_params[2:4])
        if daux is None:
            dpool = dgate = None
        grads = torch.ops.samfast.conv_experts_backward(
            dz, dz_pad, h, weight, bias, index, list(geometry[:5]), list(self.ratios), True, "gelu",
            daux, dpool, dgate, [need_h, need_experts], self.backend,
        )  # fmt: skip
        made = iter(grads)
        dh = next(made) if need_h else None
        dparams = [next(made), next(made)] if need_experts else [None, None]
        if daux is not None:
            dparams += [next(made), next(made)]
        elif need_gate:  # the balancing loss was not used
            dparams += [torch.zeros_like(w_gate), torch.zeros_like(w_noise)]
        dparams += [None] * (len(params) - len(dparams))
        wanted = zip(params, dparams, need_params, strict=True)
        return dh, [d.to(p.dtype) if need else None for p, d, need in wanted]


COEFFICIENT = 0.01  # of the balancing loss


def middle_key(ratios: Sequence[int], coefficient: float, backend: str) -> str:
    """The layer's middle map; backend: as the user asked."""
    return middle.key_of("RoutedExperts", tuple(ratios), float(coefficient), backend)


def conv_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    expert_weight: Tensor,
    expert_bias: Tensor,
    w_gate: Tensor,
    w_noise: Tensor,
    scaling: float,
    ratios: Sequence[int],
    *,
    windows: Windows,
    noise: Tensor | None = None,
    expert_index: Tensor | None = None,
    coefficient: float = COEFFICIENT,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    top_k: int = 1,
    formula: str = "code",
    return_pads: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, ...]:
    """A frozen linear layer with a Conv-LoRA update, and the loss that balances its experts.

    x: (..., D), the pixels of ``windows`` in image order   weight: (O, D)   lora_a: (r, D)
    lora_b: (O, r)   expert_weight: (M, r, r / groups, 3, 3)   expert_bias: (M, r)
    w_gate, w_noise: (r, M)   noise: (samples, M), given in training   expert_index: (samples,)
    y: (..., O) = x Wᵀ + b + s · (h + E_e(h)) Bᵀ, h = drop(x) Aᵀ   loss: ()
    z_pad: (batch · pads, r), third with return_pads: h + E_e(h) on the windows' padding, where x
        and h are zeros; a pad's row of y is b + s · z_pad Bᵀ

    Only the reference path computes top_k above 1 (a sum weighted by the gate) and formula="paper"
    (Σ G_i E_i without skip and activation).
    Saves x, h, the update's z, one choice and r numbers a sample and 2·r·M numbers.
    Raises ValueError when shapes or choices do not fit, and RuntimeError when a backend asked for
    by name cannot run.

    >>> import torch
    >>> from samfast.functional import conv_lora_linear
    >>> from samfast.kernels._common.windows import Windows
    >>> x, weight = torch.randn(1, 9, 11, 16), torch.randn(48, 16)
    >>> a, b, gate = torch.randn(3, 16), torch.zeros(48, 3), torch.zeros(3, 2)
    >>> experts, bias = torch.randn(2, 3, 3, 3, 3), torch.zeros(2, 3)
    >>> windows = Windows(1, 9, 11, 7, 7)
    >>> y, loss = conv_lora_linear(
    ...     x, weight, None, a, b, experts, bias, gate, gate, 1.0, (1, 2), windows=windows
    ... )
    >>> y.shape
    torch.Size([1, 9, 11, 48])
    """
    check_arguments(x, weight, bias, lora_a, lora_b, dropout, seed, None)
    small = {"expert_weight": expert_weight, "expert_bias": expert_bias, "w_gate": w_gate}
    small |= {"w_noise": w_noise, "noise": noise, "expert_index": expert_index}
    groups = _check_experts(x, lora_a.shape[0], small, ratios, windows, top_k, formula)
    requested = backends.requested(backend)
    noise = usable_noise(noise, x)
    if (top_k > 1 or formula == "paper") and requested not in ("auto", "reference"):
        raise RuntimeError(
            f"backend {requested!r} cannot run top_k={top_k} with formula={formula!r}; only the "
            "reference does"
        )
    if requested == "reference" or top_k > 1 or formula == "paper":
        made = _literal(
            x, weight, bias, lora_a, lora_b, expert_weight, expert_bias, w_gate, w_noise, scaling,
            ratios, groups, windows, noise, expert_index, coefficient, dropout, seed, top_k,
            formula,
        )  # fmt: skip
        return made if return_pads else made[:2]
    params = [expert_weight, expert_bias, w_gate, w_noise]
    params += [t for t in (noise, expert_index) if t is not None]
    geometry = (*windows, int(noise is not None), int(expert_index is not None))
    key = middle_key(ratios, coefficient, requested)
    made = low_rank_linear(
        x, weight, bias, lora_a, lora_b, scaling, middle=key, geometry=geometry, params=params,
        dropout=dropout, seed=seed, backend=part_backend("lora_linear", requested),
    )  # fmt: skip
    return made if return_pads else made[:2]


def _check_experts(x, rank, small, ratios, windows, top_k, formula) -> int:
    """Return groups; raise ValueError when experts, gate, windows or choices do not fit.

    small: the tensors by name, except those of the low-rank update
    """
    expert_weight, expert_bias, w_gate, w_noise, noise, expert_index = small.values()
    groups = rank if expert_weight.dim() == 5 and expert_weight.shape[2] == 1 else 1
    op.check_experts(rank, expert_weight, expert_bias, ratios, groups)
    check_gate(windows.samples, rank, w_gate, w_noise, noise, expert_index)
    if math.prod(x.shape[:-1]) != windows.tokens:
        raise ValueError(
            f"x has shape {tuple(x.shape)}, but the windows hold {windows.tokens} tokens"
        )
    check_devices({"x": x, **small})
    if w_gate.shape[1] != len(ratios):
        raise ValueError(
            f"w_gate has {w_gate.shape[1]} columns but there are {len(ratios)} experts"
        )
    if not 1 <= top_k <= len(ratios):
        raise ValueError(f"top_k is {top_k}, but must be 1 to {len(ratios)}, the number of experts")
    if formula not in FORMULAS:
        raise ValueError(f"formula is {formula!r}; choose one of {', '.join(FORMULAS)}")
    return groups


def _literal(
    x, weight, bias, lora_a, lora_b, expert_weight, expert_bias, w_gate, w_noise, scaling, ratios,
    groups, windows, noise, expert_index, coefficient, dropout, seed, top_k, formula,
):  # fmt: skip
    """The specification of the layer, by plain autograd."""
    if expert_index is not None:
        op.check_index(expert_index, len(ratios))
    x = autocast_input(x)
    with without_autocast(x.device.type):
        dtype, rank = x.dtype, lora_a.shape[0]
        y = F.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))
        if dropout > 0.0:
            seed = drawn_seed(seed, dropout, x)
            keep = keep_mask(seed, windows.tokens, x.shape[-1], dropout).view(x.shape)
            x = x * keep / (1.0 - dropout)
        h = windows.cut(F.linear(x, lora_a.to(dtype)).reshape(windows.tokens, rank))
        forced = None if expert_index is None else expert_index[:, None].expand(-1, top_k)
        index, gates, loss = gate_reference.expert_gate(
            h, w_gate, w_noise, noise, forced, coefficient, top_k
        )
        paper = formula == "paper"
        z = torch.zeros_like(h) if paper else h
        for k in range(top_k):
            update = reference.conv_experts(
                h, expert_weight, expert_bias, index[:, k], ratios, residual=False,
                activation="none" if paper else "gelu", groups=groups,
            )  # fmt: skip
            weighted = top_k > 1 or paper
            z = z + (update * gates[:, k, None, None, None].to(dtype) if weighted else update)
        z, z_pad = windows.paste(z)
        return y + scaling * F.linear(z, lora_b.to(dtype)).view(y.shape), loss, z_pad

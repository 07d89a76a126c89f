# SPDX-License-Identifier: Apache-2.0
"""TA-LoRA: a linear layer with the slice of a Tucker tensor that belongs to a task.

y = x Wᵀ + b + s · ((drop(x) U1) M_t) U2ᵀ, M_t = Σ_v U3[t, v] G[:, :, v]; the update's weight is
never formed.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from samfast.kernels._common import backends
from samfast.kernels._common.arguments import drawn_seed
from samfast.kernels._common.autocast import autocast_input, without_autocast
from samfast.kernels._common.philox import keep_mask
from samfast.kernels.lora_linear.op import TABLE as PRODUCTS
from samfast.kernels.lora_linear.op import check_arguments, low_rank_linear
from samfast.kernels.task_core import reference
from samfast.kernels.task_core.middle_map import middle_key


def task_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    factor_in: Tensor,
    factor_out: Tensor,
    cores: Tensor,
    task: Tensor,
    scaling: float,
    *,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    slices: Sequence[tuple[int, int]] | None = None,
    backend: str = "auto",
) -> Tensor:
    """A frozen linear layer with TA-LoRA's update.

    x: (B, …, D)   weight: (O, D)   factor_in: U1 (D, R1)   factor_out: U2 (O, R2), or (n·L, R2)
        for n slices of length L, which share what comes out of the core
    cores: (P, T, R1, R2), as ``task_cores`` gives them   task: (E,) int64, E divides B
    y: (B, …, O)

    Saves x, h = drop(x) U1 and h M. Raises ValueError when shapes or tasks do not fit.
    """
    check_arguments(
        x, weight, bias, factor_in.t(), factor_out, dropout, seed, slices, middle=cores.shape[2:]
    )
    rows, entries = x.shape[0] if x.dim() > 1 else 1, task.shape[0]
    if rows % entries:
        raise ValueError(
            f"expected a number of tasks that divides the batch of {rows}, got {entries}"
        )
    asked = backends.requested(backend)
    if asked == "reference":
        return _literal(
            x, weight, bias, factor_in, factor_out, cores, task, scaling, dropout, seed, slices
        )
    y, _, _ = low_rank_linear(
        x, weight, bias, factor_in.t(), factor_out, scaling, middle=middle_key(asked),
        params=(cores, task), dropout=dropout, seed=seed, slices=slices,
        backend=PRODUCTS.part(asked),
    )  # fmt: skip
    return y


def _literal(
    x, weight, bias, factor_in, factor_out, cores, task, scaling, dropout, seed, slices
):  # fmt: skip
    """The specification of the layer, by plain autograd."""
    x = autocast_input(x)
    with without_autocast(x.device.type):
        dtype = x.dtype
        y = F.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))
        if dropout > 0.0:
            seed = drawn_seed(seed, dropout, x)
            rows = x.numel() // x.shape[-1]
            x = x * keep_mask(seed, rows, x.shape[-1], dropout).view(x.shape) / (1.0 - dropout)
        h = F.linear(x, factor_in.t().to(dtype))
        z = reference.product(h, cores[0], task)
        update = scaling * F.linear(z, factor_out.to(dtype))
        if slices is None:
            return y + update
        parts = update.split(slices[0][1] - slices[0][0], -1)
        placed = [y[..., : slices[0][0]]]
        for (start, stop), part, after in zip(
            slices, parts, [*(s for s, _ in slices[1:]), y.shape[-1]], strict=True
        ):
            placed += [y[..., start:stop] + part, y[..., stop:after]]
        return torch.cat(placed, -1)

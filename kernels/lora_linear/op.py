# SPDX-License-Identifier: Apache-2.0
"""``lora_linear``: backend choice, operator schemas, autograd and the public function."""

from collections.abc import Sequence

import torch
from torch import Tensor

from samfast.kernels._common import backends
from samfast.kernels._common.arguments import (
    check_devices,
    check_dropout,
    check_tensors,
    drawn_seed,
)
from samfast.kernels._common.autocast import autocast_dtype, autocast_input, without_autocast
from samfast.kernels._common.middle import IDENTITY
from samfast.kernels._common.operator import Operator
from samfast.kernels._common.table import Table
from samfast.kernels.lora_linear import engine, reference, torch_path

MAX_TRITON_RANK = {2: 128, 4: 32}  # by bytes per element; wider tiles spill registers
MAX_TRITON_SLICES = 3
TABLE = Table(
    "lora_linear",
    __package__,
    absent={"cuda": "it has no CUDA source of its own; triton runs it on a GPU"},
    native="lora_down",
)


def supports(
    backend: str, x: Tensor, lora_a: Tensor, lora_b: Tensor, slices: int = 1
) -> str | None:
    """None when the backend takes this call, or the sentence that says why it does not."""
    missing = TABLE.missing(backend, x.device, x=x.dtype)
    if missing is not None or backend != "triton":
        return missing
    ranks, widest = max(lora_a.shape[0], lora_b.shape[1]), MAX_TRITON_RANK[x.element_size()]
    if ranks > widest:
        return f"rank {ranks}, over all slices, is above {widest}, the widest tile for {x.dtype}"
    if slices > MAX_TRITON_SLICES:
        return f"{slices} slices are more than the {MAX_TRITON_SLICES} the kernels take"
    return None


def path_of(backend, x, lora_a, lora_b, starts):
    slices = max(len(starts), 1)
    return TABLE.path(backend, x.device, lambda b: supports(b, x, lora_a, lora_b, slices))


_OPTIONS = "float scaling, float dropout, str middle, SymInt[] geometry, int[] starts, bool own"


class LoraLinear(Operator):
    """Saves x (for dA), z (for dB) and what the middle map asks for; parameters cost nothing."""

    name = "lora_linear"
    inputs = (
        "Tensor x, Tensor weight, Tensor? bias, Tensor lora_a, Tensor lora_b, Tensor[] params, "
        f"Tensor? seed, {_OPTIONS}, str backend"
    )
    makes = "Tensor y, Tensor z, Tensor aux, Tensor z_pad, Tensor[] saved"
    returns = "y aux z_pad"
    backward_inputs = (
        "Tensor dy, Tensor? daux, Tensor? dz_pad, Tensor? x, Tensor weight, Tensor lora_a, "
        f"Tensor lora_b, Tensor? z, Tensor[] saved, Tensor[] params, Tensor? seed, {_OPTIONS}, "
        "bool[] needs, ScalarType bias_dtype, str backend"
    )
    gradients = "x weight bias lora_a lora_b params"
    fake_path = fake_backward_path = torch_path

    @staticmethod
    def path(backend, x, lora_a, lora_b, starts, dy=None, **_):
        return path_of(backend, x if dy is None else dy, lora_a, lora_b, starts)

    @staticmethod
    def forward(path, x, weight, bias, lora_a, lora_b, params, seed, *options):
        return engine.forward(path, x, weight, bias, lora_a, lora_b, params, seed, options)

    @staticmethod
    def backward(path, *arguments):
        *tensors, needs, bias_dtype = arguments
        tensors, options = tensors[:11], tensors[11:]
        return engine.backward(path, *tensors, options, needs, bias_dtype)

    @staticmethod
    def spare(need):
        x = () if need["weight"] or need["lora_a"] else ("x",)
        return x if need["lora_b"] else (*x, "z")

    @staticmethod
    def facts(weight, bias, **_):
        return {"bias_dtype": weight.dtype if bias is None else bias.dtype}


def low_rank_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    *,
    middle: str = IDENTITY,
    geometry: Sequence[int] = (),
    params: Sequence[Tensor] = (),
    dropout: float = 0.0,
    seed: Tensor | None = None,
    slices: Sequence[tuple[int, int]] | None = None,
    own: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """The engine: y = x Wᵀ + b + s · f(drop(x) Aᵀ) Bᵀ and the map's aux and z_pad.

    middle: key of a registered middle map; geometry and params are passed on to it.
    own: with slices, every slice has its own columns of z; otherwise they share one z.
    """
    x = autocast_input(x)
    starts = [] if slices is None else [start for start, _ in slices]
    return torch.ops.samfast.lora_linear(
        x, weight, bias, lora_a, lora_b, list(params), drawn_seed(seed, dropout, x),
        float(scaling), float(dropout), middle, list(geometry), starts, own,
        backends.requested(backend),
    )  # fmt: skip


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    *,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    slices: Sequence[tuple[int, int]] | None = None,
    backend: str = "auto",
) -> Tensor:
    """Linear layer with a low-rank update (LoRA, Hu et al. 2021).

    x: (..., in_features)   weight: (out_features, in_features)   bias: (out_features,) or None
    lora_a: (rank, in_features)   lora_b: (out_features, rank)
    out: (..., out_features) = x @ weight.T + bias + scaling * (drop(x) @ lora_a.T) @ lora_b.T

    slices: column ranges (start, stop) of equal length L that get the update, such as q and v of a
        packed qkv. lora_b is then (n·L, rank), and lora_a (n·rank, in_features), one factor for
        each slice, or (rank, in_features), shared by all.
    dropout: probability of zeroing an element of x before lora_a; applied whenever it is above 0.
    seed: int64 tensor of one element on x's device; drawn if dropout needs one and none is given.

    The result has x's dtype, or the autocast dtype. lora_a and lora_b may have another dtype than x
    and are meant to stay float32; their gradients have their dtype.
    Saves only x and h = drop(x) @ lora_a.T: no mask, no cast weight.
    Raises ValueError when shapes or dtypes do not fit, and RuntimeError when a backend asked for by
    name cannot run.

        y = lora_linear(x, weight, bias, lora_a, lora_b, scaling=1.0)

    >>> import torch
    >>> from samfast.functional import lora_linear
    >>> x, weight, lora_a = torch.randn(2, 64), torch.randn(192, 64), torch.randn(4, 64)
    >>> lora_linear(x, weight, None, lora_a, torch.zeros(192, 4), 1.0).shape
    torch.Size([2, 192])
    """
    own = check_arguments(x, weight, bias, lora_a, lora_b, dropout, seed, slices)
    if backends.requested(backend) == "reference":
        x = autocast_input(x)
        seed = drawn_seed(seed, dropout, x)
        bias = None if bias is None else bias.to(x.dtype)
        with without_autocast(x.device.type):
            return reference.lora_linear(
                x, weight.to(x.dtype), bias, lora_a, lora_b, scaling,
                dropout=dropout, seed=seed, slices=slices,
            )  # fmt: skip
    y, _, _ = low_rank_linear(
        x, weight, bias, lora_a, lora_b, scaling,
        dropout=dropout, seed=seed, slices=slices, own=own, backend=backend,
    )  # fmt: skip
    return y


def check_arguments(x, weight, bias, lora_a, lora_b, dropout, seed, slices, middle=None) -> bool:
    """Raise ValueError when the arguments do not fit together; True when slices have their own A.

    middle: (ranks in, ranks out) of a middle map between lora_a and lora_b, which all slices share
    """
    for name, t in (("weight", weight), ("lora_a", lora_a), ("lora_b", lora_b)):
        if t.dim() != 2:
            raise ValueError(f"{name} has shape {tuple(t.shape)}, but must be a matrix")
    if x.dim() == 0 or x.shape[-1] != weight.shape[1] or x.shape[-1] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)} but weight takes {weight.shape[1]} inputs")
    check_tensors({"x": x, "weight": weight, "lora_a": lora_a, "lora_b": lora_b, "bias": bias})
    check_devices({"x": x, "seed": seed})
    if lora_a.shape[1] != x.shape[-1]:
        raise ValueError(f"lora_a has {lora_a.shape[1]} input features but x has {x.shape[-1]}")
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(
            f"bias has shape {tuple(bias.shape)} but weight has {weight.shape[0]} rows"
        )
    rank = lora_b.shape[1]
    if rank == 0 or lora_a.shape[0] == 0:
        raise ValueError(f"the rank is {rank}, but must be at least 1")
    if autocast_dtype(x.device.type) is None and x.dtype != weight.dtype:
        raise ValueError(f"x is {x.dtype} but weight is {weight.dtype}; cast x or use autocast")
    check_dropout(dropout, seed)
    return _check_ranks(weight, lora_a, lora_b, slices, middle)


def _check_ranks(weight, lora_a, lora_b, slices, middle) -> bool:
    rank = lora_b.shape[1]
    if middle is not None:
        if (lora_a.shape[0], rank) != tuple(middle):
            raise ValueError(
                f"expected lora_a of rank {middle[0]} and lora_b of rank {middle[1]}, as the map "
                f"between them has, got ranks {lora_a.shape[0]} and {rank}"
            )
        lora_a = lora_a[:1].expand(rank, -1)
    if slices is None:
        if lora_a.shape[0] != rank:
            raise ValueError(f"lora_a has rank {lora_a.shape[0]} but lora_b has rank {rank}")
        if lora_b.shape[0] != weight.shape[0]:
            raise ValueError(
                f"lora_b has {lora_b.shape[0]} output features but weight has {weight.shape[0]}"
            )
        return False
    return _check_slices(weight, lora_a, lora_b, slices)


def _check_slices(weight, lora_a, lora_b, slices) -> bool:
    n, rank = len(slices), lora_b.shape[1]
    lengths = {stop - start for start, stop in slices}
    previous = 0
    for start, stop in slices:
        if not previous <= start < stop <= weight.shape[0]:
            raise ValueError(
                f"slices {tuple(slices)} must ascend without overlap within the "
                f"{weight.shape[0]} columns of weight"
            )
        previous = stop
    if len(lengths) != 1 or n * next(iter(lengths)) != lora_b.shape[0]:
        raise ValueError(
            f"slices {tuple(slices)} must be of one length and together as long as lora_b's "
            f"{lora_b.shape[0]} rows"
        )
    if lora_a.shape[0] != rank and lora_a.shape[0] != n * rank:  # "in" fails for symbolic sizes
        raise ValueError(
            f"lora_a has {lora_a.shape[0]} rows, but {n} slices of rank {rank} need "
            f"{rank} (shared) or {n * rank}"
        )
    return n > 1 and lora_a.shape[0] == n * rank

# SPDX-License-Identifier: Apache-2.0
"""``lora_linear``: backend choice, operator schemas, autograd and the public function."""

from collections.abc import Sequence

import torch
from torch import Tensor

from samfast.kernels._common import backends
from samfast.kernels._common.autocast import (
    autocast_dtype,
    autocast_input,
    without_autocast,
)
from samfast.kernels._common.implementation import implement
from samfast.kernels._common.middle import IDENTITY
from samfast.kernels._common.once import once_differentiable
from samfast.kernels.lora_linear import engine, reference, torch_path

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_TRITON_RANK = {2: 128, 4: 32}  # by bytes per element; wider tiles spill registers
MAX_TRITON_SLICES = 3


def supports(
    backend: str, x: Tensor, lora_a: Tensor, lora_b: Tensor, slices: int = 1
) -> str | None:
    """None when the backend takes this call, or the sentence that says why it does not."""
    if backend in ("reference", "torch"):
        return None
    if backend == "cpu":
        return backends.cpu_missing(x.device, x.dtype, "lora_down")
    if backend == "cuda":
        return "it has no CUDA source of its own; triton runs it on a GPU"
    if (missing := backends.triton_missing(x.device)) is not None:
        return missing
    if x.dtype == torch.float64:
        return "x is torch.float64, but the kernels take float32, float16 and bfloat16"
    ranks, widest = max(lora_a.shape[0], lora_b.shape[1]), MAX_TRITON_RANK[x.element_size()]
    if ranks > widest:
        return f"rank {ranks}, over all slices, is above {widest}, the widest tile for {x.dtype}"
    if slices > MAX_TRITON_SLICES:
        return f"{slices} slices are more than the {MAX_TRITON_SLICES} the kernels take"
    return None


def path_of(backend, x, lora_a, lora_b, starts):
    slices = max(len(starts), 1)
    name = backends.resolve(
        "lora_linear", backend, x.device, lambda b: supports(b, x, lora_a, lora_b, slices)
    )
    if name == "reference":
        raise RuntimeError("backend 'reference' is plain autograd; call lora_linear for it")
    if name == "cpu":
        from samfast.kernels.lora_linear import cpu_path

        return cpu_path
    if name == "triton":
        from samfast.kernels.lora_linear import triton_kernels

        return triton_kernels
    return torch_path


# The Function stands under the Autograd key of samfast::lora_linear and calls the other two, which
# have no autograd of their own: so torch.compile and opcheck see what eager mode runs.
_OPTIONS = "float scaling, float dropout, str middle, SymInt[] geometry, int[] starts, bool own"
_INPUTS = "Tensor x, Tensor weight, Tensor? bias, Tensor lora_a, Tensor lora_b, Tensor[] params"
_INPUTS += f", Tensor? seed, {_OPTIONS}, str backend"
torch.library.define("samfast::lora_linear", f"({_INPUTS}) -> (Tensor, Tensor, Tensor)")
torch.library.define(
    "samfast::lora_linear_forward", f"({_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor[])"
)
torch.library.define(
    "samfast::lora_linear_backward",
    "(Tensor dy, Tensor? daux, Tensor? dz_pad, Tensor? x, Tensor weight, Tensor lora_a, "
    f"Tensor lora_b, Tensor? z, Tensor[] saved, Tensor[] params, Tensor? seed, "
    f"{_OPTIONS}, bool[] needs, ScalarType bias_dtype, str backend) -> Tensor[]",
)


def _forward(path, x, weight, bias, lora_a, lora_b, params, seed, *options):
    with without_autocast(x.device.type):
        return engine.forward(path, x, weight, bias, lora_a, lora_b, params, seed, options)


def _backward(path, dy, daux, dz_pad, x, weight, lora_a, lora_b, z, saved, params, seed, *rest):
    *options, needs, bias_dtype = rest
    with without_autocast(dy.device.type):
        grads = engine.backward(
            path, dy, daux, dz_pad, x, weight, lora_a, lora_b, z, saved, params, seed, options,
            needs, bias_dtype,
        )  # fmt: skip
    return [g for g in grads if g is not None]


@implement("samfast::lora_linear_forward")
def _forward_impl(x, weight, bias, lora_a, lora_b, params, seed, *rest):
    *options, backend = rest
    path = path_of(backend, x, lora_a, lora_b, options[4])
    return _forward(path, x, weight, bias, lora_a, lora_b, params, seed, *options)


@torch.library.register_fake("samfast::lora_linear_forward")
def _forward_fake(*args):
    return _forward(torch_path, *args[:-1])


@implement("samfast::lora_linear_backward")
def _backward_impl(dy, daux, dz_pad, x, weight, lora_a, lora_b, *rest):
    *arguments, backend = rest
    path = path_of(backend, dy, lora_a, lora_b, arguments[8])
    return _backward(path, dy, daux, dz_pad, x, weight, lora_a, lora_b, *arguments)


@torch.library.register_fake("samfast::lora_linear_backward")
def _backward_fake(*args):
    return _backward(torch_path, *args[:-1])


@implement("samfast::lora_linear")
def _impl(*args):
    y, _, aux, z_pad, _ = torch.ops.samfast.lora_linear_forward(*args)
    return y, aux, z_pad


@torch.library.register_fake("samfast::lora_linear")
def _fake(*args):
    y, _, aux, z_pad, _ = _forward(torch_path, *args[:-1])
    return y, aux, z_pad


class LoraLinearFunction(torch.autograd.Function):
    """Saves x (for dA), z (for dB) and what the middle map asks for; parameters cost nothing."""

    @staticmethod
    def forward(ctx, x, weight, bias, lora_a, lora_b, seed, options, backend, *params):
        with torch._C._AutoDispatchBelowADInplaceOrView():
            y, z, aux, z_pad, saved = torch.ops.samfast.lora_linear_forward(
                x, weight, bias, lora_a, lora_b, params, seed, *options, backend
            )
        _, need_weight, _, need_a, need_b = ctx.needs_input_grad[:5]
        ctx.save_for_backward(
            x if need_weight or need_a else None,
            weight,
            lora_a,
            lora_b,
            z if need_b else None,
            seed,
            *params,
            *saved,
        )
        ctx.options, ctx.backend, ctx.count = options, backend, len(params)
        ctx.bias_dtype = weight.dtype if bias is None else bias.dtype
        ctx.shape, ctx.dtype = y.shape, y.dtype
        ctx.set_materialize_grads(False)
        return y, aux, z_pad

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, daux, dz_pad):
        x, weight, lora_a, lora_b, z, seed, *rest = ctx.saved_tensors
        params, saved = rest[: ctx.count], rest[ctx.count :]
        needs = [*ctx.needs_input_grad[:5], *ctx.needs_input_grad[8:]]
        used = next((d for d in (dy, daux, dz_pad) if d is not None), None)
        if used is None:
            return (None,) * (8 + ctx.count)
        if dy is None:  # only aux or z_pad were used
            dy = used.new_zeros((), dtype=ctx.dtype).expand(ctx.shape)
        with torch._C._AutoDispatchBelowADInplaceOrView():
            grads = torch.ops.samfast.lora_linear_backward(
                dy, daux, dz_pad, x, weight, lora_a, lora_b, z, saved, params, seed, *ctx.options,
                needs, ctx.bias_dtype, ctx.backend,
            )  # fmt: skip
        given = iter(grads)
        dx, dweight, dbias, da, db, *dparams = (next(given) if need else None for need in needs)
        return dx, dweight, dbias, da, db, None, None, None, *dparams


@torch.library.impl("samfast::lora_linear", "Autograd")
def _autograd(x, weight, bias, lora_a, lora_b, params, seed, *rest):
    *options, backend = rest
    return LoraLinearFunction.apply(
        x, weight, bias, lora_a, lora_b, seed, tuple(options), backend, *params
    )


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
    if dropout > 0.0 and seed is None:
        seed = torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=x.device)
    starts = [] if slices is None else [start for start, _ in slices]
    return torch.ops.samfast.lora_linear(
        x, weight, bias, lora_a, lora_b, list(params), seed if dropout > 0.0 else None,
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
    dropout: probability of zeroing an element of x on its way to lora_a (always on when above 0).
    seed: int64 tensor of one element on x's device; drawn when dropout needs one and none is given.

    The result has x's dtype, or the autocast dtype. lora_a and lora_b may be of another dtype than
    x (they are meant to stay float32); their gradients come in their own dtype.
    Saves x and h = drop(x) @ lora_a.T, nothing else: no mask, no cast weight.
    Raises ValueError when shapes or dtypes do not fit, RuntimeError when a backend asked for by
    name cannot run.
    """
    own = check_arguments(x, weight, bias, lora_a, lora_b, dropout, seed, slices)
    if backends.requested(backend) == "reference":
        x = autocast_input(x)
        if dropout > 0.0 and seed is None:
            seed = torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=x.device)
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
    """Raise one sentence when the arguments do not chain; True when slices have their own A.

    middle: (ranks in, ranks out) of a middle map between lora_a and lora_b, which then share it
    """
    for name, t in (("weight", weight), ("lora_a", lora_a), ("lora_b", lora_b)):
        if t.dim() != 2:
            raise ValueError(f"{name} has shape {tuple(t.shape)}, but must be a matrix")
    if x.dim() == 0 or x.shape[-1] != weight.shape[1] or x.shape[-1] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)} but weight takes {weight.shape[1]} inputs")
    named = {"x": x, "weight": weight, "lora_a": lora_a, "lora_b": lora_b}
    named |= {name: t for name, t in (("bias", bias), ("seed", seed)) if t is not None}
    for name, t in named.items():
        if t.device != x.device:
            raise ValueError(f"{name} is on {t.device} but x is on {x.device}")
        if name != "seed" and t.dtype not in DTYPES:
            raise ValueError(
                f"{name} is {t.dtype}, but must be float16, bfloat16, float32 or float64"
            )
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
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout is {dropout}, but must be at least 0 and below 1")
    if seed is not None and (seed.dtype != torch.int64 or seed.numel() != 1):
        raise ValueError(f"seed must be one int64 element, but is {seed.dtype} {tuple(seed.shape)}")
    if middle is not None:
        if (lora_a.shape[0], rank) != tuple(middle):
            raise ValueError(
                f"lora_a has rank {lora_a.shape[0]} and lora_b has rank {rank}, but the map "
                f"between them is {' x '.join(map(str, middle))}"
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

# SPDX-License-Identifier: Apache-2.0
"""``cobot_fold``: backend choice, operator schemas, autograd and the public function."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from samfast.kernels._common import backends
from samfast.kernels._common.autocast import without_autocast
from samfast.kernels._common.operator import Operator
from samfast.kernels._common.table import Table
from samfast.kernels.cobot_fold import reference, torch_path

_ABSENT = "it has no native source; torch runs it on a CPU and triton on a GPU"
TABLE = Table("cobot_fold", __package__, absent={"cpu": _ABSENT, "cuda": _ABSENT})


def supports(backend: str, c: Tensor, factor: Tensor) -> str | None:
    """None when the backend takes this call, or the sentence that says why it does not."""
    wide = torch.promote_types(c.dtype, factor.dtype)
    missing = TABLE.missing(backend, c.device, **{"the factors": wide})
    if missing is not None or backend != "triton":
        return missing
    from samfast.kernels.cobot_fold import triton_kernels

    if c.shape[1] > triton_kernels.MAX_WIDTH:
        return f"rank {c.shape[1]} is above {triton_kernels.MAX_WIDTH}, the widest tile"
    if c.shape[2] ** 2 > 2**31 - 1:
        return f"P of {c.shape[2]}×{c.shape[2]} slices has more elements than int32 can count"
    return None


def fold_backend(backend: str, c: Tensor, factor: Tensor) -> str:
    """The backend of the fold in a layer whose products run on ``backend``."""
    return TABLE.choose(TABLE.part(backend), c.device, lambda b: supports(b, c, factor))


class CobotFold(Operator):
    """Saves its inputs, which are parameters."""

    name = "cobot_fold"
    inputs = (
        "Tensor c, Tensor p, Tensor[] gammas, Tensor[] heads, Tensor[] factors, Tensor[] biases, "
        "int first, bool down, str backend"
    )
    makes = "Tensor folded, Tensor shifts"
    backward_inputs = f"Tensor dfolded, Tensor? dshifts, {inputs}"
    gradients = "c p gammas heads factors biases"
    fake_path = fake_backward_path = torch_path

    @staticmethod
    def path(backend, c, factors, **_):
        backend = TABLE.part(backend)
        return TABLE.path(backend, c.device, lambda b: supports(b, c, factors[0]))

    @staticmethod
    def forward(path, *inputs):
        return path.forward(*inputs)

    @staticmethod
    def backward(path, dfolded, dshifts, *inputs):
        *_, biases, _, down = inputs
        if down and dshifts is None:
            dshifts = biases[0].new_zeros(len(biases), *biases[0].shape)
        return path.backward(dfolded.contiguous(), dshifts if down else None, *inputs)


def cobot_fold(
    c: Tensor,
    p: Tensor,
    gammas: Sequence[Tensor],
    heads: Sequence[Tensor],
    factors: Sequence[Tensor],
    biases: Sequence[Tensor] = (),
    first: int = 0,
    *,
    down: bool = False,
    backend: str = "auto",
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """SAM-COBOT's coefficients and hyper-complex heads, folded into factors of low rank.

    Slice m of a model multiplies its bottleneck h (…, V) by K_m = diag(γ + (C P)[:, m]) W, where W
    is the quaternion matrix of its head. This folds K_m into the factor next to it, for N layers at
    once. Each layer has n slices; they are the N·n slices from ``first`` on.

    c: (1, V, S)   p: (S, S)   gammas: N of (n·V,)   heads: N of (n, 4, V/4, V/4), the quarters
        r, i, j, k as (inputs, outputs)
    factors: N of (n·R, V), the slices' B stacked -> B K_mᵀ; or with ``down``, n = 1, N of
        (V, R) -> K_mᵀ A, and biases, N of (V,) -> b K_m
    Returns the folded factors and the folded biases, () without ``down``, in their dtypes; sums
    are at least float32. Saves only its inputs. Source: SAM-COBOT, CVPR 2024.
    Raises ValueError when shapes do not fit or slices are outside the relation matrix.

        folded, _ = cobot_fold(c, p, [gamma], [heads], [lora_b])

    >>> import torch
    >>> from samfast.functional import cobot_fold
    >>> gammas, heads, b = [torch.ones(8)], [torch.randn(2, 4, 1, 1)], [torch.randn(2 * 16, 4)]
    >>> folded, _ = cobot_fold(torch.ones(1, 4, 4), torch.eye(4), gammas, heads, b)
    >>> folded[0].shape
    torch.Size([32, 4])
    """
    _check(c, p, gammas, heads, factors, biases, first, down)
    asked = backends.requested(backend)
    if asked == "reference":
        given = [[c, p], gammas, heads, factors, biases]
        kinds = {t.dtype for part in given for t in part}
        if len(kinds) > 1:  # the specification is of one dtype
            wide = functools.reduce(torch.promote_types, kinds, torch.float32)
            given = [[t.to(wide) for t in part] for part in given]
        with without_autocast(c.device.type):
            folded, shifts = reference.cobot_fold(*given[0], *given[1:], first, down)
        pairs = ((folded, factors), (shifts, biases))
        return tuple(tuple(f.to(like[0].dtype) for f in made) for made, like in pairs)
    folded, shifts = torch.ops.samfast.cobot_fold(
        c, p, list(gammas), list(heads), list(factors), list(biases), first, down, asked
    )
    return folded.unbind(), shifts.unbind() if down else ()


def _check(c, p, gammas, heads, factors, biases, first, down) -> None:
    if c.dim() != 3 or c.shape[0] != 1 or c.shape[1] % 4 or c.shape[1] == 0:
        raise ValueError(
            f"c has shape {tuple(c.shape)}, but must be (1, V, S) with V a multiple of 4"
        )
    _, width, slices = c.shape
    if tuple(p.shape) != (slices, slices):
        raise ValueError(f"p has shape {tuple(p.shape)}, but c has {slices} slices")
    counts = {len(gammas), len(heads), len(factors), len(biases) if down else len(gammas)}
    if len(counts) != 1 or not gammas or (biases and not down):
        raise ValueError(
            "expected one gamma, head and factor for each layer, and a bias only with down=True, "
            f"got {len(gammas)} gammas, {len(heads)} heads, {len(factors)} factors and "
            f"{len(biases)} biases"
        )
    own = heads[0].shape[0]
    last = first + own * len(gammas)
    if first < 0 or last > slices:
        raise ValueError(
            f"slices {first} to {last - 1} are outside the relation matrix p, which has slices 0 "
            f"to {slices - 1}"
        )
    rows = factors[0].numel() // width
    shapes = {
        "gamma": (gammas, (own * width,)),
        "head": (heads, (own, 4, width // 4, width // 4)),
        "factor": (factors, (width, rows) if down else (rows, width)),
        "bias": (biases, (width,)),
    }
    for name, (tensors, shape) in shapes.items():
        for t in tensors:
            if tuple(t.shape) != shape:
                raise ValueError(f"a {name} has shape {tuple(t.shape)}, but must be {shape}")
            if t.device != c.device:
                raise ValueError(f"a {name} is on {t.device} but c is on {c.device}")
            if t.dtype != tensors[0].dtype:
                raise ValueError(
                    f"one {name} is {t.dtype} and another {tensors[0].dtype}; cast all to one dtype"
                )
    if p.device != c.device:
        raise ValueError(f"p is on {p.device} but c is on {c.device}")
    if rows % own or (down and own != 1):
        raise ValueError(f"a factor has {rows} rows, which {own} slices cannot share evenly")

# SPDX-License-Identifier: Apache-2.0
"""Linear layers whose weight is a sum of Kronecker products, in place of nn.Linear."""

import functools
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from samfast.adapters.adapted_linear import plain_linear
from samfast.adapters.checks import check_rank
from samfast.backends import requested, resolve
from samfast.functional import hypercomplex_linear, kronecker_weight
from samfast.kernels._common.autocast import autocast_input
from samfast.kernels.hypercomplex.factored import by_factors, whole
from samfast.kernels.hypercomplex.factors import factors_backend
from samfast.kernels.hypercomplex.op import supports
from samfast.methods.kronecker.checks import check_divides
from samfast.methods.kronecker.layer import reset_rules

Weights = Tensor | tuple[Tensor, Tensor]
Layer = TypeVar("Layer", bound="SumOfProducts")
_kept: dict[tuple[torch.device, torch.dtype], Tensor] = {}  # Hamilton's rules, by device and dtype


def hamilton_rules(like: Tensor) -> Tensor:
    """Return (4, 4, 4): the places and signs of r, i, j and k in a quaternion's matrix.

    That matrix (out_features, in_features) has block rows [r, −i, −j, −k], [i, r, −k, j],
    [j, k, r, −i], [k, −j, i, r]. like: a tensor with the wanted device and dtype

    The rules are constants, made once for each device, and not part of a module's state. A tracer's
    tensors get rules of their own.
    """
    if torch.compiler.is_compiling() or isinstance(like, FakeTensor):
        return _made_rules(like)
    key = like.device, like.dtype
    if key not in _kept:
        with torch.inference_mode(False):  # inference tensors could not be saved for backward
            made = _made_rules(like)
        if type(made) is not Tensor or torch._C._functorch.is_functorch_wrapped_tensor(made):
            return made
        _kept[key] = made
    return _kept[key]


def _made_rules(like: Tensor) -> Tensor:
    at = torch.arange(4, device=like.device)
    row, column = at[:, None], at[None, :]
    minus = (column > 0) & ((row == 0) | (row == (column + 1) % 3 + 1))
    here = at[:, None, None] == row ^ column
    return torch.where(here, 1 - 2 * minus.to(like.dtype), 0.0)


class SumOfProducts(nn.Module):
    """Linear layer of Σ_i rules_i ⊗ weights_i; a subclass returns both in ``parts``."""

    in_features: int
    out_features: int
    bias: nn.Parameter | None

    def parts(self) -> tuple[Tensor, Weights]:
        """Return rules (m, n, n) and weights (m, out_features/n, in_features/n), differentiable.

        The weights may also be two factors, (m, out_features/n, k) and (m, in_features/n, k).
        """
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """Compute the matrix (out_features, in_features), anew at each call."""
        return kronecker_weight(*self.parts())

    def forward(self, x: Tensor) -> Tensor:
        return hypercomplex_linear(x, *self.parts(), self.bias)

    @torch.no_grad()
    def plain(self) -> nn.Linear:
        """Return an nn.Linear with the current matrix, for export."""
        return plain_linear(self.weight, self.bias)

    def reset_bias(self) -> None:
        if self.bias is not None:
            bound = self.in_features**-0.5
            nn.init.uniform_(self.bias, -bound, bound)

    def backends(self) -> dict[str, str]:
        """Map each operation to the backend that a forward would choose now, under autocast too."""
        with torch.no_grad():
            rules, weights = self.parts()
        if isinstance(weights, tuple):
            if by_factors(rules, *weights):
                return _factors_backend(rules)
            weights = whole(*weights).to(rules.dtype)
        x = autocast_input(weights[:0])
        try:
            name = resolve(
                "hypercomplex",
                requested("auto"),
                x.device,
                lambda backend: supports(backend, x.device, x.dtype, rules, weights),
            )
        except RuntimeError as error:
            return {"hypercomplex": str(error)}
        return {"hypercomplex": name}

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}"
        )

    @classmethod
    def _from_linear(cls: type[Layer], linear: nn.Linear, *options: Any) -> Layer:
        if type(linear) is not nn.Linear:
            raise TypeError(f"expected a plain nn.Linear, got {type(linear).__name__}")
        module = cls(
            linear.in_features,
            linear.out_features,
            *options,
            bias=False,
            device=linear.weight.device,
            dtype=linear.weight.dtype,
        )
        module.bias = linear.bias
        return module.train(linear.training)


def _factors_backend(rules: Tensor) -> dict[str, str]:
    """Name the backend of the factors; torch runs the two products after them."""
    try:
        name = factors_backend(requested("auto"), rules.device, rules.dtype)
    except RuntimeError as error:
        return {"kronecker_factors": str(error)}
    return {"kronecker_factors": name}


def _cells(weight: Tensor, n: int) -> Tensor:
    """View a weight (O, D) as n · n blocks: (n, n, O/n, D/n), at least float32."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    rows, columns = weight.shape[0] // n, weight.shape[1] // n
    return weight.detach().to(wide).view(n, rows, n, columns).transpose(1, 2)


class QuaternionLinear(SumOfProducts):
    """Linear layer over the quaternions (Parcollet et al. 2019), with a quarter of the weights.

    x: (..., in_features) -> (..., out_features) = x W + b, with features in four quarters r, i, j,
    k. W has block rows [r, i, j, k], [−i, r, k, −j], [−j, −k, r, i], [−k, j, −i, r].

    r_weight, i_weight, j_weight, k_weight: (in_features/4, out_features/4); r zeros and i, j and k
        uniform in (0, 1), as SAM-COBOT starts   bias: as nn.Linear's
    Raises ValueError unless both sizes are multiples of 4.
    """

    r_weight: nn.Parameter
    i_weight: nn.Parameter
    j_weight: nn.Parameter
    k_weight: nn.Parameter
    PARTS = ("r_weight", "i_weight", "j_weight", "k_weight")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.types.Device = None,
        dtype: torch.dtype | None = None,
    ):
        for size, what in ((in_features, "inputs"), (out_features, "outputs")):
            whole_number = isinstance(size, int) and not isinstance(size, bool)
            if not whole_number or size % 4 or size < 1:
                raise ValueError(
                    f"a quaternion layer has four equal parts, but {size!r} {what} do not divide "
                    "by 4"
                )
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        for name in self.PARTS:
            part = torch.empty(in_features // 4, out_features // 4, device=device, dtype=dtype)
            self.register_parameter(name, nn.Parameter(part))
        own = torch.empty(out_features, device=device, dtype=dtype) if bias else None
        self.register_parameter("bias", None if own is None else nn.Parameter(own))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        nn.init.zeros_(self.r_weight)
        for name in self.PARTS[1:]:
            nn.init.uniform_(self.get_parameter(name))
        self.reset_bias()

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> "QuaternionLinear":
        """Build the quaternion layer nearest to ``linear`` in least squares; keep its bias."""
        module = cls._from_linear(linear)
        cells = _cells(linear.weight, 4)
        with torch.no_grad():
            rules = hamilton_rules(cells)
            nearest = torch.einsum("mpq,pqab->mba", rules, cells) / 4  # each part occurs four times
            for name, part in zip(cls.PARTS, nearest, strict=True):
                module.get_parameter(name).copy_(part)
        return module

    def parts(self) -> tuple[Tensor, Tensor]:
        weights = torch.stack([self.get_parameter(name).t() for name in self.PARTS])
        return hamilton_rules(weights), weights


class PHMLinear(SumOfProducts):
    """Linear layer of n Kronecker products (PHM, Zhang et al. 2021), with 1/n of the weights.

    x: (..., in_features) -> (..., out_features) = x (Σ_i rules_i ⊗ weights_i)ᵀ + bias

    rules: (n, n, n), uniform of variance 1/n   weights: (n, out_features/n, in_features/n), uniform
    as nn.Linear's weight is, so that their sum has its variance   bias: as nn.Linear's
    rank: not None, of weights_i = left_i right_iᵀ (Compacter, Mahabadi et al. 2021), trained as
        left: (n, out_features/n, rank), uniform of variance 1/rank, and
        right: (n, in_features/n, rank), uniform as weights are
    Raises ValueError unless n divides both sizes, and if the rank exceeds the sides of a part.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        n: int,
        rank: int | None = None,
        bias: bool = True,
        device: torch.types.Device = None,
        dtype: torch.dtype | None = None,
    ):
        check_divides(n, in_features, out_features)
        rows, columns = out_features // n, in_features // n
        if rank is not None:
            check_rank(rank)
            if rank > min(rows, columns):
                raise ValueError(
                    f"rank {rank} is above {min(rows, columns)}, the smaller side of parts of "
                    f"{rows} x {columns}"
                )
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.n, self.rank = n, rank
        empty = functools.partial(torch.empty, device=device, dtype=dtype)
        self.rules = nn.Parameter(empty(n, n, n))
        if rank is None:
            self.weights = nn.Parameter(empty(n, rows, columns))
        else:
            self.left = nn.Parameter(empty(n, rows, rank))
            self.right = nn.Parameter(empty(n, columns, rank))
        self.register_parameter("bias", nn.Parameter(empty(out_features)) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        reset_rules(self.rules)
        bound = self.in_features**-0.5
        nn.init.uniform_(self.weights if self.rank is None else self.right, -bound, bound)
        if self.rank is not None:
            bound = (3 / self.rank) ** 0.5
            nn.init.uniform_(self.left, -bound, bound)
        self.reset_bias()

    @classmethod
    def from_linear(cls, linear: nn.Linear, n: int, rank: int | None = None) -> "PHMLinear":
        """Build the sum of n Kronecker products nearest to ``linear``; keep its bias Parameter.

        Nearest is in least squares, by the largest n singular values of the blocks (Van Loan and
        Pitsianis 1993). With a rank, each weight is then replaced by the nearest of that rank.
        Raises ValueError if the weight has NaN or infinity.
        """
        module = cls._from_linear(linear, n, rank)
        if not linear.weight.is_meta and not linear.weight.isfinite().all():
            raise ValueError("the weight contains NaN or infinity")
        cells = _cells(linear.weight, n).flatten(2).flatten(0, 1)  # (n · n, positions)
        rules, weights = _nearest(cells, n)
        with torch.no_grad():
            module.rules.copy_(rules.mT.view(n, n, n))
            weights = weights.view(n, module.out_features // n, module.in_features // n)
            if rank is None:
                module.weights.copy_(weights)
            else:
                left, right = _nearest(weights, rank)
                module.left.copy_(left)
                module.right.copy_(right.mT)
        return module

    def parts(self) -> tuple[Tensor, Weights]:
        return self.rules, (self.weights if self.rank is None else (self.left, self.right))

    def extra_repr(self) -> str:
        text = f"{super().extra_repr()}, n={self.n}"
        return text if self.rank is None else f"{text}, rank={self.rank}"


def _nearest(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factor a matrix into (..., rows, rank) and (..., rank, columns), nearest in least squares.

    Entries beyond the matrix's own rank are zeros.
    """
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    kept = min(rank, values.shape[-1])
    root = values[..., :kept].sqrt()
    left, right = left[..., :kept] * root[..., None, :], right[..., :kept, :] * root[..., None]
    return F.pad(left, (0, rank - kept)), F.pad(right, (0, 0, 0, rank - kept))

# SPDX-License-Identifier: Apache-2.0
"""Linear layers whose weight is a sum of Kronecker products, in place of nn.Linear."""

import torch
from torch import Tensor, nn

from samfast.backends import requested, resolve
from samfast.functional import hypercomplex_linear, kronecker_weight
from samfast.kernels._common.autocast import autocast_input
from samfast.kernels.hypercomplex.op import supports
from samfast.modules.kronecker import check_divides, reset_rules

# Hamilton's: block (p, q) of the weight (out_features, in_features) is (part, sign).
_HAMILTON = (
    ((0, 1), (1, -1), (2, -1), (3, -1)),
    ((1, 1), (0, 1), (3, -1), (2, 1)),
    ((2, 1), (3, 1), (0, 1), (1, -1)),
    ((3, 1), (2, -1), (1, 1), (0, 1)),
)


def hamilton_rules(device=None, dtype=None) -> Tensor:
    """(4, 4, 4): where r, i, j and k stand in a quaternion's matrix, and with which sign."""
    rules = torch.zeros(4, 4, 4)
    for p, row in enumerate(_HAMILTON):
        for q, (part, sign) in enumerate(row):
            rules[part, p, q] = sign
    return rules.to(device=device, dtype=dtype or torch.get_default_dtype())


class _SumOfProducts(nn.Module):
    """A linear layer of Σ_i rules_i ⊗ weights_i; a subclass says in ``parts`` of which."""

    in_features: int
    out_features: int
    bias: nn.Parameter | None

    def parts(self) -> tuple[Tensor, Tensor]:
        """rules (m, n, n) and weights (m, out_features/n, in_features/n), differentiable."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """(out_features, in_features): the matrix, made at each call; nothing is kept of it."""
        return kronecker_weight(*self.parts())

    def forward(self, x: Tensor) -> Tensor:
        return hypercomplex_linear(x, *self.parts(), self.bias)

    def reset_bias(self) -> None:
        if self.bias is not None:
            bound = self.in_features**-0.5
            nn.init.uniform_(self.bias, -bound, bound)

    def backends(self) -> dict[str, str]:
        """What a forward would choose here and now, for an x as autocast would have it."""
        with torch.no_grad():
            rules, weights = self.parts()
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
    def _from_linear(cls, linear: nn.Linear, *options):
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


def _cells(weight: Tensor, n: int) -> Tensor:
    """A weight (O, D) as its n · n blocks: (n, n, O/n, D/n), at least float32."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    rows, columns = weight.shape[0] // n, weight.shape[1] // n
    return weight.detach().to(wide).view(n, rows, n, columns).transpose(1, 2)


class QuaternionLinear(_SumOfProducts):
    """Linear layer over the quaternions (Parcollet et al. 2019), with a quarter of the weights.

    x: (..., in_features) -> (..., out_features) = x W + b, features in four quarters r, i, j, k and
    W of block rows [r, i, j, k], [−i, r, k, −j], [−j, −k, r, i], [−k, j, −i, r]

    r_weight, i_weight, j_weight, k_weight: (in_features/4, out_features/4); r zeros and i, j and k
        uniform in (0, 1), as SAM-COBOT starts   bias: as nn.Linear's
    Raises ValueError where four does not divide both sizes.
    """

    PARTS = ("r_weight", "i_weight", "j_weight", "k_weight")

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, device=None, dtype=None
    ):
        for size, what in ((in_features, "inputs"), (out_features, "outputs")):
            if size % 4 or size < 1:
                raise ValueError(
                    f"a quaternion layer has four equal parts, but {size} {what} do not divide by 4"
                )
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        options = {"device": device, "dtype": dtype}
        for name in self.PARTS:
            part = torch.empty(in_features // 4, out_features // 4, **options)
            self.register_parameter(name, nn.Parameter(part))
        bias = nn.Parameter(torch.empty(out_features, **options)) if bias else None
        self.register_parameter("bias", bias)
        self.register_buffer("rules", hamilton_rules(device, dtype), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.r_weight)
        for name in self.PARTS[1:]:
            nn.init.uniform_(self.get_parameter(name))
        self.rules.copy_(hamilton_rules(self.rules.device, self.rules.dtype))
        self.reset_bias()

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> "QuaternionLinear":
        """The quaternion layer nearest to ``linear`` in least squares, with its bias Parameter."""
        module = cls._from_linear(linear)
        cells = _cells(linear.weight, 4)
        with torch.no_grad():
            rules = module.rules.to(cells.dtype)
            nearest = torch.einsum("mpq,pqab->mba", rules, cells) / 4  # each part stands four times
            for name, part in zip(cls.PARTS, nearest, strict=True):
                module.get_parameter(name).copy_(part)
        return module

    def parts(self) -> tuple[Tensor, Tensor]:
        weights = torch.stack([self.get_parameter(name).t() for name in self.PARTS])
        return self.rules, weights


class PHMLinear(_SumOfProducts):
    """Linear layer of n Kronecker products (PHM, Zhang et al. 2021), with 1/n of the weights.

    x: (..., in_features) -> (..., out_features) = x (Σ_i rules_i ⊗ weights_i)ᵀ + bias

    rules: (n, n, n), uniform of variance 1/n   weights: (n, out_features/n, in_features/n), uniform
    as nn.Linear's weight is, so that their sum has its variance   bias: as nn.Linear's
    Raises ValueError where n does not divide both sizes.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        n: int,
        bias: bool = True,
        device=None,
        dtype=None,
    ):
        check_divides(n, in_features, out_features)
        super().__init__()
        self.in_features, self.out_features, self.n = in_features, out_features, n
        options = {"device": device, "dtype": dtype}
        self.rules = nn.Parameter(torch.empty(n, n, n, **options))
        self.weights = nn.Parameter(torch.empty(n, out_features // n, in_features // n, **options))
        bias = nn.Parameter(torch.empty(out_features, **options)) if bias else None
        self.register_parameter("bias", bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        reset_rules(self.rules)
        bound = self.in_features**-0.5
        nn.init.uniform_(self.weights, -bound, bound)
        self.reset_bias()

    @classmethod
    def from_linear(cls, linear: nn.Linear, n: int) -> "PHMLinear":
        """The sum of n Kronecker products nearest to ``linear`` in least squares, with its bias
        Parameter (Van Loan and Pitsianis 1993: the largest n singular values of the blocks)."""
        module = cls._from_linear(linear, n)
        cells = _cells(linear.weight, n).flatten(2).flatten(0, 1)  # (n · n, positions)
        left, values, right = torch.linalg.svd(cells, full_matrices=False)
        kept = min(n, len(values))
        root = values[:kept].sqrt()
        with torch.no_grad():
            for parameter in (module.rules, module.weights):
                parameter[kept:].zero_()
            module.rules[:kept].copy_((left[:, :kept] * root).t().view(kept, n, n))
            weights = (right[:kept] * root[:, None]).view(kept, *module.weights.shape[1:])
            module.weights[:kept].copy_(weights)
        return module

    def parts(self) -> tuple[Tensor, Tensor]:
        return self.rules, self.weights

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, n={self.n}"

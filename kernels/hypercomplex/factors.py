# SPDX-License-Identifier: Apache-2.0
"""``kronecker_factors``: a sum of Kronecker products of low rank as the two factors of LoRA."""

import torch
from torch import Tensor

from samfast.kernels._common import backends
from samfast.kernels._common.arguments import check_tensors
from samfast.kernels._common.autocast import without_autocast
from samfast.kernels._common.operator import Operator
from samfast.kernels._common.table import Table
from samfast.kernels.hypercomplex import reference
from samfast.kernels.hypercomplex.built import MAX_ELEMENTS

TABLE = Table(
    "kronecker_factors",
    __package__,
    absent={
        "cpu": "the factors have no C++ source; torch makes them on a CPU",
        "cuda": "the factors have no CUDA source; triton makes them on a GPU",
    },
    paths={"torch": "torch_factors", "triton": "triton_factors"},
)


def supports(
    backend: str, device: torch.device, dtype: torch.dtype, elements: int = 0
) -> str | None:
    """None when the backend takes this call, or the sentence that says why it does not.

    elements: of the larger factor
    """
    missing = TABLE.missing(backend, device, **{"the factors": dtype})
    if missing is None and backend == "triton" and elements >= MAX_ELEMENTS:
        return f"a factor has {elements} elements, but the kernels take fewer than {MAX_ELEMENTS}"
    return missing


def factors_backend(
    backend: str, device: torch.device, dtype: torch.dtype, elements: int = 0
) -> str:
    """The backend of the factors in a layer that runs on ``backend``."""
    return TABLE.choose(TABLE.part(backend), device, lambda b: supports(b, device, dtype, elements))


def _dtype(rules, left, right):
    return torch.promote_types(rules.dtype, torch.promote_types(left.dtype, right.dtype))


_PARTS = "Tensor rules, Tensor left, Tensor right"


class KroneckerFactors(Operator):
    """Saves its three inputs, which are parameters."""

    name = "kronecker_factors"
    inputs = f"{_PARTS}, str backend"
    makes = "Tensor a, Tensor b"
    backward_inputs = f"Tensor? da, Tensor? db, {_PARTS}, bool[] needs, str backend"
    gradients = "rules left right"
    has_forward = False

    @staticmethod
    def path(backend, rules, left, right, **_):
        sizes = rules.shape[1] * left.shape[1], rules.shape[1] * right.shape[1]
        elements = rules.shape[0] * rules.shape[1] * left.shape[2] * max(sizes)
        device, dtype = rules.device, _dtype(rules, left, right)
        backend = TABLE.part(backend)
        return TABLE.path(backend, device, lambda b: supports(b, device, dtype, elements))

    @staticmethod
    def forward(path, rules, left, right):
        return path.forward(rules, left, right, _dtype(rules, left, right))

    @staticmethod
    def backward(path, da, db, rules, left, right, needs):
        da, db = (None if d is None else d.contiguous() for d in (da, db))
        return list(path.backward(da, db, rules, left, right, needs))

    @staticmethod
    def fake(rules, left, right, backend):
        (terms, n, _), (_, rows, rank), columns = rules.shape, left.shape, right.shape[1]
        width, dtype = terms * n * rank, _dtype(rules, left, right)
        return (
            rules.new_empty(width, n * columns, dtype=dtype),
            rules.new_empty(n * rows, width, dtype=dtype),
        )

    @staticmethod
    def wants(need, given):
        """rules and left are only in lora_b, right only in lora_a."""
        output = {"rules": "b", "left": "b", "right": "a"}
        return {name: wanted and output[name] in given for name, wanted in need.items()}


def kronecker_factors(
    rules: Tensor, left: Tensor, right: Tensor, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Factors of Σ_i rules_i ⊗ (left_i right_iᵀ), so that plain LoRA runs it.

    rules: (m, n, n)   left: (m, P, k)   right: (m, Q, k)
    lora_a: (m · n · k, n · Q) = the blocks I_n ⊗ right_iᵀ stacked
    lora_b: (n · P, m · n · k) = the blocks rules_i ⊗ left_i side by side
    lora_b @ lora_a = Σ_i rules_i ⊗ (left_i right_iᵀ), in the widest of the three dtypes

    Saves its inputs. Raises ValueError when the shapes do not fit.

        lora_a, lora_b = kronecker_factors(rules, left, right)

    >>> import torch
    >>> from samfast.functional import kronecker_factors
    >>> rules, left, right = torch.randn(4, 4, 4), torch.randn(4, 3, 1), torch.randn(4, 2, 1)
    >>> lora_a, lora_b = kronecker_factors(rules, left, right)
    >>> lora_a.shape, lora_b.shape
    (torch.Size([16, 8]), torch.Size([12, 16]))
    """
    check_factors(rules, left, right)
    if backends.requested(backend) == "reference":
        dtype = _dtype(rules, left, right)
        with without_autocast(rules.device.type):
            return reference.kronecker_factors(*(t.to(dtype) for t in (rules, left, right)))
    return torch.ops.samfast.kronecker_factors(rules, left, right, backends.requested(backend))


def check_factors(rules: Tensor, left: Tensor, right: Tensor) -> None:
    """Raise ValueError when the three do not fit together."""
    if rules.dim() != 3 or rules.shape[1] != rules.shape[2] or 0 in rules.shape:
        raise ValueError(f"rules has shape {tuple(rules.shape)}, but must be (terms, n, n)")
    terms = rules.shape[0]
    for name, t in (("left", left), ("right", right)):
        if t.dim() != 3 or 0 in t.shape or t.shape[0] != terms or t.shape[2] != left.shape[2]:
            raise ValueError(
                f"{name} has shape {tuple(t.shape)}, but {terms} terms need ({terms}, size, rank), "
                "of one rank for left and right"
            )
    check_tensors({"rules": rules, "left": left, "right": right})

# SPDX-License-Identifier: Apache-2.0
"""What the first run on a GPU checks: each operation's ways, and the kernels that each launches.

The cases are those of tests/kernels, at their small sizes: one compile of a kernel for each. An
operation without rows of its own runs its example.
"""

import ast
import dataclasses
import importlib
from collections.abc import Callable
from pathlib import Path

import torch
from draws import DEVICE

from kernels.adapt_former import cases as adapt_former
from kernels.cobot_fold import cases as cobot_fold
from kernels.conv_experts import cases as conv_experts
from kernels.hypercomplex import cases as hypercomplex
from kernels.lora_linear import cases as lora_linear
from kernels.relpos_attention import cases as relpos_attention
from kernels.sam_block import cases as sam_block
from kernels.task_core import cases as task_core
from samfast.info import OPERATIONS
from samfast.kernels.adapt_former import triton_kernels as sums

ROOT = Path(__file__).parents[2]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHARED = {"window_attention": {"forward_kernel", "dq_kernel", "dkv_kernel"}}  # of other folders
IN_16_BITS = {"joint_weight_kernel"}  # alone
FLOAT32_HEAD = 64  # the widest head that attention's kernels take in float32


@dataclasses.dataclass(frozen=True)
class Row:
    """One way of one operation.

    run: (dtype, backend) -> results   kernels: of the operation's folder, launched by Triton
    exact: () -> results in float64, of a dtype, where that is not run(float64, "reference")
    """

    operation: str
    way: str
    run: Callable
    kernels: tuple[str, ...]
    names: tuple[str, ...] = ()
    backends: tuple[str, ...] = ("triton",)
    exact: Callable | None = None
    dtypes: tuple[torch.dtype, ...] = DTYPES

    def __str__(self) -> str:
        return f"{self.operation}-{self.way}"

    def in_float64(self, dtype: torch.dtype):
        return self.exact(dtype) if self.exact else self.run(torch.float64, "reference")


def kernels(operation: str) -> set[str]:
    """Names of the Triton kernels that an operation's folder launches."""
    found = set(SHARED.get(operation, ()))
    for path in (ROOT / "kernels" / operation).glob("triton_*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                found.add(node.name)
    return found


def _rows(operation, kernels, ways, names=(), native=()):
    """native: the ways for which csrc/cuda has sources too"""
    for way, case in ways.items():
        backends = ("triton", "cuda") if way in native else ("triton",)
        own = names or getattr(case, "names", ()) if operation != "sam_block" else ()
        dtypes = DTYPES[1:] if getattr(case, "head_dim", 0) > FLOAT32_HEAD else DTYPES
        yield Row(operation, way, case.run, kernels, tuple(own), backends, dtypes=dtypes)


def _in_chunks():
    """AdaptFormer's sums by chunks of rows, as it makes them where partials would be large."""
    case = adapt_former.Case(shape=(150, 48))

    def run(dtype, backend):
        most, sums.MAX_ALONG = sums.MAX_ALONG, 0
        try:
            return case.run(dtype, backend)
        finally:
            sums.MAX_ALONG = most

    yield Row("adapt_former", "chunks", run, ("gradient_kernel",), adapt_former.NAMES)


def _folds():
    kernels = ("fold_kernel", "fold_backward_kernel", "shared_backward_kernel")
    for way, case in {"up": cobot_fold.CASES[0], "down": cobot_fold.CASES[1]}.items():

        def run(dtype, backend, case=case):
            return case.results(case.sources(dtype), backend)

        def exact(dtype, case=case):
            return case.results(case.sources(dtype, torch.float64), "reference")

        yield Row("cobot_fold", way, run, kernels, exact=exact)


def _example(operation) -> Row:
    """The example of an operation, which launches all its kernels."""
    example = importlib.import_module(f"samfast.kernels.{operation}.example")

    def run(dtype, backend):
        return example.run(backend, DEVICE, dtype)

    native = (ROOT / "csrc" / "cuda" / f"{operation}.cu").is_file()
    backends = ("triton", "cuda") if native else ("triton",)
    return Row(operation, "example", run, tuple(kernels(operation)), example.RESULTS, backends)


MAPS, WINDOWS = relpos_attention.MapCase, relpos_attention.WindowCase
EXPERTS, BLOCK, LORA = conv_experts.Case, sam_block.Case, lora_linear.Case
Q_AND_V = ((0, 16), (32, 48))


class WideBlock(BLOCK):
    """Norms that are not trained, beside ranks above those whose rows are kept."""

    rank = 12

    @property
    def names(self):
        return ["" if name.startswith("norm") else name for name in super().names]


OF_BLOCK = ("norm_row_kernel", "norm_row_backward_kernel", "gelu_kernel", "gelu_backward_kernel")
LISTED = (
    *_rows(
        "lora_linear",
        ("down_kernel", "up_kernel", "up_backward_kernel", "reduce_kernel", "down_backward_kernel"),
        {
            "plain": LORA(),
            "slices": LORA(slices=Q_AND_V, dropout=0.25),
            "shared": LORA(slices=Q_AND_V, shared=True, rank=20),
        },
        lora_linear.NAMES,
    ),
    *_rows(
        "relpos_attention",
        (
            "prepare_kernel",
            "forward_kernel",
            "dq_kernel",
            "dkv_kernel",
            "tables_kernel",
            "reduce_kernel",
        ),
        {
            "map": MAPS(),
            "sam-map": MAPS(batch=1, heads=1, height=64, width=64, head_dim=64),
            "head80": MAPS(batch=1, height=5, width=37, head_dim=80),
            "windows": WINDOWS(),
            "windows-pads": WINDOWS(rank=3, head_dim=32),
            "windows-whole": WINDOWS(height=28, width=14, head_dim=80),
        },
    ),
    *_rows(
        "conv_experts",
        ("forward_kernel", "backward_kernel", "reduce_kernel"),
        {
            "all": EXPERTS(samples=8),
            "odd": EXPERTS(ratios=(1, 3), height=9, width=11),
            "even": EXPERTS(ratios=(2, 4), height=9, width=11, activation="none"),
            "depthwise": EXPERTS(samples=8, depthwise=True, residual=False),
        },
        conv_experts.NAMES,
        native=("all",),
    ),
    *_folds(),
    *_rows(
        "adapt_former",
        ("low_kernel", "low_backward_kernel", "fold_kernel"),
        {"plain": adapt_former.Case(), "dropout": adapt_former.Case(dropout=0.3)},
        adapt_former.NAMES,
    ),
    *_in_chunks(),
    *_rows(
        "hypercomplex",
        ("build_kernel", "contract_kernel", "sum_kernel"),
        {"phm": hypercomplex.Case(rows=40, columns=24), "base": hypercomplex.Case(base=True)},
        hypercomplex.NAMES,
        native=("phm",),
    ),
    *_rows(
        "hypercomplex",
        ("factors_kernel", "factors_backward_kernel"),
        {"factors": hypercomplex.Factors(rank=2)},
        hypercomplex.FACTOR_NAMES,
    ),
    *_rows(
        "task_core",
        ("product_kernel", "product_backward_kernel", "fold_kernel", "fold_backward_kernel"),
        {"one": task_core.Case(), "mixed": task_core.Case(task=(2, 0, 2, 1, 1, 2))},
        task_core.NAMES,
        native=("mixed",),
    ),
    *_rows(
        "sam_block",
        (*OF_BLOCK, "add_row_kernel"),
        {
            "windows": BLOCK(),
            "global": BLOCK(window=0),
            "sliced": BLOCK(sliced=True, dropout=0.2),
            "balanced": BLOCK(memory="balanced"),
            "minimal": BLOCK(memory="minimal"),
        },
    ),
    Row("sam_block", "joint", BLOCK().run, ("joint_weight_kernel",), dtypes=DTYPES[1:]),
    *_rows("sam_block", OF_BLOCK, {"experts": BLOCK(experts=True, adapters=("qkv",))}),
    *_rows("sam_block", ("norm_kernel", "norm_backward_kernel"), {"wide": WideBlock()}),
)
ROWS = (*LISTED, *map(_example, sorted(set(OPERATIONS) - {row.operation for row in LISTED})))

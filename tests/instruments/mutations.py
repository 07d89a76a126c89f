# SPDX-License-Identifier: Apache-2.0
"""What kernels get wrong, planted in each product and sum of an operation: is the budget sharp?

    python tests/instruments/mutations.py [operation …]

prints, for the smallest and the largest case of each operation and for each dtype, at how many of
its places a fault is seen, and by what factor it is above the budget: at the place where it is
seen least, and at the median place. Below one it is not seen.
"""

import dataclasses
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from samfast.kernels._common.budget import Budget
from samfast.kernels._common.reordered import CONVOLUTIONS, PRODUCTS, SUMS, Seen, aten

NARROW = (torch.float16, torch.bfloat16)
CHUNK = 16  # terms that are added before a sum is stored


def tf32(t: Tensor) -> Tensor:
    """float32 with ten bits behind the point."""
    bits = t.contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


def as_bfloat16(t: Tensor) -> Tensor:
    return t.bfloat16().float()


def _with_factors(change, func, packet, args, kwargs):
    """A product of changed factors."""
    if packet in PRODUCTS:
        places = [place for place, _ in PRODUCTS[packet]]
    else:
        places = [0, 1] if packet is aten.convolution else [0, 1, 2]
    args = [change(t) if i in places else t for i, t in enumerate(args)]
    return func(*args, **kwargs)


def _in_16_bits(func, packet, args, kwargs):
    """A product whose sum is stored in 16 bits after every few terms."""
    (first, dim), (second, across) = PRODUCTS[packet]
    narrow = args[first].dtype if args[first].dtype in NARROW else torch.bfloat16
    zeros, total = [torch.zeros_like(t) for t in args[:first]], None
    for start in range(0, args[first].shape[dim], CHUNK):
        some = list(args)
        if total is not None:
            some[:first] = zeros
        for place, axis in ((first, dim), (second, across)):
            length = min(CHUNK, args[place].shape[axis] - start)
            some[place] = args[place].narrow(axis, start, length).float()
        some[:first] = [t.float() for t in some[:first]]
        part = func(*some, **kwargs)
        total = part if total is None else (total.to(narrow).float() + part)
    made = func(*args, **kwargs) if total is None else total.to(narrow)
    return made.to(args[first].dtype)


def _scaled(by, func, packet, args, kwargs):
    """A result that is too large."""
    made = func(*args, **kwargs)
    if isinstance(made, tuple):
        return tuple(t if t is None else t * (1 + by) for t in made)
    return made * (1 + by)


FAULTS = {
    "product in TF32": (partial(_with_factors, tf32), (*PRODUCTS, *CONVOLUTIONS)),
    "product in bfloat16": (partial(_with_factors, as_bfloat16), (*PRODUCTS, *CONVOLUTIONS)),
    "sum in 16 bits": (_in_16_bits, tuple(PRODUCTS)),
    "1 + 1e-3": (partial(_scaled, 1e-3), (*PRODUCTS, *CONVOLUTIONS, *SUMS)),
    "1 + 5e-2": (partial(_scaled, 5e-2), (*PRODUCTS, *CONVOLUTIONS, *SUMS)),
    "1 + 2e-1": (partial(_scaled, 2e-1), (*PRODUCTS, *CONVOLUTIONS, *SUMS)),
    "delta from a rounded lse": (None, (aten._softmax_backward_data,)),
}
OF_FLOAT32 = ("product in TF32", "product in bfloat16")
OF_NARROW = {torch.float16: "1 + 5e-2", torch.bfloat16: "1 + 2e-1"}  # what must be seen there


class Planted(Seen):
    """While entered, the fault is made at one place; ``places`` counts how many there are."""

    def __init__(self, fault: str, place: int):
        super().__init__(0)
        self.fault, self.packets = FAULTS[fault]
        self.place, self.places, self.lse = place, 0, {}

    def seen(self, func, packet, args, kwargs):
        if packet not in self.packets or not args[0].is_floating_point():
            made = func(*args, **kwargs)
            if packet is aten._softmax:
                self.lse[made.data_ptr()] = args[0].logsumexp(args[1], True)
            return made
        self.places += 1
        if self.places - 1 != self.place:
            return func(*args, **kwargs)
        if self.fault is not None:
            return self.fault(func, packet, args, kwargs)
        dy, y, dim, _ = args  # of weights that are e^(logit - lse), lse stored in 16 bits
        lse = self.lse[y.data_ptr()]
        narrow = y.dtype if y.dtype in NARROW else torch.bfloat16
        again = y.float() * (lse.float() - lse.to(narrow).float()).exp()
        delta = (dy.float() * again).sum(dim, True)
        return (y.float() * (dy.float() - delta)).to(y.dtype)


@dataclasses.dataclass
class Row:
    operation: str
    case: str
    dtype: torch.dtype
    fault: str
    factors: list[float]  # by place

    def __str__(self):
        seen = sum(factor > 1 for factor in self.factors)
        least, middle = min(self.factors), statistics.median(self.factors)
        name = f"{self.operation:18} {self.case:32} {str(self.dtype)[6:]:9} {self.fault:25}"
        return f"{name} {seen:3} of {len(self.factors):3}  {least:9.3g} {middle:9.3g}"


def rows(operation: str, case: str, run: Callable, dtype: torch.dtype):
    """The faults of one case. run(dtype): results, by the specification in torch's operations."""
    budget = Budget(partial(run, dtype), partial(run, torch.float64), dtype)
    for fault in FAULTS:
        if dtype != torch.float32 and fault in OF_FLOAT32:
            continue
        if fault in OF_NARROW.values() and fault != OF_NARROW.get(dtype):
            continue
        factors, place, places = [], 0, 1
        while place < places:
            with Planted(fault, place) as planted:
                made = run(dtype)
            place, places = place + 1, planted.places
            if places == 0:
                break
            shares = budget.shares(made).values()
            pairs = zip(_listed(made), budget.stock.values(), strict=True)
            if not all(
                torch.equal(a, b) for a, b in pairs
            ):  # nothing is wrong with a product of whole numbers, or of zeros
                factors.append(max(shares))
        if factors:
            yield Row(operation, case, dtype, fault, factors)


def _listed(results):
    return results.values() if isinstance(results, dict) else results


def cases():
    """(operation, case, run) for the smallest and the largest of the tests."""
    from tests.kernels.adapt_former import cases as adapt_former
    from tests.kernels.cobot_fold import cases as cobot_fold
    from tests.kernels.conv_experts import cases as conv_experts
    from tests.kernels.expert_gate import test_gate as gate
    from tests.kernels.hypercomplex import cases as hypercomplex
    from tests.kernels.lora_linear import cases as lora_linear
    from tests.kernels.relpos_attention import cases as attention
    from tests.kernels.sam_block import cases as sam_block
    from tests.kernels.task_core import cases as task_core

    def of(name, *found, backend="reference"):
        for case in found:
            yield name, getattr(case, "id", str(case)), lambda t, c=case: c.run(t, backend)

    def fold(case):
        return lambda t: case.results(case.sources(t), "reference")

    def gates(*sizes):
        def run(dtype):
            leaves, noise = gate.tensors(*sizes, dtype=dtype)
            wide = torch.promote_types(dtype, torch.float32)
            return gate.run(leaves, noise.to(wide), "reference")[1]

        return run

    lora = lora_linear.Case
    yield from of("lora_linear", lora(rank=3, shape=(1, 33)), lora(shape=(2, 14, 14, 192), out=576))
    experts = conv_experts.Case
    yield from of("conv_experts", experts(samples=1, height=3, width=2, ratios=(1, 2)))
    yield from of("conv_experts", experts(samples=1, height=64, width=64, index=(1,)))
    yield from of(
        "conv_experts", experts(samples=1, height=64, width=64, index=(1,), depthwise=True)
    )
    for sizes in ((3, 1, 2, 5, 3), (25, 14, 14, 3, 8)):
        yield "expert_gate", "x".join(map(str, sizes)), gates(*sizes)
    for case in cobot_fold.CASES[0], cobot_fold.CASES[-1]:
        yield "cobot_fold", str(case)[:32], fold(case)
    adapt = adapt_former.Case
    yield from of(
        "adapt_former",
        adapt(shape=(5, 48)),
        adapt(shape=(70, 768), bottleneck=64),
        backend="literal",
    )
    phm = hypercomplex.Case
    yield from of(
        "hypercomplex",
        phm(n=2, rows=3, columns=2, tokens=(3,)),
        phm(n=4, rows=48, columns=48, tokens=(196,)),
    )
    core = task_core.Case
    yield from of("task_core", core(shape=(2,)), core(shape=(2, 14, 14)))
    maps, windows = attention.MapCase, attention.WindowCase
    yield from of(
        "relpos_attention",
        maps(height=2, width=2),
        maps(batch=1, heads=1, height=32, width=32, head_dim=64),
    )
    yield from of(
        "window attention",
        windows(height=3, width=2, window=(2, 2), rank=1),
        windows(rank=3, head_dim=32),
    )
    block = sam_block.Case
    yield from of("sam_block", block(batch=1, height=3, width=2), block(window=14))


def main(wanted):
    print(f"{'operation':18} {'case':32} {'dtype':9} {'fault':25} seen          least    median")
    for operation, case, run in cases():
        if wanted and operation not in wanted:
            continue
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            for row in rows(operation, case, run, dtype):
                print(row, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])

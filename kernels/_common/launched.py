# SPDX-License-Identifier: Apache-2.0
"""What a Triton launch tells a profiler: its name, FLOP and bytes.

    @triton.jit(launch_metadata=launched(__package__, costs.down_kernel, "x_ptr"))

Triton calls it on the host, only while a profiler such as Proton listens to launches. The machine
code does not depend on it. FLOP come from the operation's ``costs.py``; bytes are those that
``samfast.counters`` counts.
"""

from collections.abc import Callable, Iterable

from torch import Tensor


def tensor_bytes(values: Iterable) -> int:
    """Bytes of the tensors among these, each as large as its shape says, once for each mention."""
    return sum(t.numel() * t.element_size() for t in values if isinstance(t, Tensor))


class launched:
    """The ``launch_metadata`` of a kernel.

    package: of the operation, whose last part names it
    flops: FLOP of one launch, from its arguments by name; None where ``costs.py`` has none
    rows: the argument in whose dtype products run; float32 where empty

    The name is samfast/OPERATION/KERNEL. FLOP come as flops16, flops32 or flops64, by bits.
    """

    def __init__(self, package: str, flops: Callable[..., int] | None = None, rows: str = ""):
        self.operation, self.costs, self.rows = package.rpartition(".")[2], flops, rows

    def __call__(self, grid: tuple, kernel, arguments: dict) -> dict:
        found = {
            "name": f"samfast/{self.operation}/{kernel.name}",
            "bytes": tensor_bytes(arguments.values()),
        }
        if self.costs is not None:
            bits = 8 * arguments[self.rows].element_size() if self.rows else 32
            found[f"flops{bits}"] = self.flops(arguments)
        return found

    def flops(self, arguments: dict) -> int:
        """FLOP of a launch with these arguments."""
        return 0 if self.costs is None else self.costs(**arguments)


def flops_of(kernel, arguments: dict) -> int:
    """FLOP of a launch of one of Triton's kernels, compiled or interpreted; 0 of one that is not
    ours."""
    given = getattr(kernel, "launch_metadata", None) or getattr(kernel, "kwargs", {}).get(
        "launch_metadata"
    )
    return given.flops(arguments) if isinstance(given, launched) else 0

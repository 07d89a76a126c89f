# SPDX-License-Identifier: Apache-2.0
"""What a Triton launch tells a profiler: its name, FLOP and bytes.

    @triton.jit(launch_metadata=launched(__package__, costs.down_kernel, "x_ptr"))

Triton calls it on the host, only while a profiler such as Proton listens to launches. The machine
code does not depend on it. FLOP are those of the operation's ``costs.py``, bytes those that
``samfast.counters`` counts.
"""

from collections.abc import Callable, Iterable

from torch import Tensor


def tensor_bytes(values: Iterable) -> int:
    """Bytes of the tensors among these, each as large as its shape says, once for each mention."""
    return sum(t.numel() * t.element_size() for t in values if isinstance(t, Tensor))


def launched(package: str, flops: Callable[..., int] | None = None, rows: str = "") -> Callable:
    """The ``launch_metadata`` of a kernel.

    package: of the operation, whose last part names it
    flops: FLOP of one launch, from its arguments by name; None where ``costs.py`` has none
    rows: the argument in whose dtype products run; float32 where empty

    The name is samfast/OPERATION/KERNEL. FLOP come as flops16, flops32 or flops64, by bits.
    """
    operation = package.rpartition(".")[2]

    def told(grid: tuple, kernel, arguments: dict) -> dict:
        found = {
            "name": f"samfast/{operation}/{kernel.name}",
            "bytes": tensor_bytes(arguments.values()),
        }
        if flops is not None:
            bits = 8 * arguments[rows].element_size() if rows else 32
            found[f"flops{bits}"] = flops(**arguments)
        return found

    return told

# SPDX-License-Identifier: Apache-2.0
"""The page of backends: what each operation's ``supports`` answers for its small example."""

import contextlib
import importlib
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from samfast.kernels import operations
from samfast.kernels._common import backends

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DEVICES = {  # by the title: the device, and the backends in the order in which auto asks them
    "On a CPU": ("cpu", backends.LADDER_CPU),
    "On a GPU of compute capability 8.0 or newer": ("cuda", backends.LADDER_CUDA),
}
ABOUT = """# Backends

An operation runs on one of five backends, which compute the same:

| backend | what it is |
|---|---|
| `reference` | the specification: eager PyTorch with plain autograd, anywhere, in any dtype |
| `torch` | hand-written forward and backward of PyTorch's own operators |
| `cpu` | C++ for CPUs |
| `triton` | Triton kernels for GPUs; `TRITON_INTERPRET=1` runs them on a CPU, slowly |
| `cuda` | CUDA sources, for some operations |

`backend="auto"` takes the first in the order of the tables that can run a call. **Bold** is what it
takes for the example of `samfast info --check`. A backend that is asked for by name runs or raises
its sentence; `SAMFAST_BACKEND` replaces `auto`. The tables assume that everything is installed and
built. [`samfast info`](command-line.md#samfast-info) says what holds on a machine.

**No GPU has run the kernels yet.** The GPU's table says what the code accepts, not what was run.
"""


def page() -> str:
    """The page: a table for each kind of device, with the sentences below it."""
    parts = [ABOUT]
    for title, (device, ladder) in DEVICES.items():
        parts.append(f"## {title}\n\n{table(torch.device(device), ladder)}")
    return "\n".join(parts)


def table(device: torch.device, ladder: tuple[str, ...]) -> str:
    """Which dtypes each backend takes of each operation."""
    notes: list[str] = []
    lines = [
        f"| operation | {' | '.join(f'`{b}`' for b in ladder)} |",
        "|---" * (len(ladder) + 1) + "|",
    ]
    for path in ("cpu_path", "cuda_path"):  # so that none keeps what is patched below
        for name in operations(f"{path}.py"):
            importlib.import_module(f"samfast.kernels.{name}.{path}")
    with everything_built(), FakeTensorMode():
        for name in operations("example.py"):
            missing = importlib.import_module(f"samfast.kernels.{name}.example").missing
            cells = [_cell(missing, b, device, notes) for b in ladder]
            first = next(i for i, b in enumerate(ladder) if not missing(b, device, DTYPES[0]))
            cells[first] = f"**{cells[first]}**"
            lines.append(f"| `{name}` | {' | '.join(cells)} |")
    told = [f"{number}. {sentence}" for number, sentence in enumerate(notes, 1)]
    return "\n".join([*lines, "", *told, ""])


def _cell(missing: Callable, backend: str, device: torch.device, notes: list[str]) -> str:
    """The dtypes that a backend takes, and the numbers of the sentences for the others."""
    taken, refused = [], []
    for dtype in DTYPES:
        sentence = missing(backend, device, dtype)
        if sentence is None:
            taken.append(str(dtype).removeprefix("torch."))
            continue
        if sentence not in notes:
            notes.append(sentence)
        if (number := notes.index(sentence) + 1) not in refused:
            refused.append(number)
    dtypes = "any" if len(taken) == len(DTYPES) else ", ".join(taken) or "–"
    return dtypes + "".join(f"<sup>{number}</sup>" for number in refused)


_asked = torch._C._dispatch_has_kernel_for_dispatch_key


def _has_kernel(name: str, key: str) -> bool:
    return name.startswith("samfast_native::") or _asked(name, key)


class _AnyOperator:
    """Stands for samfast_native where the extension has all that the sources have."""

    def __getattr__(self, name: str) -> str:
        return name


@contextlib.contextmanager
def everything_built() -> Iterator[None]:
    """As on a machine with the extension, Triton and an H200, whatever this one has."""
    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (backends, "native_missing", lambda: None),
            (backends, "_triton_absent", lambda: None),
            (torch.ops, "samfast_native", _AnyOperator()),
            (torch.cuda, "get_device_capability", lambda device=None: (9, 0)),
            (torch._C, "_dispatch_has_kernel_for_dispatch_key", _has_kernel),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        yield

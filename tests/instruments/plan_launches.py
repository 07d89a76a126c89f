# SPDX-License-Identifier: Apache-2.0
"""What launch plans hand to Triton's launchers, beside what JITFunction.run hands them.

Prints JSON: by kind of call, what differs, how many launches were compared, and what they were.
Pointers are compared as places: which memory, as it first appears, and how far into it. The
tests' folder comes first where modules are looked for.
"""

import dataclasses
import json
import sys

import torch
from kernels.sam_block.cases import Case

from benchmarks import stand_in
from samfast.kernels._common import planned
from samfast.kernels.sam_block.op import SamBlock

HALF = torch.float16
CASES = {
    "windows": Case(batch=2, height=5, width=7, window=4, dim=32, heads=2),
    "map": Case(batch=1, height=3, width=2, window=0, dim=48, heads=3, sliced=True),
    "experts": Case(batch=1, height=4, width=4, window=4, dim=16, heads=1, experts=True),
    "dropout, balanced": dataclasses.replace(
        Case(batch=1, height=4, width=8, window=4), dropout=0.3, memory="balanced"
    ),
}
LIN1 = 16


def odd(t):
    """The same values one element further in memory."""
    room = torch.zeros(t.numel() + 1, dtype=t.dtype)
    return room[1:].view(t.shape).copy_(t.detach()).requires_grad_(t.requires_grad)


def far(t):
    """The same values 16 bytes further in memory."""
    room = torch.zeros(t.numel() + 8, dtype=t.dtype)
    return room[8:].view(t.shape).copy_(t.detach()).requires_grad_(t.requires_grad)


def turned(t):
    turned = t.detach().movedim(-1, 0).contiguous().movedim(0, -1)
    return turned.requires_grad_(t.requires_grad)


def changed(tensors, which, change):
    return [change(t) if i == which else t for i, t in enumerate(tensors)]


CHANGES = {
    "as it is": lambda x, t, dy: (x, t, dy),
    "x odd": lambda x, t, dy: (odd(x), t, dy),
    "x far": lambda x, t, dy: (far(x), t, dy),
    "x turned": lambda x, t, dy: (turned(x), t, dy),
    "dy odd": lambda x, t, dy: (x, t, odd(dy)),
    "dy turned": lambda x, t, dy: (x, t, turned(dy)),
    "lora_a odd": lambda x, t, dy: (x, changed(t, LIN1 + 2, odd), dy),
    "a table odd": lambda x, t, dy: (x, changed(t, 4, odd), dy),
    "lora_b turned": lambda x, t, dy: (x, changed(t, LIN1 + 3, turned), dy),
}


class Noted:
    """Launches as the launcher gets them, with all memory kept, so that no address comes twice."""

    def __init__(self):
        self.launches, self.kept, self.runs = [], [], 0

    def keep(self, function):
        def kept(*args, **kwargs):
            made = function(*args, **kwargs)
            self.kept.append(made)
            return made

        return kept

    def places(self):
        """Each launch: its launcher, its grid and its arguments, pointers as places."""
        storages, labels, found = {}, {}, []
        for t in self.kept:
            if isinstance(t, torch.Tensor):
                storage = t.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()

        def place(pointer):
            if pointer == 0:
                return None
            for start, size in storages.items():
                if start <= pointer < start + size:
                    return labels.setdefault(start, len(labels)), pointer - start
            raise AssertionError(f"a pointer to no known memory: {pointer}")

        for launcher, grid, arguments in self.launches:
            values = []
            for kind, value in zip(launcher.source.signature.values(), arguments, strict=True):
                if kind.startswith("*") and value is not None:
                    value = value.data_ptr() if isinstance(value, torch.Tensor) else value
                    value = place(value)
                values.append(value)
            found.append((id(launcher), grid, values))
        return found


def noting(call, inputs) -> Noted:
    """What a call launches."""
    noted = Noted()
    noted.kept += [t for t in inputs if t is not None]
    launch, run = stand_in._Launcher.__call__, stand_in.JITFunction.run

    def launched(self, x, y, z, *rest):
        noted.launches.append((self, (x, y, z), rest[6:]))
        noted.kept += [t for t in rest[6:] if isinstance(t, torch.Tensor)]
        return launch(self, x, y, z, *rest)

    def ran(self, *args, **kwargs):
        noted.runs += 1
        return run(self, *args, **kwargs)

    spaces = [
        plan.run.__globals__
        for body in SamBlock.bodies
        for known in body.known.values()
        if known
        for plan in known.plans
    ]
    before = [dict(space) for space in spaces]
    for space in spaces:
        for name, value in space.items():
            kernel = "kernel" in name or name in ("plan", "Range", "leaves")
            if callable(value) and not kernel:
                space[name] = noted.keep(value)
    stand_in._Launcher.__call__, stand_in.JITFunction.run = launched, ran
    try:
        call()
    finally:
        stand_in._Launcher.__call__, stand_in.JITFunction.run = launch, run
        for space, old in zip(spaces, before, strict=True):
            space.update(old)
    return noted


def differences(case, change) -> dict:
    x, tensors, dy = change(*(_half(t) for t in case.tensors(torch.float32)))

    def call():
        y, _ = case.call(x, tensors, "triton")
        leaves = [t for t in (x, *tensors) if t is not None and t.requires_grad]
        torch.autograd.grad(y, leaves, dy)

    inputs = [x, *tensors, dy]
    with planned.switched(False):
        call()
        plain = noting(call, inputs)
    for _ in range(2):
        call()
    ours = noting(call, inputs)
    expected, found = plain.places(), ours.places()
    differ = [
        f"{launcher.metadata.name}: {a} became {b}"
        for (launcher, *_), a, b in zip(plain.launches, expected, found, strict=False)
        if a != b
    ]
    kinds = sorted({type(v).__name__ for _, _, arguments in ours.launches for v in arguments})
    return {
        "differ": differ[:2],
        "launches": [len(expected), len(found)],
        "runs": [plain.runs, ours.runs],
        "kinds": kinds,
    }


def _half(values):
    if isinstance(values, list):
        return [_half(t) for t in values]
    if values is None or not values.is_floating_point():
        return values
    return values.detach().to(HALF).requires_grad_(values.requires_grad)


def main(names):
    torch.set_num_threads(1)
    told = {}
    with stand_in.standing_in(90, compiles=False):
        for name in names or CASES:
            for what, change in CHANGES.items():
                told[f"{name}, {what}"] = differences(CASES[name], change)
        told["refused"] = [why for body in SamBlock.bodies for why in body.refused]
        told["broken"] = stand_in.current.broken
    print(json.dumps(told))


if __name__ == "__main__":
    main(sys.argv[1:])

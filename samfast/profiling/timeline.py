# SPDX-License-Identifier: Apache-2.0
"""The profiler's events, cut into pieces: at each moment one operation, phase and block.

On a CPU a piece belongs to the innermost event of the thread that makes the steps. On a GPU it
belongs to the kernel that runs; a kernel belongs to the event that launched it. What is left of a
step is the host gap: no operator runs, or the GPU has nothing to do.
"""

import itertools
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple

import torch

from samfast.profiling.blocks import RANGE
from samfast.profiling.names import AUTOGRAD, GAP, OWN, is_product, operation

MARK = "samfast/step"
FORWARD, BACKWARD, OPTIMIZER, DATA = "forward", "backward", "optimizer", "data"
PHASES = (FORWARD, BACKWARD, OPTIMIZER, DATA, GAP)
_ENGINE = "autograd::engine::evaluate_function"
_OPTIMIZER = re.compile(r"Optimizer\.(step|zero_grad)#")
_LOADER = re.compile(r"enumerate\(DataLoader\)#")
COMPILED = "compiled graph"
_COMPILED = (
    "## Call CompiledFxGraph",
    "CompiledF",
    "Torch-Compiled Region",
    "TorchDynamo",
    "Pregraph bytecode",
    "AOTDispatcher",
)


class Event(NamedTuple):
    """Times in ns. device: whether it ran on a GPU   sequence: number of an autograd node, or -1

    scope: torch's RecordScope, of which 1 is a node's backward and 7 a user's range
    key: what a kernel's ``by`` names
    """

    name: str
    start: int
    end: int
    thread: int = 1
    device: bool = False
    sequence: int = -1
    scope: int = 0
    key: int = 0
    by: int = 0


class Owner(NamedTuple):
    """To what a moment belongs. inside: samfast's operation around it; row None: the host gap"""

    row: str | None = None
    inside: str | None = None
    phase: str | None = None
    block: str | None = None
    called: int = 0  # which call of the row this is, to count them
    entered: int = 0  # which call of the operation around it
    leaf: bool = False  # whether all inside belongs to the row


class Piece(NamedTuple):
    """start and end in ns; step from 0"""

    start: int
    end: int
    step: int
    owner: Owner


class Timeline(NamedTuple):
    """pieces of all steps, without gaps in between   walls: ns of each step

    on_device: whether the pieces are those of a GPU
    """

    pieces: list[Piece]
    walls: list[int]
    on_device: bool


def events_of(profiler: Any) -> list[Event]:
    """What a torch.profiler.profile recorded."""
    found = []
    for e in profiler.profiler.kineto_results.events():
        device = e.device_type() != torch.autograd.DeviceType.CPU
        if e.is_hidden_event() or e.is_python_function() or (device and e.is_user_annotation()):
            continue
        if not device and e.linked_correlation_id() > 0:
            continue  # a call of CUDA's runtime, part of the operator that made it
        found.append(
            Event(
                e.name(), e.start_ns(), e.end_ns(), e.start_thread_id(), device, e.sequence_nr(),
                e.scope(), e.correlation_id(), e.linked_correlation_id(),
            )
        )  # fmt: skip
    return found


def timeline(
    events: Sequence[Event],
    of_sequence: Callable[[int], str | None],
    leaves: Collection[str] = (),
    choose: Callable[[list[int]], list[int]] = list,
) -> Timeline:
    """Cut the time between the first and the last mark into pieces.

    of_sequence: the block whose forward made an autograd node
    leaves: operators that are counted as one call; what they call themselves is part of them
    choose: which of all marks are those of steps
    ValueError where the events have fewer than two marks.
    """
    marks = choose(sorted(e.start for e in events if e.name == MARK))
    if len(marks) < 2:
        raise ValueError(f"expected two marks of a step or more, got {len(marks)}")
    host = [e for e in events if not e.device and e.name != MARK]
    kernels = sorted((e for e in events if e.device), key=lambda e: (e.start, -e.end))
    main = next(e.thread for e in events if e.name == MARK)
    owners: dict[int, Owner] = {}
    cut: list[tuple[int, int, Owner]] = []
    for thread in {e.thread for e in host}:
        own = [e for e in host if e.thread == thread]
        of_thread = _of_thread(own, of_sequence, leaves, owners)
        if thread == main:
            cut = of_thread
    on_device = any(marks[0] <= e.start < marks[-1] for e in kernels)
    if on_device:
        cut = _of_device(kernels, owners)
    pieces = _in_steps(cut, marks)
    steps = (list(own) for _, own in itertools.groupby(pieces, lambda piece: piece.step))
    pieces = [piece for own in steps for piece in _after_backward(own)]
    walls = [b - a for a, b in itertools.pairwise(marks)]
    return Timeline(pieces, walls, on_device)


def _of_thread(
    events: Iterable[Event],
    of_sequence: Callable[[int], str | None],
    leaves: Collection[str],
    owners: dict[int, Owner],
) -> list[tuple[int, int, Owner]]:
    """(start, end, owner) of the moments of one thread that an event covers."""
    pieces: list[tuple[int, int, Owner]] = []
    open_: list[tuple[Event, Owner]] = []
    at = 0

    def until(moment: int) -> None:
        nonlocal at
        while open_ and open_[-1][0].end <= moment:
            event, owner = open_.pop()
            if event.end > at:
                pieces.append((at, event.end, owner))
                at = event.end
        if open_ and moment > at:
            pieces.append((at, moment, open_[-1][1]))
        at = max(at, moment)

    for number, event in enumerate(sorted(events, key=lambda e: (e.start, -e.end)), 1):
        until(event.start)
        around = open_[-1][1] if open_ else Owner()
        owner = _owner(event, around, of_sequence, leaves, number)
        owners[event.key] = owner
        open_.append((event, owner))
    until(max((e.end for e, _ in open_), default=at))
    return pieces


def _owner(
    event: Event,
    around: Owner,
    of_sequence: Callable[[int], str | None],
    leaves: Collection[str],
    number: int,
) -> Owner:
    """To what an event belongs. number: of the event"""
    name = event.name
    if name.startswith(RANGE):
        return around._replace(block=name.removeprefix(RANGE))
    if name.startswith(_ENGINE) or event.scope == 1:
        block = around.block or (of_sequence(event.sequence) if event.sequence >= 0 else None)
        row = AUTOGRAD if around.inside is None else around.row
        return around._replace(row=row, phase=BACKWARD, block=block)
    if _OPTIMIZER.match(name):
        return around._replace(row=name.partition("#")[0], phase=OPTIMIZER, called=number)
    if _LOADER.match(name):
        return around._replace(row="data loader", phase=DATA, called=number)
    if name.startswith(OWN):
        row = operation(name)
        at = around.entered if around.inside == row else number
        return around._replace(row=row, inside=row, called=at, entered=at, leaf=False)
    if around.leaf:
        return around
    if around.inside is not None:
        if is_product(name):
            return around._replace(row=name, called=number, leaf=True)
        return around._replace(row=around.inside, called=around.entered)
    if "::" in name:
        return around._replace(row=name, called=number, leaf=name in leaves)
    if name.startswith(_COMPILED):
        return around._replace(row=COMPILED, called=number)
    return around if event.scope == 7 else around._replace(row=name, called=number)


def _of_device(kernels: Sequence[Event], owners: dict[int, Owner]) -> list[tuple[int, int, Owner]]:
    """(start, end, owner) of the moments when a kernel runs, the first one where several do."""
    pieces, at = [], 0
    for number, kernel in enumerate(kernels, 1):
        start = max(at, kernel.start)
        if kernel.end > start:
            owner = owners.get(kernel.by, Owner(row=kernel.name))
            row = owner.row or kernel.name
            pieces.append(
                (start, kernel.end, owner._replace(row=row, called=owner.called or number))
            )
            at = kernel.end
    return pieces


def _in_steps(cut: Sequence[tuple[int, int, Owner]], marks: Sequence[int]) -> list[Piece]:
    """The pieces between the first mark and the last, with what is between them as host gap."""
    pieces, at, step, last = [], marks[0], 0, marks[-1]

    def put(end: int, owner: Owner) -> None:
        nonlocal at, step
        while at < end:
            stop = min(end, marks[step + 1])
            pieces.append(Piece(at, stop, step, owner))
            at = stop
            if at == marks[step + 1]:
                step += 1
                if step == len(marks) - 1:
                    return

    for start, end, owner in cut:
        if end <= at or at >= last:
            continue
        put(min(start, last), Owner(phase=GAP))
        if at < last:
            put(min(end, last), owner if owner.row else owner._replace(phase=GAP))
    put(last, Owner(phase=GAP))
    return pieces


def _after_backward(own: Sequence[Piece]) -> list[Piece]:
    """The pieces of a step with the phase of each: what follows the last backward and comes before
    the optimizer's step, such as clipping, is part of the optimizer's phase."""
    backward = max((i for i, p in enumerate(own) if p.owner.phase == BACKWARD), default=None)
    last = max((i for i, p in enumerate(own) if p.owner.phase == OPTIMIZER), default=-1)
    made = []
    for i, p in enumerate(own):
        phase = p.owner.phase
        if phase is None:
            late = backward is not None and backward < i < last
            phase = OPTIMIZER if late else FORWARD
        made.append(p._replace(owner=p.owner._replace(phase=phase)))
    return made

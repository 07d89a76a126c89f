# SPDX-License-Identifier: Apache-2.0
"""Which step is warmed up, counted or timed, and what was recorded of it.

A step ends where the optimizer that steps most often does, the first of several, by a hook that
torch calls for all optimizers. Steps are left alone first; the last of these are timed as they are,
then one is counted, which is slow, and the others run under torch.profiler.
"""

import itertools
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.profiler import record_function
from torch.optim import optimizer as hooks_of_torch

from samfast.profiling.blocks import Blocks, Shapes, difference
from samfast.profiling.counted import GRADIENTS, PARAMETERS, STATE, CountedStep
from samfast.profiling.timeline import MARK

WARM, PLAIN, COUNT, BOTH, TIME, DONE = "warm", "plain", "count", "both", "time", "done"

_CLOSURE = (
    "the optimizer calls a closure: the time of its forward stands under optimizer, its FLOP, "
    "bytes and launches under forward"
)
_SEVERAL = (
    "several optimizers step, and a step ends where the first one does: the steps of the others "
    "begin the next one; their time stands under optimizer, their bytes and launches under "
    "forward, or nowhere where the first step of all was counted"
)


def plan(skip: int, steps: int) -> list[str]:
    """What happens in each step. skip: at least 2, of which the last is counted"""
    plain = max(1, skip // 2)
    return [WARM] * (skip - 1 - plain) + [PLAIN] * plain + [COUNT] + [TIME] * steps


class _Compared(NamedTuple):
    """A timed step. differs: which module gets inputs of other shapes than in the counted step"""

    compiled: bool
    differs: str | None


Number = TypeVar("Number", int, float)


class Recorder:
    """Enter it around steps.

    plan: what happens in each step
    model: whose blocks are told apart; without it those of each model that is called
    enough: called from the optimizer's hook once the plan is through
    """

    def __init__(
        self,
        plan: list[str],
        model: nn.Module | None = None,
        enough: Callable[[], None] = lambda: None,
    ):
        self.plan, self.enough = plan, enough
        self.blocks = Blocks(model)
        self.optimizers: dict[int, torch.optim.Optimizer] = {}
        self._counted: CountedStep | None = None
        self.profiler: torch.profiler.profile | None = None
        self.step = 0  # how many are through
        self.plain: list[float] = []  # seconds
        self.timed = 0  # steps
        self._clock: list[float] = []  # seconds at each mark
        self.cuda = False
        self.remarks: list[str] = []  # what readers of the result should know
        self._shapes: Shapes = {}  # of the counted step
        self._compilations = 0  # before the step at hand
        self._compared: list[_Compared] = []  # timed steps with the counted one
        self.allocator_peak: int | None = None
        self._counting = self._profiling = False
        self.held = False  # whether a step could not end
        self._first: int | None = None
        self._times: dict[int, int] = {}  # steps of each optimizer
        self._kind: str | None = None
        self._began = 0.0
        self._hooks: list[Any] = []

    def __enter__(self) -> "Recorder":
        self.cuda = torch.cuda.is_available()
        self.blocks.__enter__()
        self._hooks = [
            hooks_of_torch.register_optimizer_step_pre_hook(self._before_step),
            hooks_of_torch.register_optimizer_step_post_hook(self._after_step),
        ]
        try:
            self._begin()
        except BaseException:
            self.__exit__(*sys.exc_info())
            raise
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        self.blocks.__exit__(kind, error, trace)
        if self._kind == BOTH and kind is None:
            self._end()  # no optimizer stepped
        elif self._kind == TIME and self.both and kind is None:
            self._wait()  # the one step goes on to the end
            self._mark()
        elif self._counting:
            self.counted.__exit__(kind, error, trace)
        self._kind = DONE
        self._stop_profiler()

    @property
    def counted(self) -> CountedStep:
        """The step that was counted, or is; there is one once the recorder was entered."""
        assert self._counted is not None
        return self._counted

    @property
    def is_counting(self) -> bool:
        return self._counting

    @property
    def both(self) -> bool:
        """Whether the only step was counted and timed at once."""
        return self.timed == 1 and self.plan[0] == BOTH

    @property
    def seconds(self) -> list[float]:
        """Return the wall time of each timed step."""
        return [b - a for a, b in itertools.pairwise(self.marks(self._clock))]

    def marks(self, found: list[Number]) -> list[Number]:
        """Where steps begin and end, from all marks. One step alone lasts to the end; of several
        the one that was counted is left out, and first ones that compiled."""
        if self.both:
            return [found[0], found[-1]]
        return found[(self.plan[0] == BOTH) + self.left_out :]

    @property
    def left_out(self) -> int:
        """How many of the first timed steps compiled, unless all did; they do not count."""
        first = list(itertools.takewhile(lambda step: step.compiled, self._compared))
        return len(first) if len(first) < len(self._compared) else 0

    @property
    def compiled(self) -> bool:
        """Whether torch.compile compiled in a timed step that counts."""
        return any(step.compiled for step in self._compared[self.left_out :])

    @property
    def other_shapes(self) -> list[str]:
        """What differs, of each timed step whose inputs have other shapes than the counted step."""
        return [s.differs for s in self._compared[self.left_out :] if s.differs is not None]

    def _say(self, remark: str) -> None:
        if remark not in self.remarks:
            self.remarks.append(remark)

    def _begin(self) -> None:
        kind = self.plan[self.step] if self.step < len(self.plan) else DONE
        self.blocks.shapes = {}
        if kind in (COUNT, BOTH):
            self._start_counting()
        if kind in (BOTH, TIME) and self.profiler is None:
            self._start_profiler()
        self._kind, self._began = kind, time.perf_counter()

    def _end(self) -> None:
        """End the step at hand."""
        if self._kind in (PLAIN, BOTH, TIME) and self._is_last():
            self._wait()
        if self._kind in (BOTH, TIME):
            self._mark()
            self.timed += 1
            self._compare()
        if self._kind == PLAIN:
            self.plain.append(time.perf_counter() - self._began)
        if self._kind in (COUNT, BOTH):
            self._counting = False
            self.counted.__exit__(None, None, None)
            self._shapes = self.blocks.shapes
            self._compilations = _compilations()
        self.step += 1

    def _compare(self) -> None:
        """Tell the timed step at hand from the one that was counted."""
        if self._kind == TIME:
            differs = difference(self._shapes, self.blocks.shapes, self.blocks.named)
            before, self._compilations = self._compilations, _compilations()
            self._compared.append(_Compared(self._compilations > before, differs))

    def _is_last(self) -> bool:
        """Tell whether the step is the last of its kind, which waits for the GPU."""
        return self.plan[0] == BOTH or self.plan[self.step + 1 : self.step + 2] != [self._kind]

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self.optimizers.setdefault(id(optimizer), optimizer)
        if any(map(callable, (*args[1:], *kwargs.values()))):
            self._say(_CLOSURE)
        if len(self.optimizers) > 1:
            self._say(_SEVERAL)
        if self._kind in (COUNT, BOTH):
            self.counted.gradients(self._parameters())

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._kind in (COUNT, BOTH):
            state = _state_of(self.optimizers.values())
            self.counted.storages.mark(state, STATE)
        times = self._times[id(optimizer)] = self._times.get(id(optimizer), 0) + 1
        if (
            self._first is None or times > self._times[self._first]
        ):  # one that goes on, where the first has ended
            self._first = id(optimizer)
        if id(optimizer) != self._first or self._kind == DONE:
            if self._kind == DONE:
                self.enough()
            return
        if self._kind in (COUNT, BOTH) and not self.counted.is_innermost():
            self.held = True
            return  # a dispatch mode of the user's cannot be left; the step goes on
        self._end()
        self._begin()
        if self._kind == DONE:
            self._stop_profiler()
            self.enough()

    def _start_counting(self) -> None:
        models = self.blocks.roots.values()
        own = [t for m in models for t in (*m.parameters(), *m.buffers())]
        parameters = [*own, *self._parameters()]
        known = {
            PARAMETERS: parameters,
            STATE: _state_of(self.optimizers.values()),
            GRADIENTS: [p.grad for p in parameters if p.grad is not None],
        }
        self._counted = CountedStep(self.blocks, known)
        self._counted.__enter__()
        self._counting = True

    def _start_profiler(self) -> None:
        if torch.autograd._profiler_enabled():
            raise RuntimeError(
                "a torch.profiler runs already and would lose its events; leave it out, for "
                "samfast starts its own"
            )
        kinds = [torch.profiler.ProfilerActivity.CPU]
        if self.cuda:
            kinds.append(torch.profiler.ProfilerActivity.CUDA)
        self._wait()
        self.profiler = torch.profiler.profile(activities=kinds)
        self.profiler.start()
        self._profiling = True
        self._mark()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()

    def _mark(self) -> None:
        with record_function(MARK):
            self._clock.append(time.perf_counter())

    def _stop_profiler(self) -> None:
        if self._profiling and self.profiler is not None:
            self._profiling = False
            self.profiler.stop()
            if self.cuda:
                self.allocator_peak = torch.cuda.max_memory_allocated()

    def _wait(self) -> None:
        if self.cuda and torch.cuda.is_initialized():
            torch.cuda.synchronize()

    def _parameters(self) -> list[Tensor]:
        groups = (g for o in self.optimizers.values() for g in o.param_groups)
        return [p for group in groups for p in group["params"]]


def _compilations() -> int:
    """How much torch.compile has compiled in this process, by the times that it keeps."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return 0 if dynamo is None else sum(map(len, dynamo.compilation_time_metrics.values()))


def _state_of(optimizers: Iterable[torch.optim.Optimizer]) -> list[Tensor]:
    states = (s for o in optimizers for s in o.state.values())
    return [t for state in states for t in state.values() if isinstance(t, Tensor)]

# SPDX-License-Identifier: Apache-2.0
"""Which calls of an operator's body run by a launch plan: those of a kind that was seen twice.

Calls are of one kind if everything is alike that could change a launch: shapes, strides, dtypes,
devices, the alignment of every pointer, options, which gradients are wanted, and torch's setting of
TF32. The second such call is recorded. If a mode, a transformation or a profiler watches, the body
itself runs, so that all operators inside show; also under SAMFAST_LAUNCH_PLANS=0. Plans hold no
tensors.
"""

import contextlib
import operator
import sys
import threading
from collections.abc import Callable, Sequence
from functools import cache, partial

import torch
from torch import Tensor, nn

from samfast.kernels._common import backends, ranges
from samfast.kernels._common.autocast import autocast_dtype, without_autocast
from samfast.kernels._common.variables import switch

MOST = 256  # kinds of calls of one body that are told apart
MOST_ALIGNMENTS = 8
LATEST = 4  # that are tried before the key is made
TRIES = 3  # recordings of calls alike that were refused, before none is tried any more
PLAIN = frozenset((Tensor, nn.Parameter, type(None)))  # types without functions of their own
_NOTHING = contextlib.nullcontext()
_on = switch("SAMFAST_LAUNCH_PLANS", True, "0 for no launch plans, to 1 for plans")
_bodies: list["Planned"] = []


def clear() -> None:
    """Forget all plans, for example after a change of one of Triton's settings."""
    _launches_on.cache_clear()
    for body in _bodies:
        body.known.clear()
        body.latest.clear()
        body.refused.clear()


@contextlib.contextmanager
def switched(on: bool):
    """Inside this context calls run by plans, or none does; in all threads."""
    global _on
    before, _on = _on, on
    try:
        yield
    finally:
        _on = before


@cache
def _launches_on(device: torch.device) -> bool:
    """Whether Triton's kernels run on this device."""
    return device.type != "meta" and backends.triton_missing(device) is None


_precision = getattr(torch._C, "_get_fp32_precision_getter", None)  # of products, by place


def _settings() -> tuple:
    """Settings of torch, and of Triton once it is loaded, that launches depend on.

    The getter takes 2 us less than the property.
    """
    if _precision is None:
        precision = torch.backends.cuda.matmul.fp32_precision
    else:
        precision = _precision("cuda", "matmul")
    if (triton := sys.modules.get("triton")) is None:
        return (precision,)
    knobs = triton.knobs
    return precision, knobs.runtime.debug, knobs.compilation.instrumentation_mode


def unwatched() -> bool:
    """Whether nothing stands between a call and torch's kernels for dense tensors, and no profiler
    of torch's asks which operator calls what."""
    c = torch._C
    return (
        c._len_torch_dispatch_stack() == 0
        and c._len_torch_function_stack() == 0
        and c._functorch.peek_interpreter_stack() is None
        and not c._autograd._profiler_enabled()
    )


def is_plain(t: Tensor | None) -> bool:
    """Whether operators see a tensor's elements as they are in memory: no subclass, whose own
    functions may run, and no lazy sign."""
    return type(t) in PLAIN and (t is None or not (t.is_neg() or t.is_conj()))


def is_direct() -> bool:
    """Whether an operator's functions may be called themselves, rather than by torch's dispatcher:
    nobody would see the difference."""
    return (
        _on
        and unwatched()
        and torch._C._get_tracing_state() is None
        and not torch.is_inference_mode_enabled()
    )


_is_there = partial(operator.is_not, None)


def _picker(places: list[int]) -> Callable[[list], tuple]:
    """What gives the values of a list at these places."""
    if len(places) > 1:
        return operator.itemgetter(*places)
    return lambda values: tuple([values[i] for i in places])


def guard(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    """Whether tensors, as many arguments, are of the same types, shapes, strides, dtypes and
    devices as these, none of them twice. What compiled graphs look with takes 2 us for thirty."""
    sizes = {
        "dynamic_dims_sizes": [list(t.shape) for t in tensors],
        "dynamic_dims_strides": [list(t.stride()) for t in tensors],
    }
    return torch._C._dynamo.guards.TensorGuards(*tensors, **sizes).check


class _Known:
    """Calls that were alike: how to tell one quickly, and their plans, one for each alignment.

    others: settings of torch and of Triton, lengths of lists, and arguments that are not tensors
    """

    def __init__(self, flat: list, others: list):
        self.others = [v.copy() if isinstance(v, list) else v for v in others]
        self.plans: list = []
        self.tries, self.recording = 0, threading.Lock()
        self.of_nones = _picker([i for i, t in enumerate(flat) if t is None])
        self.of_tensors = _picker([i for i, t in enumerate(flat) if t is not None])
        self.check = guard(self.of_tensors(flat))

    def alike(self, flat: list, others: list) -> bool:
        """Whether a call is one of these; may say no where the key says yes."""
        return (
            self.others == others
            and not any(map(_is_there, self.of_nones(flat)))
            and self.check(*self.of_tensors(flat))
        )


class Planned:
    """A body that takes tensors and what is hashable or a list of that.

    called: the operator, for tensors that torch's dispatcher treats in other ways
    tensors, lists: places of the arguments that are tensors, and of those that are lists of them
    """

    def __init__(
        self, body: Callable, called: Callable, tensors: Sequence[int], lists: Sequence[int],
        count: int,
    ):  # fmt: skip
        self.body, self.called = body, called
        self.tensors, self.lists = tensors, lists
        self.others = [i for i in range(count) if i not in tensors and i not in lists]
        self.known: dict[tuple, _Known | None] = {}
        self.latest: list[_Known] = []
        self.refused: dict[str, int] = {}  # how often, by why
        _bodies.append(self)

    def __call__(self, *args):
        """The body, below torch's dispatcher."""
        return self._run(args, self.body) if _on and unwatched() else self.body(*args)

    def direct(self, *args):
        """The same without the dispatcher, where nothing is seen of it."""
        return self._run(args, self.called) if is_direct() else self.called(*args)

    def _run(self, args: tuple, otherwise: Callable):
        """By a plan. otherwise: takes what is not plain"""
        flat = [args[i] for i in self.tensors]
        for i in self.lists:
            flat += args[i]
        others = [*_settings(), *[len(args[i]) for i in self.lists]]
        others += [args[i] for i in self.others]
        for known in self.latest:
            if known.alike(flat, others):
                break
        else:
            if not all(map(is_plain, flat)):
                return otherwise(*args)
            known = self._find(args, flat, others) if _launches_on(flat[0].device) else None
        if known is None or triton_listens():
            return self.body(*args)
        device, count = flat[0].device, len(known.plans)
        if count:
            with _NOTHING if autocast_dtype(device.type) is None else without_autocast(device.type):
                for plan in known.plans:
                    made = _planned(plan, flat, device)
                    if made is not NotImplemented:
                        return made
        if count < MOST_ALIGNMENTS and known.tries < TRIES:
            if known.recording.acquire(blocking=False):  # one thread records
                try:
                    if count == len(known.plans):
                        return self._recorded(known, args, flat)
                finally:
                    known.recording.release()
        return self.body(*args)

    def _find(self, args: tuple, flat: list, others: list) -> _Known | None:
        """Calls like this one, where there was one before."""
        first: dict[int, int] = {}
        key = (
            *(None if t is None else (t.shape, t.stride(), t.dtype, t.device) for t in flat),
            *(first.setdefault(id(t), i) for i, t in enumerate(flat)),  # which are one tensor
            *(tuple(value) if isinstance(value, list) else value for value in others),
        )
        if key not in self.known:
            while len(self.known) >= MOST:
                self.known.pop(next(iter(self.known)), None)
            self.known[key] = None
            return None
        known = self.known.pop(key, None) or _Known(flat, others)
        self.known[key] = known  # the latest last
        tensors = [id(t) for t in flat if t is not None]
        if len({*tensors}) < len(tensors):  # a guard does not tell which are one tensor
            return known
        self.latest = [known, *[k for k in self.latest if k is not known][: LATEST - 1]]
        return known

    def _recorded(self, known: _Known, args: tuple, flat: list):
        """Call the body and make a plan of its calls."""
        from samfast.kernels._common.launch_plan import LaunchPlan
        from samfast.kernels._common.recorder import record

        result, recording = record(self.body, flat, *args)
        problem = recording.problem
        if problem is None:
            try:
                known.plans.append(LaunchPlan(recording, flat))
            except Exception as error:  # the result is there
                problem = f"its plan could not be written: {error!r}"
        if problem is not None:
            self.refused[problem] = self.refused.get(problem, 0) + 1
            known.tries += 1
        return result


def _planned(plan, flat: list, device: torch.device):
    """What a plan gives, on the tensors' device."""
    if device.type != "cuda" or torch.cuda.current_device() == device.index:
        return plan(flat, ranges.wanted())
    with torch.cuda.device(device):
        return plan(flat, ranges.wanted())


def triton_listens() -> bool:
    """Whether a profiler of Triton's listens to launches."""
    runtime = sys.modules["triton"].knobs.runtime
    for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook):
        if hook is not None and getattr(hook, "calls", True):
            return True
    return False

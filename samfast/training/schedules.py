# SPDX-License-Identifier: Apache-2.0
"""The learning rate over a run: samfast's three schedules, and torch's by name."""

import ast
import inspect
import math
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from samfast.training.settings import SCHEDULES

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

# What ends with the run unless told otherwise.
_LENGTHS = {
    "OneCycleLR": "total_steps",
    "CosineAnnealingLR": "T_max",
    "PolynomialLR": "total_iters",
}


def parsed_schedule(text: str) -> tuple[str, dict[str, Any]]:
    """The class in torch.optim.lr_scheduler and the arguments that ``Name(key=number)`` says.

    Loads no torch. ValueError for another form.
    """
    try:
        call = ast.parse(text, mode="eval").body
        if isinstance(call, ast.Name):
            return call.id, {}
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and not call.args:
            arguments: dict[str, Any] = {}
            for word in call.keywords:
                if word.arg is None:  # of **
                    raise _unknown(text)
                arguments[word.arg] = ast.literal_eval(word.value)
            return call.func.id, arguments
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        pass
    raise _unknown(text)


def _unknown(text: str) -> ValueError:
    return ValueError(
        f"unknown schedule {text!r}; known are {', '.join(SCHEDULES)}, and those of "
        "torch.optim.lr_scheduler, such as StepLR(step_size=100)"
    )


def check_schedule(text: str, steps: int = 10) -> None:
    """Raise ValueError for what ``Schedule`` would refuse, or could not take so many steps with."""
    import torch

    if text in SCHEDULES:
        return
    optimizer = torch.optim.AdamW([torch.zeros(1)], lr=1.0)
    try:
        schedule = Schedule(optimizer, text, steps)
        for _ in range(steps):
            rate = schedule.lr()
            if not (math.isfinite(rate) and rate >= 0):
                raise ValueError(f"it gives the learning rate {rate}")
            schedule.go_on(1, ())
    except (TypeError, ValueError, ArithmeticError, LookupError) as error:
        if str(error).startswith("unknown schedule"):
            raise
        raise ValueError(f"schedule {text!r}, in {steps} steps: {error}") from None


class Schedule:
    """The learning rate of each parameter group, step by step.

    name: a schedule of samfast, or ``parsed_schedule``'s form   steps: optimizer steps in all
    done: steps so far   scores: of the epochs so far
    Raises ValueError when torch has no such schedule; wrong arguments raise what torch raises.
    """

    def __init__(self, optimizer: "Optimizer", name: str, steps: int):
        from torch.optim import lr_scheduler

        self.optimizer = optimizer
        self.scheduler: LRScheduler
        if name in SCHEDULES:
            self.scheduler = lr_scheduler.LambdaLR(optimizer, _factor(name, steps))
        else:
            self.scheduler = _of_torch(optimizer, name, steps)
        plateau = lr_scheduler.ReduceLROnPlateau
        self._by_epoch = self.scheduler if isinstance(self.scheduler, plateau) else None
        self.done = 0
        self.scores: list[float] = []

    def lr(self) -> float:
        """Return the rate of the first group in the next step."""
        rate: float = self.optimizer.param_groups[0]["lr"]
        return rate

    def step(self) -> None:
        """Advance after an optimizer step."""
        self.done += 1
        if self._by_epoch is None:
            self.scheduler.step()

    def end_epoch(self, score: float) -> None:
        """Advance after an epoch; ReduceLROnPlateau uses its score."""
        self.scores.append(score)
        if self._by_epoch is not None:
            self._by_epoch.step(score)

    def go_on(self, steps: int, scores: Sequence[float]) -> None:
        """Take so many steps and epochs at once, with the same bits as one by one in a run."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
            for _ in range(steps):
                self.step()
            for score in scores:
                self.end_epoch(score)


def _of_torch(optimizer: "Optimizer", text: str, steps: int) -> "LRScheduler":
    from torch.optim import lr_scheduler

    name, arguments = parsed_schedule(text)
    kind: Any = getattr(lr_scheduler, name, None)
    usable = inspect.isclass(kind) and issubclass(kind, lr_scheduler.LRScheduler)
    if not usable or kind is lr_scheduler.LRScheduler:
        raise _unknown(text)
    for own in ("last_epoch", "optimizer"):
        if own in arguments:
            raise ValueError(f"{own} is set by samfast; leave it out")
    if name == "OneCycleLR":
        arguments.setdefault("max_lr", [group["lr"] for group in optimizer.param_groups])
    if name == "ReduceLROnPlateau":
        arguments.setdefault("mode", "max")  # of the score
    if (length := _LENGTHS.get(name)) is not None and not {length, "epochs"} & set(arguments):
        arguments[length] = steps
    made: LRScheduler = kind(optimizer, **arguments)
    return made


def _factor(name: str, steps: int) -> Callable[[int], float]:
    """The learning rate's factor as a function of the optimizer step alone.

    cosine and constant begin with a linear warm-up over 5 % of the steps (at most 50). polynomial
    is that of Conv-LoRA's authors: no warm-up, power 1, end 0.
    """
    warmup = max(1, min(50, steps // 20))

    def factor(step: int) -> float:
        if name == "polynomial":
            return max(0.0, 1.0 - step / max(1, steps))
        if step < warmup or name == "constant":
            return min(1.0, (step + 1) / warmup)
        return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    return factor

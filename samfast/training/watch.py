# SPDX-License-Identifier: Apache-2.0
"""The losses and the gradients' norms of an epoch, left on the device until someone asks."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

PATIENCE = 64  # batches after which the host waits for the device and looks

Reduce = Callable[..., Tensor]
Images = Callable[[int], Sequence[str]]


class NotFinite(FloatingPointError):
    """A loss is not finite. batch: which one, from 0"""

    def __init__(self, sentence: str, batch: int):
        super().__init__(sentence)
        self.batch = batch


class Losses:
    """The mean losses of the batches so far, over all processes once they are looked at.

    names: of the parameters, in the order of the norms that ``add_norms`` takes
    """

    def __init__(self, names: Sequence[str], reduce: Reduce):
        self.names = names
        self.reduce = reduce
        self.values: list[float] = []
        self.counts: list[int] = []
        self._steps: list[int] = []  # of the batches that wait to be looked at
        self._losses: Tensor | None = None  # (PATIENCE,), theirs
        self._known: list[int] = []  # steps whose norms are known, of the last few
        self._norms: Tensor | None = None  # (PATIENCE + 1, P), of a step in its row

    def add(self, loss: Tensor, images: int, step: int) -> None:
        """Take down the loss of a batch of so many images, which is part of this step."""
        loss = loss.detach().float()
        if self._losses is None:
            self._losses = loss.new_empty(PATIENCE)
        self._losses[len(self._steps)] = loss
        self._steps.append(step)
        self.counts.append(images)

    def add_norms(self, norms: Tensor, step: int) -> None:
        if self._norms is None:
            self._norms = norms.new_empty(PATIENCE + 1, len(norms))
        self._norms[step % len(self._norms)] = norms
        self._known.append(step)

    def due(self) -> bool:
        """Whether it is time to look, which all processes do together."""
        return len(self._steps) >= PATIENCE

    def look(self) -> None:
        """Wait for the device; NotFinite for the first loss that is not finite."""
        if not self._steps:
            return
        assert self._losses is not None, self._steps
        steps, self._steps = self._steps, []
        values = self.reduce(self._losses[: len(steps)].clone(), reduction="mean").tolist()
        for value, step in zip(values, steps, strict=True):
            if not math.isfinite(value):
                raise NotFinite(
                    f"the loss is {value} in step {step}{self._largest(step)}", len(self.values)
                )
            self.values.append(value)
        self._known = self._known[-1:]

    def mean(self) -> float:
        """Mean over the images of the batches that were looked at."""
        counts = self.counts[: len(self.values)]
        total = sum(value * n for value, n in zip(self.values, counts, strict=True))
        return total / max(1, sum(counts))

    def _largest(self, step: int) -> str:
        """The largest gradient of the step before a bad one, or of that one itself."""
        known = [s for s in self._known if s < step] or [s for s in self._known if s == step]
        if not known:
            return ""
        assert self._norms is not None, known
        which = max(known)
        norms = self._norms[which % len(self._norms)]
        bad = (~norms.isfinite()).nonzero().flatten().tolist()
        at = bad[0] if bad else int(norms.argmax())
        when = "that step" if which == step else "the step before"
        return f"; the largest gradient of {when} has norm {norms[at]:.3g}, of {self.names[at]}"


@torch.no_grad()
def clip_gradients(parameters: Sequence[nn.Parameter], limit: float) -> Tensor:
    """The norms (P,) of the parameters' gradients, which are then scaled to ``limit`` in all.

    limit: as in ``torch.nn.utils.clip_grad_norm_``, whose bits these are; 0 does not clip
    """
    with_gradient = [p for p in parameters if p.grad is not None]
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(gradients))
    if limit > 0:
        total = torch.linalg.vector_norm(norms)
        torch.nn.utils.clip_grads_with_norm_(with_gradient, limit, total)
    if len(with_gradient) == len(parameters):
        return norms
    found = iter(norms)
    return torch.stack([norms.new_zeros(()) if p.grad is None else next(found) for p in parameters])

# SPDX-License-Identifier: Apache-2.0
"""Calls of cobot_fold that the tests share."""

from typing import NamedTuple

import torch
from draws import drawing

from samfast.functional import cobot_fold
from samfast.kernels.cobot_fold import example

from ..operation import Operation, runnable_by

BACKENDS = ("torch", "triton")
runnable = runnable_by(example)


class Case(NamedTuple):
    """layers of ``own`` slices each from ``first`` on, of ``slices`` in all; rows of a factor"""

    width: int
    layers: int
    own: int
    rows: int
    slices: int
    first: int = 0
    down: bool = False

    def __str__(self):
        kind = "down" if self.down else "up"
        return f"v{self.width}-{self.layers}x{self.own}of{self.slices}-{self.rows}rows-{kind}"

    def sources(self, dtype=torch.float64, then=None) -> list:
        """c, p, and the four lists, rounded to ``dtype`` and of ``then`` or the same."""
        drawn = drawing(0, dtype)

        def draw(*shape):
            return drawn(*shape).to(then or dtype)

        v, n = self.width, self.own
        factor = (v, self.rows) if self.down else (n * self.rows, v)
        each = range(self.layers)
        return [
            draw(1, v, self.slices),
            draw(self.slices, self.slices),
            [draw(n * v) for _ in each],
            [draw(n, 4, v // 4, v // 4) for _ in each],
            [draw(*factor) for _ in each],
            [draw(v) for _ in each] if self.down else [],
        ]

    def flat(self, sources) -> list[torch.Tensor]:
        c, p, *lists = sources
        return [c, p, *(t for part in lists for t in part)]

    def call(self, flat, backend) -> list[torch.Tensor]:
        """Folded factors and biases."""
        each = [flat[2 + i * self.layers : 2 + (i + 1) * self.layers] for i in range(4)]
        folded, shifts = cobot_fold(*flat[:2], *each, self.first, down=self.down, backend=backend)
        return [*folded, *shifts]

    def results(self, sources, backend, incoming=None) -> list[torch.Tensor]:
        """Folded factors and biases, then the gradients of all sources, of fixed products.

        incoming: what is done to the gradients that come in
        """
        flat = [t.detach().requires_grad_() for t in self.flat(sources)]
        made, draw = self.call(flat, backend), drawing(1)
        given = [draw(*t.shape).to(t.dtype) for t in made]
        given = given if incoming is None else [incoming(g) for g in given]
        grads = torch.autograd.grad(made, flat, given)
        return [t.detach() for t in (*made, *grads)]


CASES = (
    Case(4, 3, 2, 16, 6),
    Case(16, 3, 1, 33, 3, down=True),
    Case(8, 1, 2, 70, 80, first=76),
    Case(20, 2, 1, 65, 5, first=2, down=True),
)
SMALL = (Case(4, 2, 2, 3, 5, 1), Case(8, 2, 1, 3, 3, 1, True))


def operation(case, way):
    return Operation(
        "cobot_fold",
        way,
        lambda dtype: case.flat(case.sources(dtype)),
        case.call,
        runnable,
        BACKENDS,
        kept=lambda tensors, wanted: (0, 0),
        activations=0,
        apart=(),  # all are made together
    )


OPERATIONS = FINITE = [operation(SMALL[1], "down"), operation(SMALL[0], "up")]

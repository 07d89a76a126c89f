# SPDX-License-Identifier: Apache-2.0
"""Calls of cobot_fold that the tests share."""

from typing import NamedTuple

import torch

from samfast import backends
from samfast.functional import cobot_fold

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BACKENDS = ("torch", "triton")


def runnable(backend: str) -> str | None:
    """None when the backend runs on this machine's test device, else the sentence why not."""
    return backends.triton_missing(DEVICE) if backend == "triton" else None


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
        generator = torch.Generator().manual_seed(0)

        def draw(*shape):
            drawn = torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
            return drawn.to(DEVICE, then or dtype)

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

    def results(self, sources, backend, incoming=None) -> list[torch.Tensor]:
        """Folded factors and biases, then the gradients of all sources, of fixed products.

        incoming: what is done to the gradients that come in
        """
        c, p, *lists = sources
        flat = [t.detach().requires_grad_() for t in (c, p, *(t for part in lists for t in part))]
        each = [flat[2 + i * self.layers : 2 + (i + 1) * self.layers] for i in range(4)]
        folded, shifts = cobot_fold(*flat[:2], *each, self.first, down=self.down, backend=backend)
        made = [*folded, *shifts]
        generator = torch.Generator().manual_seed(1)
        given = [torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in made]
        given = [g.to(t.device, t.dtype) for g, t in zip(given, made, strict=True)]
        given = given if incoming is None else [incoming(g) for g in given]
        grads = torch.autograd.grad(made, flat, given)
        return [t.detach() for t in (*made, *grads)]


CASES = (
    Case(4, 3, 2, 16, 6),
    Case(16, 3, 1, 33, 3, down=True),
    Case(8, 1, 2, 70, 80, first=76),
    Case(20, 2, 1, 65, 5, first=2, down=True),
)

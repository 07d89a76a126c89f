# SPDX-License-Identifier: Apache-2.0
"""The error budget: how far from float64 a result may be, on any processor.

    error(ours) ≤ 2 · (error(stock) + error(least))    in max-norm and in 2-norm

error(stock) is the stock module's in the same dtype, the largest over ROUNDINGS runs. The first run
is unchanged; the others have other roundings (reordered.py), half of them on another number of
threads. One run of the stock module would be luck: its errors may nearly cancel.
error(least) is the best that arithmetic of this precision can do, the largest over as many draws
(rounded.py). It has float32's u for sums, or float64's, and up to the result dtype's own u.

The rate of false alarms holds for a result that is a single number, if ours adds in pairs and
errors are normal. Of 20,000,000 draws 2 are above the budget if the stock module makes no error at
all, and none if its errors are as large. Larger tensors have fewer. Values of few numbers that are
rounded to 16 bits on the way have more, because their errors are not normal.
"""

import functools
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from samfast.kernels._common.reordered import Reordered
from samfast.kernels._common.rounded import Rounded

ROUNDINGS = 16
UNIT = {torch.float64: 2.0**-53}
UNIT_OF_SUMS = 2.0**-24

Tensors = Tensor | Sequence[Tensor] | Mapping[str, Tensor]
Norms = tuple[float, float]


class Budget:
    """How far results may be from those of ``exact``.

    stock, exact: functions without arguments that return results in one form: a tensor, a sequence,
        or a dict by name. ``exact`` computes in float64. Pass the results themselves if there is
        only one way to round them.
    dtype: the dtype of the arithmetic; autocast's if autocast is on

    At each call the functions find torch's generators in the state that they have here.
    """

    def __init__(
        self,
        stock: Callable[[], Tensors] | Tensors,
        exact: Callable[[], Tensors] | Tensors,
        dtype: torch.dtype,
    ):
        self._functions = {"stock": _function(stock), "exact": _function(exact)}
        self._unit = UNIT.get(dtype, UNIT_OF_SUMS)
        self._random = torch.get_rng_state()
        self._random_on_gpus = torch.cuda.get_rng_state_all()
        self._errors: dict[tuple[str, int], dict[str, Norms]] = {}

    @functools.cached_property
    def exact(self) -> dict[str, Tensor]:
        made = self._run("exact")
        wrong = {t.dtype for t in made.values() if t.is_floating_point()} - {torch.float64}
        assert not wrong, f"expected exact results in float64, got {wrong}"
        return made

    @functools.cached_property
    def stock(self) -> dict[str, Tensor]:
        return self._run("stock")

    def problems(self, ours: Tensors, some: bool = False) -> dict[str, str]:
        """A sentence for each result above the budget, by name or number.

        some: ``ours`` is a dict that holds only some of the results

        Asks for few roundings first: what is within their budget is within that of all.
        """
        sentences = {}
        for name, mine in self._checked(ours, some).items():
            if mine.shape != self.exact[name].shape:
                sentences[name] = f"shape {tuple(mine.shape)} is not {self._shape(name)}"
                continue
            if not mine.is_floating_point():
                if not torch.equal(mine, self.exact[name]):
                    sentences[name] = "choices differ"
                continue
            errors = _norms(mine, self.exact[name])
            for draws in range(1, 2 * ROUNDINGS + 1):
                sentence = _above(errors, self._allowed(name, draws))
                if sentence is None:
                    break
            else:
                sentences[name] = sentence
        return sentences

    def shares(self, ours: Tensors) -> dict[str, float]:
        """Each result's error over what is allowed, in the norm where that is more."""
        shares = {}
        for name, mine in self._checked(ours).items():
            assert mine.shape == self.exact[name].shape, f"{name} is not {self._shape(name)}"
            allowed = self._allowed(name, 2 * ROUNDINGS)
            shares[name] = max(map(_share, _norms(mine, self.exact[name]), allowed))
        return shares

    def _checked(self, ours: Tensors, some: bool = False) -> dict[str, Tensor]:
        named = _named(ours)
        fits = set(named) <= set(self.exact) if some else set(named) == set(self.exact)
        assert fits, f"expected the results {', '.join(self.exact)}, got {', '.join(named)}"
        return named

    def _shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.exact[name].shape)

    def _allowed(self, name: str, draws: int) -> Norms:
        """By that many draws, of the stock module and of the least error in turn."""
        stock, least = (draws + 1) // 2, draws // 2
        runs = [("stock", n) for n in range(stock)], [("least", n) for n in range(least)]
        largest = [
            [max((self._error(*run)[name][norm] for run in kind), default=0.0) for norm in range(2)]
            for kind in runs
        ]
        return tuple(2.0 * sum(pair) for pair in zip(*largest, strict=True))

    def _error(self, kind: str, n: int) -> dict[str, Norms]:
        if (kind, n) not in self._errors:
            made = self._rounding(n) if kind == "stock" else self._least(n)
            errors = {name: _norms(made[name], exact) for name, exact in self.exact.items()}
            # What is not finite excuses nothing.
            self._errors[kind, n] = {
                name: tuple(e if e < torch.inf else 0.0 for e in pair)
                for name, pair in errors.items()
            }
        return self._errors[kind, n]

    def _rounding(self, n: int) -> dict[str, Tensor]:
        if n == 0:
            return self.stock
        threads = torch.get_num_threads()
        torch.set_num_threads(threads if n % 2 else 1 + (threads == 1))
        try:
            with Reordered(n):
                return self._run("stock")
        finally:
            torch.set_num_threads(threads)

    def _least(self, n: int) -> dict[str, Tensor]:
        with Rounded(n, self._unit):
            made = self._run("exact")
        generator = torch.Generator().manual_seed(n)
        rounded = {}
        for name, t in made.items():
            if not t.is_floating_point():
                rounded[name] = t
                continue
            info = torch.finfo(self.stock[name].dtype)
            most = t.abs().clamp(min=info.smallest_normal) * (info.eps / 2)
            chance = 2 * torch.rand(t.shape, generator=generator, dtype=torch.float64) - 1
            rounded[name] = t + most * chance.to(t.device)
        return rounded

    def _run(self, which: str) -> dict[str, Tensor]:
        with torch.random.fork_rng():
            torch.set_rng_state(self._random)
            torch.cuda.set_rng_state_all(self._random_on_gpus)
            return {name: t.detach() for name, t in _named(self._functions[which]()).items()}


def _function(given) -> Callable[[], Tensors]:
    return given if callable(given) else lambda: given


def _named(results: Tensors) -> dict[str, Tensor]:
    if isinstance(results, Mapping):
        return dict(results)
    results = [results] if isinstance(results, Tensor) else results
    return {str(number): t for number, t in enumerate(results)}


def _norms(t: Tensor, exact: Tensor) -> Norms:
    """The largest error, and the root mean square of the errors."""
    if exact.numel() == 0:
        return 0.0, 0.0
    error = t.detach().double() - exact.double()
    return error.abs().max().item(), error.square().mean().sqrt().item()


def _share(error: float, allowed: float) -> float:
    return 0.0 if error == 0.0 else error / allowed if allowed else torch.inf


def _above(errors: Norms, allowed: Norms) -> str | None:
    for name, error, most in zip(("max-norm", "2-norm"), errors, allowed, strict=True):
        if not error <= most:
            share = _share(error, most)
            return f"{name} error {error:.3e} is {share:.2f} of the budget {most:.3e}"
    return None

# SPDX-License-Identifier: Apache-2.0
"""MTSAM's ``QKVLinear`` and ``TDLinear``: a linear layer with one update for each task.

Other programs have other classes of these names. Those are left alone.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from types import FunctionType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from samfast.adapters.foreign import Foreign, ForeignModule
from samfast.adapters.low_rank import backend_of
from samfast.backends import requested
from samfast.functional import task_cores
from samfast.integrations.cobot_relation import now_problem_of
from samfast.integrations.linears import (
    dropout_problem,
    held_problem,
    number_problem,
    shape_problem,
    takes,
    value_problem,
)
from samfast.integrations.plain_code import LARGEST_NUMBER, PlainCode
from samfast.integrations.probe import Marking, deviation, difference, shell
from samfast.integrations.read_once import read_once
from samfast.integrations.wrapper_proof import Run, draw, own_problem, problem, stock_of
from samfast.kernels._common.autocast import autocast_input
from samfast.kernels.task_core.paths import core_backend
from samfast.kernels.task_core.task_lora import task_lora_linear

OWNER = None
CALLS = {
    "keep": "samfast.fuse(model) lets it run fused, and attach takes a plain Sam",
    "save": "save model.state_dict()",
    "merge": "MTSAM has no call that folds them into the weights",
    "loss": "a penalty on their factors is your program's, so leave aux_loss out",
}
_DROPOUT = PlainCode(nn.Dropout, frozenset(("p", "training", "inplace", "dropout")))
_FACTORS = ("td_G", "td_U1", "td_U2", "td_U3")
Range = tuple[int, int]
Compare = Callable[..., str | None]


class TuckerSizes(NamedTuple):
    """Sizes of a layer and of its update.  enabled: of equal parts of the outputs, None for all"""

    inputs: int
    outputs: int
    ranks: tuple[int, int, int]
    tasks: int
    enabled: tuple[bool, ...] | None
    scaling: float
    bias: bool


class FusedTuckerLinear(ForeignModule):
    """MTSAM's linear layer with an update for each task, by samfast's operators.

    x: (B, H, W, D) -> (B, H, W, O) = x Wᵀ + b + s · ((drop(x) U1) M_t) U2ᵀ
    with M_t = Σ_v U3[t, v] G[:, :, v]

    task_idx: of the task t. With -1 the batch is in ``task_num`` equal groups, one for each
    task in order. The update's weights, which MTSAM forms for all tasks, are never formed. Dropout
    has the same distribution, but other random numbers.

    It fuses the Tucker form, on maps. In every other case MTSAM's forward runs, and
    ``block_problem`` says why, except for x. Every tensor is read at every forward.
    """

    takes = "(self, x, task_idx=-1)"
    methods: ClassVar[tuple[str, ...]] = ("generate_tensor",)
    reads: ClassVar[tuple[str, ...]] = (
        *("weight", "bias", "scaling", "task_num", "type", "td_dropout"),
        *_FACTORS,
    )

    def forward(self, x: Tensor, task_idx: int = -1) -> Tensor:
        """Run x: (B, H, W, D) -> (B, H, W, O), fused if nothing prevents it."""
        entries = self._entries(x, task_idx)
        if entries is None or not takes(x, self.weight) or self.block_problem() is not None:
            return super().forward(x, task_idx)
        dropout: Foreign = self._modules.get("td_dropout")
        active = dropout is not None and dropout.training
        (cores,) = task_cores([self.td_G], [self.td_U3])
        return task_lora_linear(
            x, self.weight, self.bias, self.td_U1, self.td_U2, cores, entries,
            float(self.scaling), dropout=float(dropout.p) if active else 0.0, slices=self._slices(),
        )  # fmt: skip

    def _entries(self, x: Tensor, task: Any) -> Tensor | None:
        """Return the tasks of equal parts of the batch; None if only MTSAM's forward is sure."""
        count = self.task_num
        if type(task) is not int or 0 in x.shape or x.dim() != 4:
            return None
        if task == -1 and x.shape[0] % count == 0:
            return torch.arange(count, device=x.device)
        if 0 <= task < count:
            return torch.full((1,), task, dtype=torch.int64, device=x.device)
        return None

    def _slices(self) -> list[Range] | None:
        """Return the outputs that are updated; None for all."""
        return None

    def block_problem(self) -> str | None:
        """Say why MTSAM's own forward runs; None if this class's does."""
        tensors = {name: getattr(self, name) for name in ("weight", *_FACTORS)}
        parts: dict[str, Foreign] = {n: m for n, m in self._modules.items() if m is not None}
        return own_problem(self) or now_problem_of(tensors, parts)

    def backends(self) -> dict[str, str]:
        """Map each operation to the backend that a forward would choose now, under autocast too."""
        if self.block_problem() is not None:
            return {}
        try:
            x = autocast_input(self.weight.detach()[:0])
            own = core_backend(requested("auto"), x, self.td_G[..., 0])
        except RuntimeError as error:
            own = str(error)
        count = len(self._slices() or ()) or 1
        factors = self.td_U1.detach().t(), self.td_U2.detach()
        return {**backend_of(self.weight, factors, count), "task_core": own}

    @classmethod
    def stamp(cls, module: Foreign) -> tuple[Any, ...]:
        own = [(name, p.shape) for name, p in module._parameters.items() if p is not None]
        buffers = [name for name, value in module._buffers.items() if value is not None]
        parts = [(name, type(part)) for name, part in module._modules.items()]
        dropout = vars(module).get("td_dropout")
        code = dropout.__code__ if isinstance(dropout, FunctionType) else type(dropout)
        chance = getattr(module._modules.get("td_dropout"), "p", None)
        numbers = [vars(module).get(name) for name in ("scaling", "task_num", "type")]
        plain = [(type(n), n if isinstance(n, (int, float, str)) else None) for n in numbers]
        return *own, *buffers, *parts, code, chance, *plain

    @classmethod
    def codes(cls, module: Foreign) -> list[PlainCode]:
        """Return the code of the dropout."""
        return [_DROPOUT]

    @classmethod
    def structure(cls, module: Foreign) -> str | None:
        children = ("td_dropout",) if "td_dropout" in module._modules else ()
        reason = held_problem(module, children, ("weight", "bias", *_FACTORS))
        if reason is not None:
            return reason
        dropout = module.td_dropout
        return (
            value_problem(module, {"type": "tucker"})
            or dropout_problem("td_dropout", dropout, _changes_nothing(dropout))
            or cls._sizes_problem(module)
        )

    @classmethod
    def _sizes_problem(cls, module: Foreign) -> str | None:
        core, into, out, kinds = (module._parameters.get(name) for name in _FACTORS)
        first, second, third = (0, 0, 0) if core is None else (*core.shape, 0, 0, 0)[:3]
        tasks = 0 if kinds is None else kinds.shape[0]
        shapes = {
            "td_G": (core, (max(first, 1), max(second, 1), max(third, 1))),
            "td_U1": (into, (module.weight.shape[1], first)),
            "td_U2": (out, (cls._updated(module), second)),
            "td_U3": (kinds, (max(tasks, 1), third)),
        }
        return (
            shape_problem(shapes)
            or value_problem(module, {"task_num": tasks})
            or number_problem("scaling", module.scaling)
        )

    @classmethod
    def _updated(cls, module: Foreign) -> int:
        """Return how many outputs have an update."""
        return module.weight.shape[0]

    @classmethod
    def sizes(cls, module: Foreign) -> TuckerSizes:
        outputs, inputs = module.weight.shape
        return TuckerSizes(
            inputs,
            outputs,
            tuple(module.td_G.shape),
            module.task_num,
            cls._enabled(module),
            float(module.scaling),
            module.bias is not None,
        )

    @classmethod
    def _enabled(cls, module: Foreign) -> tuple[bool, ...] | None:
        return None

    @staticmethod
    def small(sizes: TuckerSizes) -> TuckerSizes:
        parts = len(sizes.enabled or ())
        small = {"inputs": 6, "outputs": 4 * (parts or 1), "ranks": (2, 3, 2)}
        return sizes._replace(**small)  # type: ignore[arg-type]  # of two kinds

    @staticmethod
    def width(sizes: TuckerSizes) -> int:
        return sizes.inputs

    @classmethod
    def runs(cls, sizes: TuckerSizes) -> list[Run]:
        """Compare all tasks at once and tasks alone, then the last at full size.

        There are as many tasks as the user has. Alone run the last two, and those whose numbers
        the code may name; see ``LARGEST_NUMBER``.
        """
        small, tasks = cls.small(sizes), sizes.tasks

        def run(made: TuckerSizes, task: int, compare: Compare, *shape: int) -> Run:
            compare = functools.partial(_of_task, task=task, compare=compare)
            return Run(made, cls._formula(made, task), compare, shape)

        alone = {*range(min(tasks, LARGEST_NUMBER + 1)), max(tasks - 2, 0), tasks - 1}
        return [
            run(small, -1, difference, 2 * tasks, 3, 7),
            run(small, -1, deviation, tasks, 2, 3),
            run(small, 0, difference, 6, 3, 7),
            run(small, tasks - 1, difference, 6, 3, 7),
            *[run(small, task, deviation, 2, 3, 4) for task in sorted(alone)],
            run(sizes, tasks - 1, deviation, 1, 5, 2),
        ]

    @classmethod
    def stand_in(
        cls, kind: type[nn.Module], sizes: TuckerSizes, generator: torch.Generator
    ) -> nn.Module:
        first, second, third = sizes.ranks
        enabled = sizes.enabled
        rows = sizes.outputs // len(enabled) * sum(enabled) if enabled else sizes.outputs
        shapes = {
            "weight": (sizes.outputs, sizes.inputs),
            "td_G": sizes.ranks,
            "td_U1": (sizes.inputs, first),
            "td_U2": (rows, second),
            "td_U3": (sizes.tasks, third),
        }
        parts: dict[str, nn.Module | nn.Parameter] = {
            name: nn.Parameter(draw(generator, *shape)) for name, shape in shapes.items()
        }
        parts["td_dropout"] = Marking()
        values = {"scaling": sizes.scaling, "task_num": sizes.tasks, "type": "tucker"}
        if enabled:
            values["ind"] = _mask(enabled, sizes.outputs)
        made = shell(kind, values, **parts)
        bias = nn.Parameter(draw(generator, sizes.outputs)) if sizes.bias else None
        made.register_parameter("bias", bias)
        return made

    @classmethod
    def formula(cls, sizes: TuckerSizes) -> Callable[[Tensor, Mapping[str, Tensor]], Tensor]:
        """Return the formula for all tasks."""
        return cls._formula(sizes, -1)

    @classmethod
    def _formula(
        cls, sizes: TuckerSizes, task: int
    ) -> Callable[[Tensor, Mapping[str, Tensor]], Tensor]:
        def adapted(x: Tensor, given: Mapping[str, Tensor]) -> Tensor:
            given = {name.removeprefix("layer."): tensor for name, tensor in given.items()}
            core, into, out, kinds = (given[name] for name in _FACTORS)
            tasks = range(sizes.tasks) if task == -1 else [task]
            updates = []
            for part, t in zip(Marking()(x).chunk(len(tasks)), tasks, strict=True):
                updates.append(part @ into @ (core @ kinds[t]) @ out.t())
            update = sizes.scaling * torch.cat(updates)
            if sizes.enabled is not None:
                wide = update.new_zeros(*update.shape[:-1], sizes.outputs)
                wide[..., _mask(sizes.enabled, sizes.outputs)] = update
                update = wide
            return F.linear(x, given["weight"], given.get("bias")) + update

        return adapted


class FusedTuckerQkv(FusedTuckerLinear):
    """MTSAM's packed qkv layer, whose update is for some of q, k and v.

    See ``FusedTuckerLinear``. U2 has rows for what is enabled. Every forward compares ``ind`` on a
    CPU; on other devices a write through ``.data`` goes unnoticed.
    """

    methods = ("generate_tensor", "zero_pad")
    reads = (*FusedTuckerLinear.reads, "ind")

    def _slices(self) -> list[Range] | None:
        enabled = self.enable_qkv
        if all(enabled):
            return None
        length = self.weight.shape[0] // len(enabled)
        return [(i * length, (i + 1) * length) for i, on in enumerate(enabled) if on]

    @classmethod
    def stamp(cls, module: Foreign) -> tuple[Any, ...]:
        enabled, mask = vars(module).get("enable_qkv"), vars(module).get("ind")
        plain = tuple(enabled) if isinstance(enabled, (list, tuple)) else type(enabled)
        known = read_once(mask, _values) if isinstance(mask, Tensor) else type(mask)
        return *super().stamp(module), str(plain), known

    @classmethod
    def _sizes_problem(cls, module: Foreign) -> str | None:
        enabled, mask = module.enable_qkv, vars(module).get("ind")
        outputs = module.weight.shape[0]
        bools = isinstance(enabled, (list, tuple)) and {type(on) for on in enabled} == {bool}
        if not bools or not any(enabled) or outputs % len(enabled):
            return f"has enable_qkv={enabled!r}, not a bool for each part of {outputs} outputs"
        wanted = _values(_mask(tuple(enabled), outputs))
        if not isinstance(mask, Tensor) or read_once(mask, _values) not in (None, wanted):
            return "has an ind that is not what enable_qkv says"
        return super()._sizes_problem(module)

    @classmethod
    def _updated(cls, module: Foreign) -> int:
        enabled = module.enable_qkv
        return module.weight.shape[0] // len(enabled) * sum(enabled)

    @classmethod
    def _enabled(cls, module: Foreign) -> tuple[bool, ...] | None:
        return tuple(module.enable_qkv)


_MIXINS = {"QKVLinear": FusedTuckerQkv, "TDLinear": FusedTuckerLinear}


def _mask(enabled: tuple[bool, ...], outputs: int) -> Tensor:
    """Return a mask of the outputs that have an update."""
    return torch.tensor(enabled, device="cpu").repeat_interleave(outputs // len(enabled))


def _values(mask: Tensor) -> bytes:
    """Return a mask as bytes, which are quick to compare."""
    return mask.detach().cpu().to(torch.uint8).numpy().tobytes() + str(mask.dtype).encode()


def _identity(x: Tensor) -> Tensor:
    return x


def _changes_nothing(function: object) -> bool:
    """True for a function that returns its argument, as MTSAM has without dropout."""
    if not isinstance(function, FunctionType) or function.__closure__ is not None:
        return False
    code = function.__code__
    return code.co_code == _identity.__code__.co_code and code.co_argcount == 1


class _OfTask(nn.Module):
    """A layer that works for one task, or for all."""

    def __init__(self, layer: nn.Module, task: int):
        super().__init__()
        self.layer, self.task = layer, task

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if self.task == -1 else self.layer(x, self.task)


def _of_task(
    module: nn.Module,
    formula: Callable[[Tensor, Mapping[str, Tensor]], Tensor],
    x: Tensor,
    task: int,
    compare: Callable[..., str | None],
) -> str | None:
    return compare(_OfTask(module, task), formula, x)


def objection(module: nn.Module) -> str | None:
    """Say why a module with one of MTSAM's names is not fused; None if it is."""
    reason = problem(module, mixin_of(module))
    return None if reason is None else f"which {reason}"


def mixin_of(module: nn.Module) -> type[FusedTuckerLinear]:
    """Return the mixin for a module of MTSAM's."""
    names = [base.__name__ for base in stock_of(module).__mro__]
    return next(_MIXINS[name] for name in names if name in _MIXINS)


def kind_of(module: nn.Module) -> str:
    """Return what sentences call the module."""
    return stock_of(module).__name__


def parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the factors."""
    for name, parameter in module.named_parameters():
        if name.removeprefix("parametrizations.").startswith("td_"):
            yield name, parameter

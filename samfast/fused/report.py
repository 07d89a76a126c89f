# SPDX-License-Identifier: Apache-2.0
"""Report what a model trains, freezes and fuses, and what runs where."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from samfast.adapters.adapter import adapter_parameter_names, adapters
from samfast.adapters.attachment import attachment_within
from samfast.adapters.foreign import Foreign
from samfast.adapters.method import Method
from samfast.adapters.wrappers import unwrapped
from samfast.fused.classes import is_fused_attention
from samfast.fused.fuse import attention_states, block_states, fused_blocks
from samfast.fused.proof import objection
from samfast.integrations.libraries import (
    layers_of_others,
    parameters_of_others,
    states_of_others,
)
from samfast.integrations.swap import swapped
from samfast.models.reading import modules_of, unread_by_segment

_OF_BLOCKS = (
    "relpos_attention",
    "rope",
    "sam_block",
    "window_attention",
)  # operations listed below the blocks


@dataclass(frozen=True)
class Report:
    """The result of ``report``. ``str()`` turns it into a table.

    method: the attached method; None if there is none
    layers: class of every adapted layer, by full name
    adapter_parameters, other_trained_parameters, frozen_parameters: numbers of elements
    trained_tensors: number of tensors that require a gradient
    trained_by_part: elements that require a gradient, by top-level part of the model
    trained_dtypes, frozen_dtypes: elements by dtype
    merged: number of layers whose adapter is folded into the weight
    backends: for each operation, the sorted choices of its layers on their devices
    attention: for every segment_anything attention by full name: "fused", or "fused, windows cut
        first: …" or "not fused: …" with the reason
    blocks: for every transformer block by full name: "fused", or "fused in parts: …" or
        "not fused: …" with the reason
    memory: the modes of the fused blocks, see ``fuse``; () if there are none
    unread: names of a SAM's trained parameters that ``segment`` never reads
    others: for every layer that another library adapted, by full name: "fused: …" or "not fused: …"
        with the owner and the reason; these adapters count as adapter parameters
    """

    method: Method | None
    layers: dict[str, str]
    adapter_parameters: int
    other_trained_parameters: int
    trained_tensors: int
    trained_by_part: dict[str, int]
    frozen_parameters: int
    trained_dtypes: dict[torch.dtype, int]
    frozen_dtypes: dict[torch.dtype, int]
    merged: int
    backends: dict[str, tuple[str, ...]]
    attention: dict[str, str]
    blocks: dict[str, str]
    memory: tuple[str, ...]
    unread: tuple[str, ...] = ()
    others: dict[str, str] = field(default_factory=dict)

    @property
    def trained_parameters(self) -> int:
        """Number of elements that require a gradient."""
        return sum(self.trained_by_part.values())

    def __str__(self) -> str:
        total = self.trained_parameters + self.frozen_parameters
        share = 100 * self.trained_parameters / total if total else 0.0
        kinds = Counter(self.layers.values())
        adapted = ", ".join(f"{count} x {kind}" for kind, count in kinds.items()) or "none"
        rows = [
            ("method", "none" if self.method is None else repr(self.method)),
            ("adapted layers", adapted + (f" ({self.merged} merged)" if self.merged else "")),
            *(_state_rows("layers of others", self.others) if self.others else []),
            *self._backend_rows(lambda operation: operation not in _OF_BLOCKS),
            *_state_rows("attention", self.attention),
            *_state_rows("blocks", self.blocks),
            *([("memory", " | ".join(self.memory))] if self.memory else []),
            *self._backend_rows(lambda operation: operation in _OF_BLOCKS),
            ("adapter parameters", f"{self.adapter_parameters:,}"),
            ("other trained", f"{self.other_trained_parameters:,}"),
            (
                "requires gradient",
                f"{self.trained_parameters:,} in {self.trained_tensors:,} tensors "
                f"({share:.2f} % of {total:,}){_dtypes(self.trained_dtypes)}",
            ),
            *((f"  {part}", f"{count:,}") for part, count in self.trained_by_part.items()),
            *([("not read by segment", _unread(self.unread))] if self.unread else []),
            ("frozen", f"{self.frozen_parameters:,}{_dtypes(self.frozen_dtypes)}"),
        ]
        width = max(len(label) for label, _ in rows)
        return "\n".join(f"{label:<{width}}  {value}" for label, value in rows)

    def _backend_rows(self, wanted: Callable[[str], bool]) -> list[tuple[str, str]]:
        chosen = {name: choices for name, choices in self.backends.items() if wanted(name)}
        return [(f"  {name}", " | ".join(choices)) for name, choices in chosen.items()]


def report(model: nn.Module) -> Report:
    """Count what is trained, frozen and adapted, and say what is fused, for any model.

    >>> import samfast
    >>> from samfast.models import build_sam
    >>> found = samfast.report(build_sam("vit_tiny"))
    >>> sorted(set(found.blocks.values()))
    ["not fused: still segment_anything's own"]
    """
    model = unwrapped(model)
    layers = adapters(model)
    others = layers_of_others(model)
    own = adapter_parameter_names(model) | parameters_of_others(others)
    parts: Counter[str] = Counter()
    trained: Counter[torch.dtype] = Counter()
    frozen: Counter[torch.dtype] = Counter()
    tensors = adapter_count = other = 0
    for name, parameter in model.named_parameters():
        count = parameter.numel()
        if name in own:
            adapter_count += count
        elif parameter.requires_grad:
            other += count
        if parameter.requires_grad:
            tensors += 1
            parts[name.partition(".")[0]] += count
            trained[parameter.dtype] += count
        else:
            frozen[parameter.dtype] += count
    record = attachment_within(model)
    attention, blocks = attention_states(model), fused_blocks(model)
    alone = [module for module in model.modules() if is_fused_attention(module)]
    return Report(
        method=None if record is None else record.method,
        layers={name: type(layer).__name__ for name, layer in layers.items()},
        adapter_parameters=adapter_count,
        other_trained_parameters=other,
        trained_tensors=tensors,
        trained_by_part=dict(parts),
        frozen_parameters=sum(frozen.values()),
        trained_dtypes=dict(trained),
        frozen_dtypes=dict(frozen),
        merged=sum(layer.merged for layer in layers.values()),
        backends=_choices(
            [
                *layers.values(),
                *filter(swapped, others.values()),
                *(layer for layer in alone if objection(layer) is None),
                *blocks.values(),
            ]
        ),
        attention=attention,
        blocks=block_states(model),
        memory=tuple(sorted({block.memory for block in blocks.values()})),
        unread=tuple(unread_by_segment(model)),
        others=states_of_others(others),
    )


def _choices(layers: list[Foreign]) -> dict[str, tuple[str, ...]]:
    found: dict[str, set[str]] = {}
    for layer in layers:
        for operation, choice in layer.backends().items():
            found.setdefault(operation, set()).add(choice)
    return {operation: tuple(sorted(choices)) for operation, choices in sorted(found.items())}


def _state_rows(label: str, states: dict[str, str]) -> list[tuple[str, str]]:
    counts = Counter(states.values())
    rows = [f"{count} x {state}" for state, count in counts.items()] or ["none of SAM's"]
    return list(zip([label] + [""] * (len(rows) - 1), rows, strict=True))


def _unread(names: tuple[str, ...]) -> str:
    return f"{len(names)} trained tensors of {', '.join(modules_of(list(names)))}"


def _dtypes(counts: dict[torch.dtype, int]) -> str:
    names = [str(dtype).removeprefix("torch.") for dtype in counts]
    return f", {' and '.join(names)}" if names else ""

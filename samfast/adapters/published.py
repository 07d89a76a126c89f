# SPDX-License-Identifier: Apache-2.0
"""Modules whose state dict uses the names of their method's published code."""

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

Published = dict[str, tuple[list[str], tuple[int, ...]]]
Names = TypeVar("Names", bound="PublishedNames")


if TYPE_CHECKING:
    from samfast.adapters.adapter import Adapter

    _Mixin = Adapter
else:
    _Mixin = nn.Module


class PublishedNames(_Mixin):
    """Mixin that translates names and packs published parts into one Parameter."""

    def published(self) -> Published:
        """Map the name of a Parameter to its published keys and the shape of each part.

        The Parameter holds the parts one after another. Parameters not listed keep their names.
        """
        raise NotImplementedError

    def constants(self) -> dict[str, float]:
        """Published entries of one element that are not tensors here."""
        return {}

    def _apply(self: Names, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Names:
        """Apply ``fn``, but keep the layout of packed Parameters under ``memory_format``."""

        def packed(t: Tensor) -> Tensor:
            if t.dim() < 4:
                return fn(t)
            try:
                return fn(t).contiguous()
            except RuntimeError:  # channels_last needs exactly four dimensions
                return fn(t.flatten(0, -4)).contiguous().view(t.shape)

        return super()._apply(packed, recurse)

    def published_state(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the entries of the state dict except the layer's own weight and bias."""
        for name, value in self.state_dict(keep_vars=True).items():
            if name not in ("weight", "bias"):
                yield name, value

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        own: dict[str, Tensor] = {}
        published = self.published()
        super()._save_to_state_dict(own, "", keep_vars)
        for name, value in own.items():
            keys, shape = published.get(name, ([name], ()))
            parts = [value] if len(keys) == 1 else value.reshape(len(keys), *shape)
            for key, part in zip(keys, parts, strict=True):
                destination[prefix + key] = part
        for name, constant in self.constants().items():
            like = self.get_parameter(next(iter(published)))
            destination[prefix + name] = like.new_full((1,), constant)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        given = {key[len(prefix) :]: v for key, v in state_dict.items() if key.startswith(prefix)}
        published = self.published()
        problem = self.state_problem(given)
        unexpected: list[str] = []
        errors = [] if problem is None else [problem]
        missing = [name for name in self.constants() if given.pop(name, None) is None]
        for name in published:
            if given.pop(name, None) is not None:
                unexpected.append(name)
        for name, (keys, shape) in published.items():
            parts = {key: given.pop(key) for key in keys if key in given}
            missing += [key for key in keys if key not in parts]
            wrong = [
                f"{key} has shape {tuple(part.shape)}, but here it is {tuple(shape)}"
                for key, part in parts.items()
                if part.shape != shape
            ]
            errors += wrong
            if not parts or wrong:
                continue
            present = self.get_parameter(name).detach()
            if len(parts) < len(keys):
                if present.is_meta:  # a meta tensor has no values to keep
                    continue
                device = next(iter(parts.values())).device
                held = present.reshape(len(keys), *shape).to(device)
                parts = dict(zip(keys, held, strict=True)) | parts
            values = [parts[key] for key in keys]
            whole = values[0] if len(keys) == 1 else torch.stack(values)
            given[name] = whole.reshape(present.shape)
        absent: list[str] = []
        super()._load_from_state_dict(
            {prefix + name: value for name, value in given.items()},
            prefix,
            local_metadata,
            strict,
            absent,
            unexpected_keys,
            error_msgs,
        )
        translated = {prefix + name for name in published}
        missing_keys += [key for key in absent if key not in translated]
        if strict:
            missing_keys += [prefix + key for key in missing]
            unexpected_keys += [prefix + key for key in unexpected]
        error_msgs += errors

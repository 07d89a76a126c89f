# SPDX-License-Identifier: Apache-2.0
"""Find NaN and infinity in tensors, in one pass and with one wait per device."""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Return the name of the first tensor with NaN or infinity; None if all are finite.

    It reads only the local shard of a sharded tensor. Tensors without values (meta, fake), sparse
    tensors and subclasses with operations of their own count as finite.
    """
    return next((name for name in _suspects(tensors) if not _all_finite(tensors[name])), None)


def base_problem(model: nn.Module, replaced: Collection[str] = ()) -> str | None:
    """Name the first broken tensor of a base model, as a phrase; None if all are sound.

    Parameters must be finite. Persistent buffers may hold infinity, as masks do, but not NaN.
    replaced: names in the state dict of tensors that are about to be overwritten
    """
    state = {n: t for n, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
    overwritten = {id(state[name]) for name in replaced if name in state}
    read = {name: tensor for name, tensor in state.items() if id(tensor) not in overwritten}
    buffers = {id(buffer) for buffer in model.buffers()}
    for name in _suspects(read):
        if id(read[name]) not in buffers:
            if not _all_finite(read[name]):
                return f"{name} contains NaN or infinity"
        elif (values := _here(read[name])) is not None and values.isnan().any():
            return f"{name} contains NaN"
    return None


def _suspects(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return names of tensors whose sum is not finite: all with NaN or infinity, rarely others.

    A sum of finite numbers may overflow. This waits for each device once.
    """
    sums: dict[torch.device, dict[str, Tensor]] = {}
    with torch.no_grad():
        for name, tensor in tensors.items():
            if (values := _here(tensor)) is not None:
                sums.setdefault(values.device, {})[name] = values.sum().isfinite()
        finite = {
            name: fine
            for own in sums.values()
            for name, fine in zip(own, torch.stack(list(own.values())).tolist(), strict=True)
        }
    return [name for name in tensors if not finite.get(name, True)]


def _all_finite(tensor: Tensor) -> bool:
    values = _here(tensor)
    return values is None or bool(values.isfinite().all())


def _here(tensor: Tensor) -> Tensor | None:
    """Return the values that this process can read; None if it can read none."""
    tensor = tensor.detach()
    if hasattr(tensor, "to_local"):  # a DTensor, whose class takes a second to import
        tensor = tensor.to_local()
    own_way = type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__
    if own_way or tensor.is_meta or tensor.layout is not torch.strided:
        return None
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return None
    return tensor.float() if tensor.itemsize == 1 else tensor  # float8 has few operations

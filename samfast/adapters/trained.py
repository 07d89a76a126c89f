# SPDX-License-Identifier: Apache-2.0
"""The tensors that training changes; an adapter folder holds exactly these."""

import torch
from torch import nn

from samfast.adapters.adapter import adapter_parameter_names, adapter_state, adapters
from samfast.adapters.attachment import attachment


def trained_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Map full names to all tensors that training changes: the model's own, shared ones once.

    These are the adapters, tensors that ``train`` un-froze, tensors that require a gradient now,
    and persistent buffers of modules that are trained whole. Weights come without the adapter,
    whether it is merged or not.
    """
    own = adapter_parameter_names(model)
    attached = attachment(model)
    chosen = own | set(attached.trained if attached is not None else ())
    names = [n for n, p in model.named_parameters() if p.requires_grad or n in chosen]
    names += _trained_buffers(model, set(names) - own)
    names = [name for name in names if name not in own]
    names += adapter_state(adapters(model))
    state = model.state_dict()
    return {name: state[name] for name in names}


def trained_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return copies of ``trained_state`` on the CPU."""
    state = trained_state(model)
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}


def _trained_buffers(model: nn.Module, trained: set[str]) -> list[str]:
    """Return the persistent buffers of modules whose parameters are all trained."""
    found: dict[str, None] = {}
    for path, module in model.named_modules():
        inside = f"{path}." if path else ""
        parameters = [inside + name for name, _ in module.named_parameters()]
        if parameters and trained.issuperset(parameters):
            kept = module.state_dict(keep_vars=True)
            buffers = [name for name, _ in module.named_buffers() if name in kept]
            found.update(dict.fromkeys(inside + name for name in buffers))
    return list(found)

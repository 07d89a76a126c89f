# SPDX-License-Identifier: Apache-2.0
"""Autocast is decided once, in the public function; below it every cast is explicit."""

import contextlib

import torch

# For graphs: torch 2.11 cannot trace is_autocast_available.
_KNOWN = frozenset(filter(torch.amp.is_autocast_available, "cpu cuda xpu mps hpu mtia".split()))


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype autocast asks for on this device, or None if it is off or unknown."""
    if torch.compiler.is_compiling():
        available = device_type in _KNOWN
    else:
        available = torch.amp.is_autocast_available(device_type)
    if available and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


def without_autocast(device_type: str):
    """A context in which autocast casts no arguments."""
    if autocast_dtype(device_type) is None:
        return contextlib.nullcontext()
    return torch.autocast(device_type, enabled=False)


def autocast_input(x: torch.Tensor) -> torch.Tensor:
    """x as a linear layer would take it: in the autocast dtype if autocast is on."""
    dtype = autocast_dtype(x.device.type)
    return x if dtype is None or x.dtype == torch.float64 else x.to(dtype)

# SPDX-License-Identifier: Apache-2.0
"""Operators whose body is Python: registered with torch, and found again by the counters.

A dispatch mode sees such an operator as one call. The counters (samfast.counters) look its body up
here, run it and see what it launches.
"""

import torch

IMPLEMENTATIONS: dict[str, callable] = {}


def implement(name: str):
    """Register a function as the body of ``name`` on every device, below autograd."""

    def register(function):
        torch.library.impl(name, "CompositeExplicitAutograd")(function)
        IMPLEMENTATIONS[name] = function
        return function

    return register

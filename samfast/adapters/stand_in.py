# SPDX-License-Identifier: Apache-2.0
"""Replace a module by one of another class that holds the same contents."""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.utils import parametrize

Module = TypeVar("Module", bound=nn.Module)
_CHECKPOINTING = "transformers.modeling_layers"


def standing_in(kind: type[Module], module: nn.Module) -> Module:
    """Build a ``kind`` with the Parameters, buffers, submodules, hooks and options of ``module``.

    Later registrations and replacements affect only one of the two. ``kind`` must subclass the
    module's class and add nothing that its __init__ would create.
    """
    new = kind.__new__(kind)
    for name, value in vars(module).items():
        new.__dict__[name] = value.copy() if isinstance(value, (dict, set)) else value
    return new


def kind_of(module: nn.Module) -> str:
    """Name the class and its package, as a phrase."""
    kind = type(module)
    return f"{whose(kind.__module__.partition('.')[0])} {kind.__name__}"


def bare_kind(module: nn.Module) -> type[nn.Module]:
    """Return the module's class; the owner's, if torch made a parametrized one of that."""
    kind = type(module)
    return kind.__bases__[0] if parametrize.is_parametrized(module) else kind


def whose(package: str) -> str:
    """Return the possessive form of a name."""
    return f"{package}'" if package.endswith("s") else f"{package}'s"


def altered(module: nn.Module) -> bool:
    """True if a call does more than the class says: hooks, or a patched forward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def runs_as(module: nn.Module, kind: type[nn.Module]) -> bool:
    """True if the class is ``kind``, or one that a wrapper such as FSDP2 derived from it."""
    return type(module) is kind or (
        isinstance(module, kind) and bare(type(module).forward) is kind.forward
    )


def bare(forward: Any) -> Any:
    """Return the forward without the wrapper that transformers adds for checkpointing."""
    while getattr(forward, "__globals__", {}).get("__name__") == _CHECKPOINTING:
        forward = forward.__wrapped__
    return forward


class _LeftAlone(threading.local):
    modules: tuple[int, ...] = ()


_left_alone = _LeftAlone()


@contextlib.contextmanager
def leaving_alone(module: nn.Module) -> Iterator[None]:
    """Make the module run its stock forward, in this thread only."""
    before = _left_alone.modules
    _left_alone.modules = (*before, id(module))
    try:
        yield
    finally:
        _left_alone.modules = before


def left_alone(module: nn.Module) -> bool:
    """True while the module runs inside ``leaving_alone``."""
    return not torch.compiler.is_compiling() and id(module) in _left_alone.modules

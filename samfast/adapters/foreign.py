# SPDX-License-Identifier: Apache-2.0
"""Types of modules whose parts are looked up by name.

torch types such a part as Tensor or Module, so that no use of it would pass a type check.
"""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

# A model or layer that another library, or a copy of one, builds.
Foreign: TypeAlias = Any
Model = TypeVar("Model", bound="nn.Module")  # changed in place and returned
Function = TypeVar("Function", bound=Callable[..., Any])

if TYPE_CHECKING:
    from torch import nn

    class ForeignModule(nn.Module):
        """Base of a mixin that precedes another library's class; it does nothing at run time."""

        def __getattr__(self, name: str) -> Any: ...
        def forward(self, *args: Any, **kwargs: Any) -> Any: ...

    def cache(function: Function) -> Function:
        """functools.cache, typed so that it accepts module classes."""
else:
    ForeignModule = object
    cache = functools.cache

# SPDX-License-Identifier: Apache-2.0
"""The types of modules whose parts are looked up by name.

torch says of a part that it is a Tensor or a Module, so that no use of it would pass a type check.
"""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

# A model or a layer as another library builds it, or as a copy of that library does.
Foreign: TypeAlias = Any
Model = TypeVar("Model", bound="nn.Module")  # what a function changes in place and returns
Function = TypeVar("Function", bound=Callable[..., Any])

if TYPE_CHECKING:
    from torch import nn

    class ForeignModule(nn.Module):
        """Base of a mixin that stands before another library's class; of no effect at run time."""

        def __getattr__(self, name: str) -> Any: ...
        def forward(self, *args: Any, **kwargs: Any) -> Any: ...

    def cache(function: Function) -> Function:
        """functools.cache, whose own type takes no classes of modules."""
else:
    ForeignModule = object
    cache = functools.cache

# SPDX-License-Identifier: Apache-2.0
"""Whether the forward of a class computes a formula: found out by running it.

``difference`` runs a shell, a module without the user's parameters, hooks and children, and
compares result and gradients. ``CodeOf`` tells one state of a class from another, so that the
answer can be kept until something changes.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from types import CodeType, FunctionType
from typing import TypeVar

import torch
from torch import Tensor, nn

# Sums of thousands of products in float32 agree to about 2**-20 of their size.
LARGEST_DIFFERENCE = 2.0**-14
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype)
_MACHINERY = {*vars(nn.Module()), "forward", "_is_replica", "_former_parameters"}

Tensors = Mapping[str, Tensor]
Result = TypeVar("Result")


def attributes(module: nn.Module) -> dict[str, object]:
    """What the module holds beyond what every nn.Module has, by name."""
    found = {name: value for name, value in vars(module).items() if name not in _MACHINERY}
    for name in replicated(module):
        del found[name]
    return found


def replicated(module: nn.Module) -> list[str]:
    """The parameters that a replica of DataParallel holds as plain tensors."""
    if not getattr(module, "_is_replica", False):
        return []
    return [n for n, v in vars(module).items() if isinstance(v, Tensor) and n not in _MACHINERY]


def shell(kind: type[nn.Module], values: Mapping[str, object], **parts) -> nn.Module:
    """A module of a class, made without its __init__: attributes, children and parameters given."""
    module = kind.__new__(kind)
    nn.Module.__init__(module)
    module.__dict__.update(values)
    for name, part in parts.items():
        if isinstance(part, nn.Module):
            module._modules[name] = part
        else:
            module._parameters[name] = part
    return module


def frozen(value) -> object:
    """A hashable twin of numbers, texts, and lists and dictionaries of them; else None.

    Equal only where type and value are.
    """
    if isinstance(value, _PLAIN):
        return type(value), repr(value)
    if isinstance(value, (list, tuple)):
        parts = [frozen(v) for v in value]
    elif isinstance(value, dict):
        parts = [frozen(v) for pair in value.items() for v in pair]
    else:
        return None
    return None if None in parts else (type(value), *parts)


def code_of(function, owner: type | None = None, watched: list | None = None) -> tuple:
    """What a function does, as far as it can be told: its code and that of what it calls.

    Functions, numbers and texts among its globals and in its closure count, and, where it is a
    method, those on its class ``owner``. Another value once one of them is replaced. Where each was
    found is added to ``watched``, with what was there.
    """
    return _code(function, owner, [] if watched is None else watched, frozenset())


def _code(function, owner, watched, seen) -> tuple:
    if not isinstance(function, FunctionType) or function.__code__ in seen:
        return (getattr(function, "__code__", function),)
    watched.append((getattr, function, "__code__", function.__code__))
    found, seen = [function.__code__, frozen(function.__defaults__)], seen | {function.__code__}
    for read, holder, name in _reached(function, owner):
        value = read(holder, name, None)
        watched.append((read, holder, name, value))
        if isinstance(value, FunctionType):
            found.append(_code(value, owner, watched, seen))
        elif isinstance(value, property):
            found.append(_code(value.fget, owner, watched, seen))
        else:
            found.append(frozen(value))
    return tuple(found)


class CodeOf:
    """``code_of`` the forward of a class, computed again only once something was replaced."""

    def __init__(self, kind: type[nn.Module]):
        self.kind, self.watched, self.code = kind, [(getattr, kind, "forward", None)], ()

    def __call__(self) -> tuple:
        if any(read(holder, name, None) is not value for read, holder, name, value in self.watched):
            forward = self.kind.forward
            self.watched = [(getattr, self.kind, "forward", forward)]
            self.code = code_of(forward, self.kind, self.watched)
        return self.code


def words(function, owner: type | None = None, seen: frozenset = frozenset()) -> set[str]:
    """Every name and text in a function and in what it calls."""
    if not isinstance(function, FunctionType) or function.__code__ in seen:
        return set()
    names, texts = _words(function.__code__)
    found, seen = {*names, *texts}, seen | {function.__code__}
    for read, holder, name in _reached(function, owner):
        value = read(holder, name, None)
        found |= words(value.fget if isinstance(value, property) else value, owner, seen)
    return found


@functools.cache
def _words(code: CodeType) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names and texts in a function, and in the functions inside it."""
    names, texts = list(code.co_names), [c for c in code.co_consts if isinstance(c, str)]
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            more = _words(inner)
            names += more[0]
            texts += more[1]
    return tuple(dict.fromkeys(names)), tuple(texts)


def _reached(function, owner: type | None) -> Iterator[tuple]:
    """Where what a function's names may stand for is found: how it is read, where, and its name."""
    bases = [] if owner is None else owner.__mro__[: owner.__mro__.index(nn.Module)]
    for name in _words(function.__code__)[0]:
        if name in function.__globals__:
            yield dict.get, function.__globals__, name
        for base in bases:
            if name in vars(base):
                yield _own, base, name
                break
    for cell in function.__closure__ or ():
        yield _content, cell, ""


def _own(kind: type, name: str, default) -> object:
    """What a class itself holds by a name, not bound to anything."""
    return vars(kind).get(name, default)


def _content(cell, name: str, default) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # it is empty
        return default


def difference(
    module: nn.Module, formula: Callable[[Tensor, Tensors], Tensor], x: Tensor
) -> str | None:
    """What differs between a shell and the formula, in train or eval mode; None if nothing does.

    formula: takes x and the shell's parameters by name
    x: float32 on a CPU, as the parameters are

    Compares the result and the gradients of x and of every parameter, in 2-norm. To be called
    ``apart``.
    """
    parameters = {name: p.detach().requires_grad_() for name, p in module.named_parameters()}
    x, dy = x.detach().requires_grad_(), _like(x)
    exact = _gradients(formula(x, parameters), dy, {"x": x, **parameters})
    before = [frozen(attributes(m)) for m in module.modules()]
    for training in (True, False):
        for part in module.modules():
            part.training = training
        problem = _difference(module, x, dy, exact)
        if problem is None and [frozen(attributes(m)) for m in module.modules()] != before:
            problem = "its forward changes an attribute"
        if problem is not None:
            return f"{problem} in {'train' if training else 'eval'} mode"
    return None


def _difference(module, x, dy, exact) -> str | None:
    own = dict(module.named_parameters())
    leaves = {"x": x.detach().requires_grad_(), **own}
    try:
        y = module(leaves["x"])
        if not isinstance(y, Tensor) or y.shape != exact["output"].shape:
            return f"its forward gives {_described(y)}"
        foreign = _leaves(y) - {id(t) for t in leaves.values()}
        made = _gradients(y, dy, leaves)
    except Exception as error:  # whatever the user's code raises
        return f"its forward fails alone: {type(error).__name__}: {str(error)[:100]}"
    if foreign:
        return "its forward trains a tensor that is not its own"
    for name, truth in exact.items():
        off = ((made[name] - truth).norm() / truth.norm().clamp(min=1e-30)).item()
        if not off <= LARGEST_DIFFERENCE:
            what = name if name == "output" else f"gradient of {name}"
            return f"its forward gives another {what} ({100 * off:.2g} % off)"
    return None


def _gradients(y: Tensor, dy: Tensor, leaves: Tensors) -> dict[str, Tensor]:
    if not y.requires_grad:
        return {"output": y, **{name: torch.zeros_like(t) for name, t in leaves.items()}}
    grads = torch.autograd.grad(y, list(leaves.values()), dy, allow_unused=True)
    pairs = zip(leaves.items(), grads, strict=True)
    return {
        "output": y.detach(),
        **{name: torch.zeros_like(t) if grad is None else grad for (name, t), grad in pairs},
    }


def _leaves(y: Tensor) -> set[int]:
    """Identities of the tensors in which a backward from y would accumulate gradients."""
    found, todo, seen = set(), [y.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        todo += [parent for parent, _ in node.next_functions]
    return found


def _described(y) -> str:
    return f"a tensor of shape {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__


def _like(x: Tensor) -> Tensor:
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(1))


def apart(function: Callable[[], Result]) -> Result:
    """What a function gives in a thread of its own, where no mode, hook or context of torch is on.

    Nor do a wider default dtype, bfloat16 products or hooks of all modules reach it; the user's
    random numbers are given back.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_undisturbed, function).result()


def _undisturbed(function):
    dtype, mkldnn = torch.get_default_dtype(), torch._C._get_mkldnn_enabled()
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]), _no_global_hooks():
        torch.set_default_dtype(torch.float32)
        torch._C._set_mkldnn_enabled(False)  # it may have been told to multiply in bfloat16
        torch.set_num_threads(1)  # a second team of threads would stand in the way of the first
        try:
            return function()
        finally:
            torch.set_num_threads(threads)
            torch._C._set_mkldnn_enabled(mkldnn)
            torch.set_default_dtype(dtype)


@contextlib.contextmanager
def _no_global_hooks() -> Iterator[None]:
    """Without the hooks that are called for every module there is."""
    names = ("forward_pre_hooks", "forward_hooks", "backward_pre_hooks", "backward_hooks")
    stores = [getattr(torch.nn.modules.module, f"_global_{name}") for name in names]
    kept = [dict(store) for store in stores]
    for store in stores:
        store.clear()
    try:
        yield
    finally:
        for store, hooks in zip(stores, kept, strict=True):
            store.update(hooks)

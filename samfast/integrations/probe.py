# SPDX-License-Identifier: Apache-2.0
"""Run the forward of a class to find out if it computes a formula.

``difference`` runs a shell: a module without the user's parameters, hooks and children. It compares
result and gradients.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor, nn

# Sums of thousands of float32 products agree to about 2**-20 of their size.
LARGEST_DIFFERENCE = 2.0**-14

Tensors = Mapping[str, Tensor]
Result = TypeVar("Result")


def shell(
    kind: type[nn.Module], values: Mapping[str, object], **parts: nn.Module | nn.Parameter
) -> nn.Module:
    """Make a module without its __init__, from given attributes, children and parameters."""
    module = kind.__new__(kind)
    nn.Module.__init__(module)
    module.__dict__.update(values)
    for name, part in parts.items():
        if isinstance(part, nn.Module):
            module._modules[name] = part
        else:
            module._parameters[name] = part
    return module


class Marking(nn.Module):
    """Stands in for a dropout: a fixed factor per feature, which shows its place."""

    def forward(self, z: Tensor) -> Tensor:
        return z * (1.5 + torch.arange(z.shape[-1], dtype=z.dtype).cos())


def difference(
    module: nn.Module,
    formula: Callable[[Tensor, Tensors], Tensor],
    x: Tensor,
    modes: tuple[bool, ...] = (True, False),
    others: bool = False,
) -> str | None:
    """Say what differs between a shell and the formula, in train or eval mode; else None.

    formula: takes x and the shell's parameters by name
    x: float32 on a CPU, as the parameters are
    modes: of training in which the shell runs
    others: whether its graph may end in tensors that are not its own

    It compares the result and the gradients of x and of every parameter, in 2-norm. Call it
    ``apart``.
    """
    parameters = {name: p.detach().requires_grad_() for name, p in module.named_parameters()}
    x = x.detach().requires_grad_()
    y = formula(x, parameters)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    exact = _gradients(y, dy, {"x": x, **parameters})
    for training in modes:
        for part in module.modules():
            part.training = training
        problem = _difference(module, x, dy, exact, others)
        if problem is not None:
            return f"{problem} in {'train' if training else 'eval'} mode"
    return None


def deviation(
    module: nn.Module, formula: Callable[[Tensor, Tensors], Tensor], x: Tensor
) -> str | None:
    """Do as ``difference``, for only the result, under no_grad.

    x: (…, features), vectors of any size; the result's vectors are compared one by one
    """
    with torch.no_grad():
        exact, state = formula(x, dict(module.named_parameters())), torch.get_rng_state()
        try:
            off = ((module(x) - exact).norm(dim=-1) / exact.norm(dim=-1)).max().item()
        except Exception as error:  # the user's code may raise anything
            return _failure(error)
        if not torch.equal(torch.get_rng_state(), state):
            return "its forward draws random numbers"
    if off <= LARGEST_DIFFERENCE:
        return None
    return f"its forward gives another output ({100 * off:.2g} % off) at this size, under no_grad"


def where_it_runs(
    module: nn.Module,
    formula: Callable[[Tensor, Tensors], Tensor],
    x: Tensor,
    modes: tuple[bool, ...] = (True, False),
) -> str | None:
    """Do as ``difference``, except that a forward may refuse an x of this shape."""
    try:
        with torch.no_grad():
            module(x)
    except Exception:  # the user's code may raise anything
        return None
    return difference(module, formula, x, modes)


def _difference(
    module: nn.Module, x: Tensor, dy: Tensor, exact: Tensors, others: bool
) -> str | None:
    own = dict(module.named_parameters())
    leaves = {"x": x.detach().requires_grad_(), **own}
    try:
        y = module(leaves["x"])
        if not isinstance(y, Tensor) or y.shape != exact["output"].shape:
            return f"its forward gives {_described(y)}"
        foreign = _leaves(y) - {id(t) for t in leaves.values()}
        made = _gradients(y, dy, leaves)
    except Exception as error:  # the user's code may raise anything
        return _failure(error)
    if foreign and not others:
        return "its forward trains a tensor that is not its own"
    for name, truth in exact.items():
        off = ((made[name] - truth).norm() / truth.norm().clamp(min=1e-30)).item()
        if not off <= LARGEST_DIFFERENCE:
            what = name if name == "output" else f"gradient of {name}"
            return f"its forward gives another {what} ({100 * off:.2g} % off)"
    return None


def _failure(error: Exception) -> str:
    return f"its forward fails alone: {type(error).__name__}: {str(error)[:100]}"


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
    """Return the ids of tensors in which a backward from y would accumulate gradients."""
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


def _described(y: object) -> str:
    return f"a tensor of shape {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__


def apart(function: Callable[[], Result]) -> Result:
    """Run a function in a thread of its own, without torch's modes, hooks and contexts.

    Default dtype, bfloat16 products and hooks of all modules do not reach it either. The user's
    random state is restored.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_undisturbed, function).result()


def _undisturbed(function: Callable[[], Result]) -> Result:
    dtype, mkldnn = torch.get_default_dtype(), torch._C._get_mkldnn_enabled()
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]), _no_global_hooks():
        torch.set_default_dtype(torch.float32)
        torch._C._set_mkldnn_enabled(False)  # mkldnn may be set to multiply in bfloat16
        torch.set_num_threads(1)  # a second team of threads would slow the first
        try:
            return function()
        finally:
            torch.set_num_threads(threads)
            torch._C._set_mkldnn_enabled(mkldnn)
            torch.set_default_dtype(dtype)


@contextlib.contextmanager
def _no_global_hooks() -> Iterator[None]:
    """Disable the hooks that torch calls for every module."""
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

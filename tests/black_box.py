# SPDX-License-Identifier: Apache-2.0
"""What every drop-in module must keep, checked from outside against the stock module.

A test builds a ``Subject`` and runs each function of ``CHECKS`` on it. The two modules have the
same state-dict keys; the stock one is plain PyTorch and states the literal method.
"""

import copy
import dataclasses
import pickle
from functools import partial

import torch
from budgets import keep
from torch import nn
from torch.utils.checkpoint import checkpoint

from samfast.kernels._common.budget import Budget


@dataclasses.dataclass
class Subject:
    """A drop-in and its stock module, both float64, with equal parameters, and an input.

    x: (batch, ...) float64   low: narrow dtypes to try   loss of a module: sum(y · dy)
    """

    ours: nn.Module
    stock: nn.Module
    x: torch.Tensor
    low: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16)
    autocast: torch.dtype = torch.bfloat16

    def __post_init__(self):
        ours, stock = self.ours.state_dict(), self.stock.state_dict()
        assert set(ours) == set(stock), set(ours) ^ set(stock)
        self.stock.load_state_dict(ours)
        for name, parameter in self.stock.named_parameters():
            parameter.requires_grad_(self.ours.get_parameter(name).requires_grad)
        generator = torch.Generator().manual_seed(11)
        y = self.stock(self.x)
        self.dy = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.device)

    def module(self, which: str, dtype: torch.dtype) -> nn.Module:
        return copy.deepcopy(getattr(self, which)).to(dtype)

    def run(self, which, dtype, x=None, dy=None, module=None, call=None):
        """{"y", "dx", every trained parameter}: the result and all gradients."""
        module = module or self.module(which, dtype)
        x = self.x.to(dtype) if x is None else x
        x = x.detach().requires_grad_() if x.is_leaf and not x.requires_grad else x
        trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
        y = (module if call is None else call)(x)
        dy = self.dy.to(y.dtype) if dy is None else dy
        grads = torch.autograd.grad(y, [x, *trained.values()], dy, materialize_grads=True)
        return {"y": y.detach(), "dx": grads[0], **dict(zip(trained, grads[1:], strict=True))}


def _budget(subject, dtype, run=None):
    """What the stock module's results leave; run(subject, which, dtype): all of a module's."""
    run = run or Subject.run
    stock, exact = (partial(run, subject, "stock", kind) for kind in (dtype, torch.float64))
    return Budget(stock, exact, dtype)


def _compare(ours, budget):
    assert set(ours) == set(budget.exact), f"gradients of {set(ours) ^ set(budget.exact)}"
    keep(budget, ours)


def _same_dtypes(ours, stock):
    assert {n: v.dtype for n, v in ours.items()} == {n: v.dtype for n, v in stock.items()}


def _equal(first, second):
    for name, value in first.items():
        assert torch.equal(value, second[name]), f"{name} differs in its bits"


def error_budget(subject):
    """Result and every gradient, in float32 and the narrow dtypes."""
    for dtype in (torch.float32, *subject.low):
        ours, budget = subject.run("ours", dtype), _budget(subject, dtype)
        _same_dtypes(ours, budget.stock)
        _compare(ours, budget)


def autocast(subject):
    """Under autocast: as accurate as the stock module, the same dtypes."""

    def run(subject, which, dtype):
        if dtype == torch.float64:
            return subject.run(which, dtype)
        module, x = subject.module(which, torch.float32), subject.x.float().requires_grad_()
        with torch.autocast(x.device.type, subject.autocast):
            y = module(x)
        names = [n for n, p in module.named_parameters() if p.requires_grad]
        leaves = [module.get_parameter(n) for n in names]
        grads = torch.autograd.grad(y, [x, *leaves], subject.dy.to(y.dtype))
        return dict(zip(["y", "dx", *names], [y, *grads], strict=True))

    stock, exact = (partial(run, subject, "stock", t) for t in (torch.float32, torch.float64))
    ours, budget = run(subject, "ours", torch.float32), Budget(stock, exact, subject.autocast)
    _same_dtypes(ours, budget.stock)
    _compare(ours, budget)


def _layouts(t):
    """The same values as slices with NaN in the gaps, permuted, and at an odd storage offset."""
    gaps = t.new_full((*t.shape[:-1], t.shape[-1] + 6), float("nan"))
    gaps[..., 2:-4] = t
    permuted = t.movedim(-1, 0).contiguous().movedim(0, -1)
    odd = t.new_full((t.numel() + 1,), float("nan"))
    odd[1:] = t.flatten()
    return {"gaps": gaps[..., 2:-4], "permuted": permuted, "odd": odd[1:].view(t.shape)}


def odd_inputs(subject):
    """Inputs and incoming gradients of any layout give the numbers of contiguous ones."""
    for dtype in (torch.float32, *subject.low):
        budget = _budget(subject, dtype)
        for name, x in _layouts(subject.x.to(dtype)).items():
            leaf = x.detach().requires_grad_()
            assert leaf.stride() == x.stride(), name
            _compare(subject.run("ours", dtype, x=leaf), budget)
        for dy in _layouts(subject.dy.to(dtype)).values():
            _compare(subject.run("ours", dtype, dy=dy), budget)


def expanded(subject):
    """Stride zero, in the input and in the incoming gradient."""

    def once(t, dtype):  # a cast would make it dense
        return t.to(dtype)[:1].expand_as(t)

    def ones(t, dtype):
        return t.new_ones((), dtype=dtype).expand_as(t)

    def same(t, dtype):
        return t.to(dtype)

    for dtype in (torch.float32, *subject.low):
        for of_x, of_dy in ((once, same), (same, once), (same, ones)):

            def run(subject, which, kind, of_x=of_x, of_dy=of_dy):
                return subject.run(which, kind, x=of_x(subject.x, kind), dy=of_dy(subject.dy, kind))

            _compare(run(subject, "ours", dtype), _budget(subject, dtype, run))


def evaluation(subject):
    """eval() as the stock module's."""

    def run(subject, which, dtype):
        return subject.run(which, dtype, module=subject.module(which, dtype).eval())

    ours = run(subject, "ours", torch.float32)
    _compare(ours, _budget(subject, torch.float32, run))


def nothing_mutated(subject):
    """Inputs, incoming gradients, parameters and buffers keep their bits and their version."""
    module = subject.module("ours", torch.float32)
    x, dy = subject.x.float().requires_grad_(), subject.dy.float()
    everything = {
        "x": x,
        "dy": dy,
        **dict(module.named_parameters()),
        **dict(module.named_buffers()),
    }
    before = {name: (t.detach().clone(), t._version) for name, t in everything.items()}
    subject.run("ours", torch.float32, x=x, dy=dy, module=module)
    for name, t in everything.items():
        assert torch.equal(t, before[name][0]), f"{name} was written to"
        assert t._version == before[name][1], f"{name} was written to in place"


def backward_twice(subject):
    """With the graph retained the second backward gives the same bits; without it, an error."""
    module, x = subject.module("ours", torch.float32), subject.x.float().requires_grad_()
    leaves = [x, *(p for p in module.parameters() if p.requires_grad)]
    y, dy = module(x), subject.dy.float()
    first = torch.autograd.grad(y, leaves, dy, retain_graph=True)
    second = torch.autograd.grad(y, leaves, dy)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    try:
        torch.autograd.grad(y, leaves, dy)
    except RuntimeError:
        return
    raise AssertionError("a third backward through a freed graph did not raise")


def bits_repeat(subject):
    """Three runs, and three under deterministic mode, which poisons uninitialised memory."""
    first = subject.run("ours", torch.float32)
    before = torch.are_deterministic_algorithms_enabled()
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        try:
            for _ in range(3):
                _equal(first, subject.run("ours", torch.float32))
        finally:
            torch.use_deterministic_algorithms(before)


def checkpointing(subject):
    """Both modes give the bits of a run without checkpoints."""
    expected = subject.run("ours", torch.float32)
    for reentrant in (False, True):
        module = subject.module("ours", torch.float32)
        x = subject.x.float().requires_grad_()
        y = checkpoint(module, x, use_reentrant=reentrant)
        y.backward(subject.dy.float())
        actual = {n: p.grad for n, p in module.named_parameters() if p.requires_grad}
        _equal(expected, {"y": y.detach(), "dx": x.grad, **actual})


def accumulation(subject):
    """Two backwards add up to twice the gradient."""
    once = subject.run("ours", torch.float32)
    module = subject.module("ours", torch.float32)
    for _ in range(2):  # with x's gradient, as once: kernels may differ by what is wanted
        module(subject.x.float().requires_grad_()).backward(subject.dy.float())
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter.grad, 2 * once[name]), name


def without_gradients(subject):
    """no_grad and inference mode give the same bits and no graph."""
    module, x = subject.module("ours", torch.float32), subject.x.float()
    expected = module(x).detach()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            y = module(x)
        assert not y.requires_grad
        assert torch.equal(y, expected)


def frozen(subject):
    """Frozen parameters get no gradient; with everything frozen, x still does, unless it asks
    for none."""
    module, x = subject.module("ours", torch.float32), subject.x.float().requires_grad_()
    module(x).backward(subject.dy.float())
    for name, parameter in module.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    module, x = subject.module("ours", torch.float32), subject.x.float().requires_grad_()
    module.requires_grad_(False)
    module(x).backward(subject.dy.float())
    assert all(p.grad is None for p in module.parameters())
    keep(_budget(subject, torch.float32), {"dx": x.grad}, some=True)
    assert not module(subject.x.float()).requires_grad


def input_without_gradient(subject):
    """Parameters train when x asks for no gradient."""
    module = subject.module("ours", torch.float32)
    module(subject.x.float()).backward(subject.dy.float())
    grads = {name: p.grad for name, p in module.named_parameters() if p.requires_grad}
    budget = _budget(subject, torch.float32)
    assert set(grads) == set(budget.exact) - {"y", "dx"}
    keep(budget, grads, some=True)


def infinities(subject):
    """NaN and Inf in one sample of x or dy reach exactly what they reach in the stock module."""
    for bad in (float("nan"), float("inf")):
        for where in ("x", "dy"):
            tensors = {"x": subject.x.float().clone(), "dy": subject.dy.float().clone()}
            tensors[where].view(-1)[-1] = bad
            ours = subject.run("ours", torch.float32, **tensors)
            stock = subject.run("stock", torch.float32, **tensors)
            for name, value in ours.items():
                assert torch.equal(value.isfinite(), stock[name].isfinite()), (bad, where, name)


def copies(subject):
    """deepcopy, after a forward too, pickle, and a state-dict round trip give equal modules."""
    expected = subject.run("ours", torch.float32)
    module = subject.module("ours", torch.float32)
    y = module(subject.x.float().requires_grad_())
    twins = [copy.deepcopy(module), pickle.loads(pickle.dumps(module))]
    loaded = subject.module("ours", torch.float32)
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.fill_(0.5)
    loaded.load_state_dict(module.state_dict(), strict=True)
    for twin in (*twins, loaded):
        _equal(expected, subject.run("ours", torch.float32, module=twin))
    del y


def written_in_place(subject):
    """The result may be written in place: before a backward through it, and, if the stock
    module's may, where it came without a graph and gets one by what is written."""
    expected = subject.run("ours", torch.float32)
    module, x = subject.module("ours", torch.float32), subject.x.float().requires_grad_()
    names = [n for n, p in module.named_parameters() if p.requires_grad]
    leaves = [x, *(module.get_parameter(n) for n in names)]
    y = module(x)
    y.add_(1)
    grads = torch.autograd.grad(y, leaves, subject.dy.float())
    actual = dict(zip(["y", "dx", *names], [y.detach(), *grads], strict=True))
    _equal({**expected, "y": expected["y"] + 1}, actual)
    for which in ("stock", "ours"):
        with torch.no_grad():
            y = subject.module(which, torch.float32)(x)
        shift = torch.zeros_like(y).requires_grad_()
        try:
            y += shift
        except RuntimeError:  # such as of a linear layer's on maps, which is a view
            assert which == "stock", "what the stock module's result takes is refused"
            return
        torch.autograd.grad(y, shift, subject.dy.float())


def second_derivative(subject):
    """Right, or refused in a sentence: also where the incoming gradient is a constant."""

    for constant in (True, False):

        def run(subject, which, dtype, constant=constant):
            module = subject.module(which, dtype)
            x = subject.x.to(dtype, copy=True).requires_grad_()
            dy = subject.dy.to(dtype, copy=True).requires_grad_(not constant)
            trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
            y = module(x)
            (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
            loss = (y * dy.detach()).sum() + dx.pow(2).sum()
            grads = torch.autograd.grad(loss, [x, *trained.values()])
            return dict(zip(("dx", *trained), grads, strict=True))

        budget = _budget(subject, torch.float32, run)
        assert budget.stock, "the stock module's must work"
        try:
            ours = run(subject, "ours", torch.float32)
        except RuntimeError as error:
            assert "differentiable" in str(error), error
        else:
            _compare(ours, budget)


def compiled(subject, backend="aot_eager"):
    """torch.compile(fullgraph=True) keeps the numbers."""
    module = subject.module("ours", torch.float32)
    torch._dynamo.reset()  # one forward may be compiled eight times, whichever tests ran before
    call = torch.compile(module, fullgraph=True, backend=backend)
    ours = subject.run("ours", torch.float32, module=module, call=call)
    _compare(ours, _budget(subject, torch.float32))


def generated(subject):
    """So does the code that the usual compiler writes; this takes seconds."""
    compiled(subject, "inductor")


def empty_batch(subject):
    """A batch of no samples: an empty result, gradients of zero."""
    x, dy = subject.x[:0].float(), subject.dy[:0].float()
    for gradient in (dy, dy.new_ones(()).expand_as(dy)):
        ours = subject.run("ours", torch.float32, x=x, dy=gradient)
        assert ours["y"].shape == dy.shape
        for name, value in ours.items():
            assert not value.any(), name


COMPILED = (compiled, generated)
CHECKS = (
    error_budget,
    autocast,
    odd_inputs,
    expanded,
    evaluation,
    nothing_mutated,
    backward_twice,
    bits_repeat,
    checkpointing,
    accumulation,
    without_gradients,
    frozen,
    input_without_gradient,
    infinities,
    copies,
    written_in_place,
    second_derivative,
    *COMPILED,
    empty_batch,
)

# SPDX-License-Identifier: Apache-2.0
"""What holds for every operator: its fakes, compilation, gradients, memory and what it keeps.

A folder's cases.py says in OPERATIONS which operators it tests, and in FINITE on what their
gradients are compared with finite differences.
"""

import gc
from functools import partial

import pytest
import torch
from budgets import all_within_budget, keep
from draws import DEVICE
from layouts import odd_layouts
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import checkpoint

from samfast.counters import count, saved_bytes
from samfast.kernels._common.budget import Budget

from .alike import assert_alike
from .operation import PublicCalls, calls, few_subsets, gradients_for, of_wanted, subsets
from .registry import FINITE, OPERATIONS, OTHERS, cases

INNER_CHECKS = ("test_schema", "test_faketensor")
INNER = ("", "_forward", "_backward")  # an operator without a forward runs itself
tensors_in = partial(tree_map_only, torch.Tensor)


@pytest.fixture(autouse=True)
def skipped_where_it_does_not_run(request):
    values = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if "operation" not in values:
        return
    if reason := values["operation"].runnable(values["backend"]):
        pytest.skip(reason)


def test_no_operator_is_left_out():
    """Those with an autograd of their own; a folder's cases.py has to name them."""
    known = torch._C._jit_get_all_schemas()
    names = {s.name.removeprefix("samfast::") for s in known if s.name.startswith("samfast::")}
    outer = {n for n in names if not n.endswith(("_forward", "_backward"))}
    assert {operation.name for operation in OPERATIONS} == outer


@pytest.mark.slow_on_cpu(
    but=[f"{name}-torch" for name in ("lora_linear", "kronecker_factors", "expert_gate")]
)
@cases(("torch",), of=FINITE)
def test_gradients_are_those_of_finite_differences(operation, backend):
    leaves = operation.leaves(torch.float64)
    fast = len(leaves) > 10  # along one direction, not along each
    call = partial(operation.results, backend=backend)
    assert torch.autograd.gradcheck(lambda *t: call(t), leaves, fast_mode=fast)


@pytest.mark.slow_on_cpu(
    "False",
    *OTHERS,
    "adapt_former-torch",
    "cobot_fold-down-torch",
    "hypercomplex_linear-torch",
    "sam_block-balanced-torch",
    "window_relpos_attention-torch",
)
@pytest.mark.parametrize("requires_grad", [True, False])
@cases(("torch",))
def test_opcheck(operation, backend, requires_grad):
    with PublicCalls() as found:
        operation.results(operation.leaves(wanted=None if requires_grad else ()), backend)
    operator, arguments = found.of(operation.name)
    arguments = tensors_in(lambda t: t.detach().requires_grad_(t.requires_grad), arguments)
    torch.library.opcheck(operator, arguments)


@pytest.mark.slow_on_cpu("triton")
@cases()
def test_opcheck_of_the_two_halves(operation, backend):
    found = calls(operation, backend)
    for suffix in INNER:
        if call := found.of(operation.name + suffix):
            operator, arguments = call
            arguments = tensors_in(torch.Tensor.detach, arguments)
            torch.library.opcheck(operator, arguments, test_utils=INNER_CHECKS)


def described(made):
    """Without the strides of dimensions of one element, which mean nothing."""
    return [
        (tuple(t.shape), [d for d, n in zip(t.stride(), t.shape, strict=True) if n > 1], t.dtype)
        for t in tree_leaves(made)
    ]


def dense(t):
    return t


def turned(t):
    """The same numbers with the last two dimensions the other way round in memory."""
    return t if t.dim() < 2 else t.transpose(-1, -2).contiguous().transpose(-1, -2)


def spread(t):
    """Of one number, seen everywhere."""
    return t.flatten()[0].expand(t.shape)


@pytest.mark.slow_on_cpu("expanded")
@pytest.mark.slow_on_cpu(
    "triton", *OTHERS, "adapt_former-torch-expanded", "cobot_fold-down-torch-expanded"
)
@pytest.mark.parametrize(
    ("layout", "incoming"),
    [(dense, dense), (turned, turned), (dense, spread)],
    ids=["dense", "turned", "expanded"],
)
@cases()
def test_fakes_promise_what_is_made(operation, backend, layout, incoming):
    """Shapes, strides and dtypes, whichever gradients are wanted."""
    each = few_subsets(len(operation.leaves()))
    for wanted in each if layout is dense and backend == "torch" else each[:1]:
        found = calls(operation, backend, wanted, layout, incoming)
        for suffix in INNER:
            if not (call := found.of(operation.name + suffix)):
                continue
            operator, arguments = call
            arguments = tensors_in(torch.Tensor.detach, arguments)
            with FakeTensorMode() as mode:
                promised = operator(*tensors_in(mode.from_tensor, arguments))
            assert described(operator(*arguments)) == described(promised), (suffix, wanted)


@pytest.mark.slow_on_cpu(but=["lora_linear-auto"])
@cases(("auto",), of=[operation for operation in OPERATIONS if operation.autocast])
def test_compile_fullgraph_under_autocast(operation, backend):
    test_compile_fullgraph(operation, backend, autocast=True)


@pytest.mark.slow_on_cpu(*OTHERS)
@cases(("auto",))
def test_compile_fullgraph(operation, backend, autocast=False):
    """Forward and backward in one graph, bits as in eager mode."""
    torch._dynamo.reset()  # the sizes of the last case would be symbols here
    call = partial(operation.call, backend=backend)
    results = []
    for which in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        leaves = operation.leaves()
        torch.manual_seed(3)
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
            made = which(leaves)
        given = [g.to(t.dtype) for g, t in zip(gradients_for(made), made, strict=True)]
        results.append([*made, *torch.autograd.grad(made, leaves, given)])
    assert all(torch.equal(e, t) for e, t in zip(*results, strict=True))


@pytest.mark.parametrize("reentrant", [False, True], ids=["hooks", "reentrant"])
@cases(("auto",))
def test_a_checkpoint_gives_the_same_bits(operation, backend, reentrant):
    """The operation is all of it: its own backward starts the recomputation."""
    leaves = operation.leaves()
    full = operation.run(leaves, backend)
    torch.manual_seed(3)
    call = partial(operation.call, backend=backend)
    made = checkpoint(lambda *t: tuple(call(t)), *leaves, use_reentrant=reentrant)
    torch.autograd.backward(made, gradients_for(made))
    for ours, whole in zip([*made, *(t.grad for t in leaves)], full, strict=True):
        assert torch.equal(ours, whole)


@pytest.mark.slow_on_cpu("triton", "adapt_former-auto", "window_relpos_attention-torch")
@cases()
def test_only_the_wanted_gradients_are_made(operation, backend):
    """Whichever are wanted, those that are have the bits they have with all the others."""
    every = operation.leaves()
    full = operation.run(every, backend)
    count = len(full) - len(every)
    some = few_subsets if backend == "triton" else subsets
    for wanted in some(len(every)):
        ours = operation.run(operation.leaves(wanted=wanted), backend)
        for made, whole in zip(
            ours, [*full[:count], *(full[count + i] for i in wanted)], strict=True
        ):
            assert_alike(made, whole, str(wanted))


@pytest.mark.slow_on_cpu(*OTHERS, "window_relpos_attention-torch", "cobot_fold-down-torch")
@cases(("torch",))
def test_a_gradient_that_nobody_wants_costs_nothing(operation, backend):
    """No gradient by itself costs more than all together, and without it they cost less."""
    places = range(len(operation.leaves()))

    def cost(wanted):
        if not wanted:  # there is no backward
            return 0, 0
        leaves = operation.leaves(wanted=wanted)
        made = operation.results(leaves, backend)
        given, asked = gradients_for(made), [leaves[i] for i in wanted]
        options = dict(retain_graph=True, allow_unused=True)
        counts = count(lambda: torch.autograd.grad(made, asked, given, **options))
        return counts.bytes, counts.flops

    full = cost(places)
    apart = [(i,) for i in places] if operation.apart is None else operation.apart
    for some in {*apart, *few_subsets(len(places))[1:]}:
        alone, others = cost(some), cost([i for i in places if i not in some])
        assert alone <= full and others <= full, some
        assert some not in apart or others < full, f"the gradients {some} are made for nobody"


@pytest.mark.slow_on_cpu("triton", "adapt_former-auto")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@cases(of=[operation for operation in OPERATIONS if operation.kept])
def test_saved_bytes(operation, backend, dtype):
    """By what is packed for the backward, and by what stays alive."""
    operation.results(operation.leaves(dtype), backend)  # first calls import and cache
    gc.freeze()  # a count looks through all that is not frozen
    each = few_subsets(len(operation.leaves()))
    for wanted in each if dtype == torch.float32 else each[:1]:
        leaves = operation.leaves(dtype, wanted)
        given, made = operation.kept(leaves, frozenset(wanted))
        saved = saved_bytes(
            lambda leaves=leaves: operation.results(leaves, backend),
            leaves[operation.activations :],
        )
        assert (saved.hooks, saved.living) == (given + made, made), wanted


@pytest.mark.slow_on_cpu("triton")
@cases()
def test_without_gradients_nothing_is_kept(operation, backend):
    """Nor is there a graph; of frozen tensors, under no_grad and in inference mode."""
    frozen = operation.leaves(wanted=())
    operation.results(frozen, backend)  # first calls import and cache
    saved = saved_bytes(lambda: operation.results(frozen, backend), frozen)
    assert (saved.hooks, saved.living) == (0, 0)
    results = [operation.results(frozen, backend)]
    for off in (torch.no_grad, torch.inference_mode):
        with off():
            results.append(operation.results(operation.leaves(), backend))
    for same in zip(operation.results(operation.leaves(), backend), *results, strict=True):
        assert all(t.grad_fn is None and not t.requires_grad for t in same[1:])
        assert all(torch.equal(t, same[0]) for t in same[1:])


class Unused(torch.autograd.Function):
    """Gives its input no gradient at all."""

    @staticmethod
    def forward(ctx, t):
        return t.view_as(t)

    @staticmethod
    def backward(ctx, _):
        return None


@pytest.mark.slow_on_cpu("triton")
@cases()
def test_a_result_that_nobody_used_counts_as_zeros(operation, backend):
    """Its gradient does not come at all: the bits of one of zeros."""
    leaves = operation.leaves()
    results = len(operation.results(leaves, backend))
    for used in {(), *((i,) for i in range(results))}:
        made = operation.results(leaves, backend)
        given = [g if i in used else 0 * g for i, g in enumerate(gradients_for(made))]
        options = dict(allow_unused=True, materialize_grads=True)
        whole = torch.autograd.grad(made, leaves, given, retain_graph=True, **options)
        some = [t if i in used else Unused.apply(t) for i, t in enumerate(made)]
        unpacked = torch.autograd.grad(some, leaves, given, retain_graph=True, **options)
        ways = [unpacked]
        if used:
            which = [made[i] for i in used], leaves, [given[i] for i in used]
            ways.append(torch.autograd.grad(*which, **options))
        for way in ways:
            for ours, zeros in zip(way, whole, strict=True):
                assert torch.equal(ours, zeros), used


def layouts(operation):
    """All tensors, and each by itself, in every odd layout."""
    odd = [list(odd_layouts(t.detach())) for t in operation.leaves()]
    for kind in range(3):
        for which in few_subsets(len(odd)):
            yield (
                kind,
                [
                    of_layout[kind] if i in which else t
                    for i, (of_layout, t) in enumerate(zip(odd, operation.leaves(), strict=True))
                ],
            )


@pytest.mark.slow_on_cpu("triton", "adapt_former-auto", "window_relpos_attention-torch")
@cases()
def test_odd_memory(operation, backend):
    """Of every tensor and of the gradients that come in: as good as dense ones."""
    stock, exact = (
        (lambda dtype=dtype: operation.run(operation.leaves(dtype), "reference"))
        for dtype in (torch.float32, torch.float64)
    )
    budget = Budget(stock, exact, torch.float32)
    given = gradients_for(operation.results(operation.leaves(), backend))
    for kind, tensors in layouts(operation):
        tensors = of_wanted(tensors, None)
        keep(budget, operation.run(tensors, backend, given))
        if len(tensors) == 1 or not tensors[0].is_contiguous():
            odd = [[*odd_layouts(g)][kind] if g.dim() else g for g in given]
            keep(budget, operation.run(tensors, backend, odd))


@pytest.mark.slow_on_cpu("triton", "adapt_former-auto", "window_relpos_attention-torch")
@cases()
def test_expanded_memory(operation, backend):
    """Of every tensor, and of the incoming gradients: as good as dense ones."""
    leaves, given = (
        operation.leaves(),
        gradients_for(operation.results(operation.leaves(), backend)),
    )
    for which in (*few_subsets(len(leaves))[1:], ()):
        tensors = [t.detach()[:1].expand_as(t) if i in which else t for i, t in enumerate(leaves)]
        incoming = given if which else [g.flatten()[0].expand(g.shape) for g in given]

        def run(dtype, tensors=tensors, incoming=incoming):
            dense = [t.detach().to(dtype).contiguous().requires_grad_() for t in tensors]
            return operation.run(dense, "reference", [g.contiguous() for g in incoming])

        ours = operation.run(of_wanted(tensors, None), backend, incoming)
        all_within_budget(
            ours, partial(run, torch.float32), partial(run, torch.float64), torch.float32
        )


@pytest.mark.slow_on_cpu("triton")
@cases()
def test_nothing_is_written_and_bits_repeat(operation, backend):
    """Two backwards of one graph, and calls in deterministic mode, which fills what is new."""
    leaves, saved = operation.leaves(), []

    def pack(t):
        saved.append((t, t.detach().clone(), t._version))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        made = operation.results(leaves, backend)
    incoming = gradients_for(made)
    given = [(t, t.detach().clone(), t._version) for t in (*leaves, *made, *incoming)]
    runs = [torch.autograd.grad(made, leaves, incoming, retain_graph=True) for _ in range(2)]
    runs = [[*made, *grads] for grads in runs]
    torch.use_deterministic_algorithms(True)
    try:
        runs += [operation.run(leaves, backend) for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))
    for t, before, version in (*given, *saved):
        assert torch.equal(t, before) and t._version == version


@pytest.mark.parametrize("incoming", ["constant", "variable"])
@cases(("auto",))
def test_a_second_derivative_is_refused(operation, backend, incoming):
    """Of every gradient, where the incoming ones are constants too."""
    leaves = operation.leaves()
    made = operation.results(leaves, backend)
    given = [g.requires_grad_(incoming == "variable") for g in gradients_for(made)]
    for grad in torch.autograd.grad(made, leaves, given, create_graph=True):
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward(retain_graph=True)


@pytest.mark.slow_on_cpu("triton")
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@cases()
def test_autocast(operation, backend, narrow):
    """Results are narrow or as without it; every gradient has its tensor's dtype."""

    def run(name, dtype=torch.float32, enabled=True):
        leaves = operation.leaves(dtype)
        with torch.autocast(DEVICE.type, narrow, enabled=enabled):
            made = operation.results(leaves, name)
        given = [g.to(t.dtype) for g, t in zip(gradients_for(made), made, strict=True)]
        return [*made, *torch.autograd.grad(made, leaves, given)]

    ours, stock = run(backend), run("reference")
    assert [t.dtype for t in ours] == [t.dtype for t in stock]
    if operation.autocast:
        assert operation.autocast == "products" or ours[0].dtype == narrow
        exact = partial(run, "reference", torch.float64, False)
        all_within_budget(ours, partial(run, "reference"), exact, narrow)
    else:
        assert all(
            torch.equal(a, b) for a, b in zip(ours, run(backend, enabled=False), strict=True)
        )


@pytest.mark.slow_on_cpu("triton")
@cases()
def test_a_backward_inside_autocast_changes_nothing(operation, backend):
    leaves = operation.leaves()
    full = operation.run(leaves, backend)
    made = operation.results(leaves, backend)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        grads = torch.autograd.grad(made, leaves, gradients_for(made))
    assert all(torch.equal(a, b) for a, b in zip((*made, *grads), full, strict=True))


@cases(("auto",))
def test_a_tangent_is_refused(operation, backend):
    """Forward mode has no formula here, and a tangent that is dropped would be a wrong zero."""
    leaves = operation.leaves(wanted=())
    with forward_ad.dual_level():
        plain = operation.results(leaves, backend)  # nothing has a tangent
        assert all(not t.requires_grad for t in plain)
        first = forward_ad.make_dual(leaves[0], torch.ones_like(leaves[0]))
        with pytest.raises(NotImplementedError, match="jvp"):
            operation.results([first, *leaves[1:]], backend)

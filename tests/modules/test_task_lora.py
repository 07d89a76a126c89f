# SPDX-License-Identifier: Apache-2.0
"""TaskLoraLinear: published numbers, tasks of every form, lifetimes of cores, merging, errors."""

import copy
import dataclasses
from pathlib import Path

import pytest
import safetensors.torch
import torch
from budgets import all_within_budget, keep, within_budget
from draws import DEVICE
from literal_task_lora import LiteralTaskLora
from stock_runs import by_reference
from torch import nn
from torch.utils.checkpoint import checkpoint

import samfast
from samfast import backends
from samfast.counters import count, saved_bytes
from samfast.kernels._common.budget import Budget
from samfast.methods.ta_lora.layer import TaskForward
from samfast.modules import LoraLinear, TaskLoraLinear

NAMES = {"core": "td_G", "factor_in": "td_U1", "factor_out": "td_U2", "factor_task": "td_U3"}
FILES = {"ta_lora_qkv": ("q", "k", "v"), "ta_lora_qv": ("q", "v")}
METHOD = samfast.TaLora(tasks=("edges", "parts", "depth"), ranks=(8, 6, 3), dropout=0.0)


def read(name):
    path = Path(__file__).parents[1] / "golden" / f"{name}.safetensors"
    with safetensors.safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name).to(DEVICE) for name in file.keys()}  # noqa: SIM118


def results(tensors, enabled, dtype, together):
    """What the file has, by its names, and the penalty."""
    ranks, tasks = tuple(tensors["core"].shape), len(tensors["factor_task"])
    features, outputs = tensors["weight"].shape[1], tensors["weight"].shape[0]
    linear = nn.Linear(features, outputs, device=DEVICE, dtype=dtype).requires_grad_(False)
    layer = TaskLoraLinear.from_linear(linear, tasks, ranks, 0.5, 0.0, enabled, 1.0)
    state = {name: tensors[key] for key, name in NAMES.items()}
    layer.load_state_dict(state | {name: tensors[name] for name in ("weight", "bias")})
    shared = TaskForward([layer])
    if together:
        shared.open(layer, ())
    found, loss = {"orthogonal_penalty": TaskLoraLinear.joint_loss([layer]).detach()}, 0.0
    for task in (*range(tasks), "all"):
        key = task if task == "all" else f"task{task}"
        samfast.set_task(layer, task)
        x = tensors[f"{key}.x"].to(dtype, copy=True).requires_grad_()
        y = layer(x)
        found[f"{key}.y"], found[f"grad.{key}.x"] = y.detach(), x
        loss = loss + (y * tensors[f"{key}.grad_y"].to(dtype)).sum()
    shared.close(layer, (), None)
    loss.backward()
    found |= {f"grad.{key}": layer.get_parameter(name) for key, name in NAMES.items()}
    return {name: t.grad if name.startswith("grad.") else t for name, t in found.items()}


@pytest.mark.gpu("cuda")
@pytest.mark.slow_on_cpu("triton")
@pytest.mark.parametrize("together", [True, False], ids=["together", "alone"])
@pytest.mark.parametrize("backend", backends.NAMES)
@pytest.mark.parametrize("name", FILES)
def test_golden(name, backend, together, monkeypatch):
    tensors = read(name)
    monkeypatch.setenv("SAMFAST_BACKEND", backend)
    try:
        ours = results(tensors, FILES[name], torch.float32, together)
    except RuntimeError as error:
        assert backend in ("triton", "cuda") and "cannot run" in str(error)
        pytest.skip(str(error))
    stock, exact = (
        by_reference(results, tensors, FILES[name], dtype, together)
        for dtype in (torch.float32, torch.float64)
    )
    budget = Budget(stock, exact, torch.float32)
    given = {key for key in tensors if key.endswith(".y") or key.startswith("grad.")}
    given.add("orthogonal_penalty")
    assert given == set(ours)
    keep(budget, {key: tensors[key] for key in given})
    keep(budget, ours)


def test_as_many_parameters_as_published():
    linear = nn.Linear(1024, 3072, device="meta")
    layers = samfast.TaLora(tasks=3).build({f"{i}.qkv": linear for i in range(24)})
    counts = [sum(p.numel() for _, p in m.adapter_parameters()) for m in layers.values()]
    assert counts[0] == 135_180 and sum(counts) == 3_244_320


@pytest.fixture
def attached(tiny_sam):
    """A small model with cores that are not zero, and factors that do not drown it."""

    def make(method=METHOD, seed=0):
        sam = samfast.attach(tiny_sam(), method, train=())
        generator = torch.Generator().manual_seed(seed)
        for name, p in samfast.trainable_parameters(sam):
            p.data.copy_(0.3 * torch.randn(p.shape, generator=generator))
            assert "td_" in name
        return sam

    return make


@pytest.fixture
def images():
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def step(encoder, images, task=None):
    """The result and the gradients of a fixed product of it."""
    if task is not None:
        samfast.set_task(encoder, task)
    trained = dict(samfast.trainable_parameters(encoder))
    y = encoder(images)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y)
    grads = torch.autograd.grad(y, list(trained.values()), dy)
    return dict(zip(("y", *trained), (y.detach(), *grads), strict=True))


MIXED = torch.tensor([2, 0, 2])


def test_a_task_for_each_sample_is_that_of_the_sample_alone(attached, images):
    encoder = attached().image_encoder
    wide, same = copy.deepcopy(encoder).double(), images[:1].repeat(3, 1, 1, 1)

    def alone(encoder, batch, numbers):
        with torch.no_grad():
            rows = zip(batch.split(1), numbers, strict=True)
            return torch.cat([samfast.set_task(encoder, task)(row) for row, task in rows])

    for task, batch in ((MIXED, images), ("all", same)):
        numbers = task.tolist() if task is MIXED else range(3)
        with torch.no_grad():
            whole = samfast.set_task(encoder, task)(batch)
        stock = by_reference(alone, encoder, batch, numbers)
        exact = by_reference(alone, wide, batch.double(), numbers)
        within_budget(whole, stock, exact, torch.float32)
        assert not torch.equal(whole[0], whole[1])


def with_literal_layers(encoder):
    """In float64, without the hooks that the layers had."""
    encoder._forward_pre_hooks.clear()
    for block in encoder.blocks:
        layer = block.attn.qkv.double()
        block.attn.qkv = LiteralTaskLora(layer)
        block.attn.qkv.load_state_dict(layer.state_dict())
        block.attn.qkv.weight.requires_grad_(False)
        block.attn.qkv.bias.requires_grad_(False)
    return encoder.double()


@pytest.mark.slow_on_cpu("one", "minimal", "balanced")
@pytest.mark.parametrize("memory", [None, "fast", "balanced", "minimal"])
@pytest.mark.parametrize("task", [1, MIXED], ids=["one", "mixed"])
def test_blocks_and_the_literal_form(attached, images, one_layout, memory, task):
    """Whole, or in parts where memory is None, as good as with the update's weight formed."""
    sam = samfast.set_task(attached(), task)
    one_layout(sam.image_encoder)
    literal = with_literal_layers(copy.deepcopy(sam.image_encoder))
    narrow = copy.deepcopy(literal).float()
    if memory is not None:
        samfast.fuse(sam, memory=memory)
        assert set(samfast.report(sam).blocks.values()) == {"fused"}
    stock, exact = (lambda: step(narrow, images)), (lambda: step(literal, images.double()))
    all_within_budget(step(sam.image_encoder, images), stock, exact, torch.float32)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_blocks(attached, images, reentrant):
    encoder = attached().image_encoder
    plain = step(encoder, images, MIXED)
    for block in encoder.blocks:
        forward = block.forward
        block.forward = lambda x, f=forward: checkpoint(f, x, use_reentrant=reentrant)
    trained = dict(samfast.trainable_parameters(encoder))
    y = encoder(images.requires_grad_())
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    y.backward(dy)
    assert torch.equal(plain["y"], y)
    assert all(torch.equal(plain[name], p.grad) for name, p in trained.items())


@pytest.mark.slow_on_cpu
def test_compiled_whole(attached, images):
    encoder = attached().image_encoder
    plain = step(encoder, images, MIXED)
    compiled = torch.compile(encoder, backend="aot_eager", fullgraph=True)
    found = {n.removeprefix("_orig_mod."): t for n, t in step(compiled, images, MIXED).items()}
    assert all(torch.equal(plain[name], found[name]) for name in plain)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_runs_again_with_the_tasks_of_its_forward(reentrant):
    """Whatever is set, or predicted, in between; or it says that it cannot know them."""
    linear = nn.Linear(16, 48).requires_grad_(False)
    layer = TaskLoraLinear.from_linear(linear, 3, (4, 3, 2), dropout=0.0)
    nn.init.normal_(layer.td_G)
    x = torch.randn(2, 5, 16).requires_grad_()
    trained = [p for _, p in layer.adapter_parameters()]

    def forward(task):
        samfast.set_task(layer, task)
        return checkpoint(layer, x, use_reentrant=reentrant).square().sum()

    def gradients(loss):
        layer.zero_grad()
        loss.backward()
        return [p.grad.clone() for p in trained]

    expected = {}
    for task in (0, 1):
        samfast.set_task(layer, task)
        expected[task] = gradients(layer(x).square().sum())
        for _ in range(2):  # step after step, with other tasks
            layer.again = True
            assert all(map(torch.equal, gradients(forward(task)), expected[task]))
    loss = forward(0)
    layer.eval()
    with torch.no_grad():
        samfast.set_task(layer, 1)
        layer(x)
    layer.train()
    assert all(map(torch.equal, gradients(loss), expected[0]))
    with pytest.raises(RuntimeError, match="other tasks were set and ran since its forward"):
        gradients(forward(0) + forward(1))


def test_a_checkpoint_around_a_whole_block_has_the_tasks_of_its_forward(attached, images):
    encoder = samfast.fuse(attached()).image_encoder
    trained = [p for _, p in samfast.trainable_parameters(encoder)]
    samfast.set_task(encoder, 0)
    expected = torch.autograd.grad(encoder(images).square().sum(), trained)
    first = encoder.blocks[0]
    first.forward = lambda x, f=first.forward: checkpoint(f, x, use_reentrant=False)
    loss = encoder(images).square().sum()
    with torch.no_grad():
        samfast.set_task(encoder.eval(), 1)
        encoder(images)
    found = torch.autograd.grad(loss, trained)
    assert all(map(torch.equal, found, expected))


def test_no_weight_of_an_update_is_ever_made(tiny_sam, images):
    """Of all tasks in a step of whole blocks: no tensor is as large as the updates of one layer,
    operators looked into."""
    sizes = {}
    for literal in (False, True):
        encoder = samfast.attach(tiny_sam(), METHOD, train=()).image_encoder
        qkv = encoder.blocks[0].attn.qkv
        trained = [p for _, p in samfast.trainable_parameters(encoder)]
        samfast.set_task(encoder, "all")
        if literal:
            encoder.blocks[0].attn.qkv = LiteralTaskLora(qkv.double()).requires_grad_(False).float()
        else:
            samfast.fuse(encoder)

        def run(encoder=encoder, trained=trained):
            torch.autograd.grad(encoder(images).sum(), trained, allow_unused=True)

        sizes[literal] = count(run).largest
    updates = 3 * qkv.out_features * qkv.in_features * 4
    assert sizes[False] < updates <= sizes[True]


@pytest.mark.slow_on_cpu
def test_launches_beyond_plain_lora(monkeypatch):
    """Two each way in a layer, five in a step, whatever the number of layers; no host sync."""
    if (reason := backends.triton_missing(DEVICE)) is not None:
        pytest.skip(reason)
    monkeypatch.setenv("SAMFAST_BACKEND", "triton")
    linear = nn.Linear(16, 48, device=DEVICE).requires_grad_(False)
    layers = [TaskLoraLinear.from_linear(linear, 3, (8, 6, 2), dropout=0.0) for _ in range(3)]
    samfast.set_task(nn.ModuleList(layers), "all")
    shared, x = TaskForward(layers), torch.randn(3, 16, 16, device=DEVICE)
    lora = LoraLinear.from_linear(linear, 8)

    def run(layers):
        y = x.requires_grad_()
        trained = [p for layer in layers for _, p in layer.adapter_parameters()]
        outs = [layer(y) for layer in layers]
        torch.autograd.grad(outs, trained, [torch.ones_like(out) for out in outs])

    def ours():
        shared.open(layers[0], ())
        run(layers)
        shared.close(layers[0], (), None)

    plain, counts = count(lambda: run([lora])), count(ours)
    more = {n: k - len(layers) * plain.launches.get(n, 0) for n, k in counts.launches.items()}
    assert {n: k for n, k in more.items() if k} == {
        "product_kernel": len(layers),
        "product_backward_kernel": len(layers),
        "clone": 2 * len(layers),  # the first factor, turned round, each way
        "cat": 2,  # the sources, and again before the backward
        "fold_kernel": 1,
        "stack": 1,
        "fold_backward_kernel": 1,
    }
    assert counts.total_syncs == 0


def test_saved_bytes(tiny_sam, images):
    """What LoRA saves, in each layer the bottleneck before its core, and the cores once."""
    saved = {}
    for method in (samfast.Lora(rank=6), METHOD):
        encoder = samfast.attach(tiny_sam(), method, train=()).image_encoder
        encoder = samfast.fuse(encoder)
        layers = [block.attn.qkv for block in encoder.blocks]
        tasks = []
        if method is METHOD:
            tasks = [samfast.set_task(encoder, 1).blocks[0].attn.qkv.entries]
        known = [images, *encoder.parameters(), *encoder.buffers(), *tasks]
        found = saved_bytes(lambda encoder=encoder: encoder(images), known)
        assert found.hooks == found.living
        saved[method.name] = found.hooks
    tokens = len(images) * (encoder.img_size // 16) ** 2
    each = 4 * (tokens * 8 + 3 * 8 * 6)
    assert saved["ta-lora"] == saved["lora"] + len(layers) * each


def test_merged_equals_unmerged(attached, images, tiny_sam):
    sam = attached().eval()
    for task in ("parts", 2):
        samfast.set_task(sam, task)
        before, wide = (copy.deepcopy(sam).image_encoder for _ in range(2))
        stock, exact = by_reference(before, images), by_reference(wide.double(), images.double())
        unmerged = sam.image_encoder(images)
        samfast.set_task(sam, "all")
        samfast.merge(sam, task=task)
        merged = sam.image_encoder(images)
        assert not any(block.attn.qkv.depends_on_task for block in sam.image_encoder.blocks)
        within_budget(merged, stock, exact, torch.float32)
        with pytest.raises(ValueError, match="has the update of a task merged"):
            samfast.set_task(sam, 0)
        plain = tiny_sam()
        plain.load_state_dict(samfast.merged_state_dict(sam))
        assert torch.equal(plain.image_encoder(images), merged)
        samfast.unmerge(sam)
        assert torch.equal(sam.image_encoder(images), unmerged)


def test_files_and_copies(attached, images, tiny_sam, tmp_path):
    sam = attached()
    samfast.set_task(sam, MIXED)
    y = sam.image_encoder(images)
    assert torch.equal(copy.deepcopy(sam).image_encoder(images), y)
    samfast.save_adapter(sam, tmp_path / "adapter")
    other = samfast.load_adapter(tiny_sam(), tmp_path / "adapter")
    assert torch.equal(samfast.set_task(other, MIXED).image_encoder(images), y)
    samfast.set_task(other, "depth")


def test_a_new_layer_works_for_task_0():
    """Without a set_task."""
    linear = nn.Linear(16, 48).requires_grad_(False)
    for layer in (TaskLoraLinear(16, 48, 3), TaskLoraLinear.from_linear(linear, 3, dropout=0.0)):
        nn.init.normal_(layer.td_G)
        x, layer = torch.randn(2, 5, 16), layer.eval()
        y = layer(x)
        assert torch.equal(samfast.set_task(layer, 0)(x), y)
        assert not torch.equal(samfast.set_task(layer, 1)(x), y)


def test_replicas_of_several_tasks_are_refused():
    """For DataParallel cuts the batch and not the tasks."""
    layer = samfast.set_task(TaskLoraLinear(16, 48, 3), "all")
    layer._is_replica = True
    with pytest.raises(RuntimeError, match="3 tasks are set, but DataParallel does not split"):
        layer(torch.randn(3, 16))
    assert samfast.set_task(layer, 2)(torch.randn(3, 16)).shape == (3, 48)


def penalty(layers, dtype):
    """By its formula: the mean over layers, and the gradients of the second factors."""
    losses, trained = [], []
    for layer in layers:
        core, second, first = (p.to(dtype) for p in (layer.td_G, layer.td_U2, layer.td_U1))
        trained.append(second)
        matrices = [first, second, *core.unbind(2)]
        norms = [(m.t() @ m - torch.eye(m.shape[1])).norm() for m in matrices]
        losses.append(layer.orthogonality * torch.stack(norms).mean())
    loss = torch.stack(losses).mean()
    return [loss, *torch.autograd.grad(loss, trained)]


def test_layers_may_differ_in_what_the_penalty_counts(attached):
    sam = attached(samfast.TaLora(tasks=2, ranks=(4, 3, 2), orthogonality=0.5))
    layers = [block.attn.qkv for block in sam.image_encoder.blocks]
    for layer in layers[1:]:
        layer.orthogonality = 0.0
    stock, exact = ((lambda t=t: penalty(layers, t)[0]) for t in (torch.float32, torch.float64))
    within_budget(samfast.aux_loss(sam), stock, exact, torch.float32, "penalty")


def test_the_penalty_is_the_mean_over_layers(attached):
    sam = attached(samfast.TaLora(tasks=2, ranks=(4, 3, 2), orthogonality=0.5))
    layers = [block.attn.qkv for block in sam.image_encoder.blocks]
    loss = samfast.aux_loss(sam)
    grads = torch.autograd.grad(loss, [layer.td_U2 for layer in layers])
    stock, exact = ((lambda t=t: penalty(layers, t)) for t in (torch.float32, torch.float64))
    all_within_budget([loss, *grads], stock, exact, torch.float32)
    assert samfast.aux_loss(attached()) == 0


def test_moves_and_files_keep_the_tasks(attached, tmp_path):
    sam = samfast.set_task(attached(), "all")
    layer = sam.image_encoder.blocks[0].attn.qkv
    safetensors.torch.save_file(sam.image_encoder.state_dict(), tmp_path / "state.safetensors")
    sam.to("meta").to_empty(device="cpu")
    assert layer.entries.tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="there is no task 'typo'"):
        samfast.merge(samfast.merge(sam, task=0), task="typo")
    assert layer.merged


def test_tasks_are_those_of_the_model(tiny_sam):
    def model():
        names = ("edges", "parts", "depth")
        return samfast.models.MultiTaskSam(tiny_sam(), [samfast.models.Task(n) for n in names])

    for tasks in (2, ("parts", "edges", "depth")):
        with pytest.raises(ValueError, match="pass the same tasks, in the same order"):
            samfast.attach(model(), samfast.TaLora(tasks=tasks), train=())
    outside = samfast.TaLora(tasks=3, target=r"mask_decoders\..*q_proj")
    with pytest.raises(ValueError, match="is outside the image encoder, and only there"):
        samfast.attach(model(), outside, train=())
    samfast.attach(model(), samfast.TaLora(tasks=3), train=())


def test_windows_do_not_hide_a_batch_that_does_not_fit(tiny_sam, images):
    """A layer sees windows, of which three tasks may divide the number."""
    sam = tiny_sam()
    target = r"image_encoder\.blocks\.0\.attn\.qkv"
    samfast.attach(sam, dataclasses.replace(METHOD, target=target), train=())
    samfast.set_task(sam, "all")
    with pytest.raises(ValueError, match="3 tasks are set, which do not divide a batch of 1"):
        sam.image_encoder(images[:1])


def test_bad_input(attached, images):
    sam = attached()
    for task, sentence in (
        ("nose", "there is no task 'nose'; known are edges, parts, depth"),
        (3, "task is 3, but there are tasks 0 to 2"),
        (-1, "task is -1, but there are tasks 0 to 2"),
        (torch.tensor([0, 7]), "task is 7, but there are tasks 0 to 2"),
        (torch.tensor([0.0]), "task is torch.float32 of shape"),
        (True, "task is True; it must be a number"),
    ):
        with pytest.raises(ValueError, match=sentence):
            samfast.set_task(sam, task)
    with pytest.raises(ValueError, match="2 tasks are set, which do not divide a batch of 3"):
        samfast.set_task(sam, torch.tensor([0, 1])).image_encoder(images)
    with pytest.raises(ValueError, match="2 tasks are set; choose one with merge"):
        samfast.merge(sam)
    with pytest.raises(ValueError, match="has no layers with tasks"):
        samfast.set_task(nn.Linear(2, 2), 0)
    for options, sentence in (
        ({"tasks": 0}, "tasks is 0; it must be a whole number"),
        ({"tasks": ("a", "a")}, "tasks names 'a' twice"),
        ({"tasks": ("all",)}, "tasks has 'all', which is not a task name"),
        ({"ranks": (4, 4)}, r"ranks is \(4, 4\); it must be three whole numbers"),
        ({"scaling": 0}, "scaling is 0; it must be a finite number above 0"),
        ({"orthogonality": -1}, "orthogonality is -1; it must be a finite number"),
        ({"enabled": ("q", "x")}, "slices has 'x'"),
    ):
        with pytest.raises(ValueError, match=sentence):
            samfast.TaLora(**options)

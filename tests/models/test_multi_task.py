# SPDX-License-Identifier: Apache-2.0
"""MultiTaskSam: its decoders against separate calls, pairing, encoder runs, adapter folders."""

import copy
import itertools
from functools import partial

import pytest
import torch
from budgets import all_within_budget, keep
from stock_loop import SIDE, stock
from stock_runs import by_reference
from torch import nn

import samfast
from samfast.kernels._common.budget import Budget
from samfast.models import MultiTaskSam, Task, binary_head, build_sam, encode

pytestmark = pytest.mark.usefixtures("seeded")
TASKS = (Task("cells"), Task("classes", "semantic", 3), Task("depth", "regression", 2))
SIZE = (70, SIDE - 3)


def made(sam, tasks=TASKS):
    """A MultiTaskSam whose decoders and embeddings differ, and whose encoder is its own."""
    model = MultiTaskSam(copy.deepcopy(sam), tasks)
    with torch.no_grad():
        for part in (model.mask_decoders, model.no_mask_embeds):
            for parameter in part.parameters():
                parameter.add_(0.03 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def model(small):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return made(small)


def images_of(count):
    return torch.randint(0, 256, (count, 3, *SIZE), dtype=torch.uint8)


def separate_calls(model, sam, images, name):
    """Logits of one task by the stock decoder, image by image and channel by channel.

    sam: whose prompt encoder and resizing are used
    """
    embeddings = encode(model, images)
    rows = model.no_mask_embeds[name]
    grid = sam.prompt_encoder.get_dense_pe().to(rows.dtype)
    results = []
    for embedding in embeddings:
        masks = [
            model.mask_decoders[name](
                image_embeddings=embedding[None],
                image_pe=grid,
                sparse_prompt_embeddings=rows.new_empty(1, 0, 256),
                dense_prompt_embeddings=row.view(1, -1, 1, 1).expand(1, -1, *grid.shape[2:]),
                multimask_output=False,
            )[0]
            for row in rows
        ]
        results.append(sam.postprocess_masks(torch.cat(masks, 1), SIZE, SIZE)[0])
    return torch.stack(results)


def run(model, call, images, weights):
    """Logits and the gradients of every parameter that has one, of all tasks."""
    model.zero_grad()
    logits = call(model, images)
    sum((logits[n] * weights[n].to(logits[n].dtype)).sum() for n in weights).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {**{f"{n}.logits.all": v.detach() for n, v in logits.items()}, **gradients}


def test_logits_in_chunks_are_those_of_separate_decoder_calls(model, small, small_double):
    images, wide = images_of(2), copy.deepcopy(model).double()

    def theirs(own, sam):
        with torch.no_grad():
            return {task.name: separate_calls(own, sam, images, task.name) for task in TASKS}

    with torch.no_grad():
        ours = model(images, decoder_chunk=2)
    stock, exact = partial(theirs, model, small), partial(theirs, wide, small_double)
    all_within_budget(ours, stock, exact, torch.float32)


@pytest.mark.slow_on_cpu
@pytest.mark.parametrize("chunk", [None, 2])
def test_equals_separate_decoder_calls(model, small, small_double, chunk):
    images = images_of(2)
    weights = {task.name: torch.randn(task.channels, *SIZE) for task in TASKS}
    exact_model = copy.deepcopy(model).double()

    def ours(own, images):
        return own(images, decoder_chunk=chunk)

    def theirs(own, images):
        sam = small_double if own is exact_model else small
        return {task.name: separate_calls(own, sam, images, task.name) for task in TASKS}

    def moved(results):  # stock decoders give zeros to the networks of other masks
        return {name: values for name, values in results.items() if values.any()}

    exact = partial(run, exact_model, theirs, images, weights)
    for dtype, own in ((torch.float32, model), (torch.float64, exact_model)):
        budget = Budget(partial(run, own, theirs, images, weights), exact, dtype)
        mine = moved(run(own, ours, images, weights))
        assert set(mine) == set(moved(budget.exact))
        keep(budget, mine, some=True)


def test_starts_as_sam_in_every_channel(small, small_double):
    images = images_of(2)
    with torch.no_grad():
        logits = MultiTaskSam(small, TASKS)(images)
    theirs, exact = (partial(stock, sam, images) for sam in (small, small_double))
    budget = Budget(theirs, exact, torch.float32)
    assert list(logits) == [task.name for task in TASKS]
    for task in TASKS:
        assert logits[task.name].shape == (2, task.channels, *SIZE)
        for channel in logits[task.name].unbind(1):
            keep(budget, [channel[:, None]])


class Separate:
    """What logits of one image and task at a time leave."""

    def __init__(self, model, images):
        self.names = [task.name for task in TASKS]
        wide = copy.deepcopy(model).double()
        stock, exact = (by_reference(self.alone, own, images) for own in (model, wide))
        self.budget = Budget(stock, exact, torch.float32)

    def alone(self, model, images):
        with torch.no_grad():
            rows = [(name, i) for name in self.names for i in range(len(images))]
            return {f"{name}.{i}": model(images[i : i + 1], name)[0] for name, i in rows}

    def check(self, logits, name, rows=None):
        """logits are those of these images, and nearer to them than to another's."""
        rows = range(len(logits)) if rows is None else rows
        found = {f"{name}.{i}": row for i, row in zip(rows, logits, strict=True)}
        keep(self.budget, found, some=True)
        for (own, row), other in itertools.product(found.items(), found):
            errors = [(row - self.budget.exact[key]).norm() for key in (own, other)]
            assert own == other or errors[0] < errors[1], (own, other)


def test_one_task_and_each_image_its_own(model):
    images = images_of(3)
    separate = Separate(model, images)
    with torch.no_grad():
        everything = model(images)
        for i, task in enumerate(TASKS):
            separate.check(everything[task.name], task.name)
            assert torch.equal(model(images, i), everything[task.name])
            assert torch.equal(model(images, task.name), everything[task.name])
        mixed = model(images, ["depth", 0, "depth"])
        assert isinstance(mixed, list) and [len(row) for row in mixed] == [2, 1, 2]
        separate.check(torch.stack(mixed[::2]), "depth", [0, 2])
        separate.check(mixed[1][None], "cells", [1])
        assert torch.equal(model(images, ["depth"] * 3), everything["depth"])
        some = model(images, {"classes": [2, 0], "cells": []})
        assert some["cells"].shape == (0, 1, *SIZE)
        separate.check(some["classes"], "classes", [2, 0])


def test_a_task_without_images_gets_zero_gradients(model):
    own = copy.deepcopy(model)
    logits = own(images_of(2), {"cells": [0, 1], "depth": []})
    (logits["cells"].sum() + logits["depth"].sum()).backward()
    gradient = own.no_mask_embeds["depth"].grad
    assert gradient is not None and not gradient.any()
    assert own.no_mask_embeds["cells"].grad.any()


class TaskScale(nn.Linear):
    """A linear layer with a factor for each task: a small stand-in for adapters of tasks."""

    depends_on_task = True

    def __init__(self, linear, tasks):
        super().__init__(linear.in_features, linear.out_features)
        self.weight, self.bias = linear.weight, linear.bias
        self.scale = nn.Parameter(1 + 0.3 * torch.randn(tasks))
        self.task = None

    def forward(self, x):
        task = self.task
        if task == "all":
            task = torch.arange(len(self.scale))
        elif isinstance(task, int):
            task = torch.tensor([task])
        rows = self.scale[task].repeat_interleave(len(x) // len(task))
        return super().forward(x) * rows.view(-1, *[1] * (x.dim() - 1))


@pytest.fixture
def dependent(small, monkeypatch):
    """A model of four blocks, the third of which depends on the task; counts rows of blocks."""
    sam = copy.deepcopy(small)
    sam.image_encoder.blocks.extend(copy.deepcopy(list(small.image_encoder.blocks)))
    own = made(sam)
    attention = own.image_encoder.blocks[2].attn
    attention.qkv = TaskScale(attention.qkv, len(TASKS))

    def set_task(model, task, repeated=False):
        model.image_encoder.blocks[2].attn.qkv.task = task

    monkeypatch.setattr(samfast, "set_task", set_task, raising=False)
    return own


def rows_of_blocks(model):
    """The list that every block adds the rows of its input to."""
    rows = []
    for block in model.image_encoder.blocks:
        block.register_forward_hook(lambda _, args, out: rows.append(len(args[0])))
    return rows


def test_the_encoder_runs_once_when_nothing_depends_on_the_task(model):
    own = copy.deepcopy(model)
    rows = rows_of_blocks(own)
    own(images_of(2))
    assert rows == [2, 2]
    own(images_of(2), ["cells", "depth"])
    assert rows == [2] * 4


def test_blocks_below_the_first_adapter_are_shared(dependent):
    rows = rows_of_blocks(dependent)
    dependent(images_of(2))
    assert rows == [2, 2, 6, 6]
    rows.clear()
    dependent(images_of(2), "depth")
    assert rows == [2, 2, 2, 2]
    rows.clear()
    dependent(images_of(2), {"cells": [0, 1], "depth": [1]})
    assert rows == [2, 2, 3, 3]


@pytest.mark.slow_on_cpu("False")
@pytest.mark.parametrize("fused", [False, True])
def test_images_and_tasks_belong_together(dependent, fused):
    if fused:
        samfast.fuse(dependent)
    images = images_of(2)
    separate = Separate(dependent, images)
    with torch.no_grad():
        everything = dependent(images)
        for task in TASKS:
            separate.check(everything[task.name], task.name)
        for tasks in (["depth", "cells"], ["cells", "classes"]):
            for i, row in enumerate(dependent(images, tasks)):
                separate.check(row[None], tasks[i], [i])
        some = dependent(images, {"classes": [1], "cells": [1, 0], "depth": []})
        separate.check(some["classes"], "classes", [1])
        separate.check(some["cells"], "cells", [1, 0])
        assert some["depth"].shape == (0, 2, *SIZE)


@pytest.mark.slow_on_cpu
def test_gradients_of_all_tasks_are_those_of_each(dependent):
    """In float64."""
    images, own = images_of(2), copy.deepcopy(dependent).double()
    scale = own.image_encoder.blocks[2].attn.qkv
    parameters = [scale.scale, own.image_encoder.pos_embed, own.no_mask_embeds["depth"]]

    def one_by_one():
        loss = sum(own(images, task.name).square().sum() for task in TASKS)
        return torch.autograd.grad(loss, parameters)

    together = sum(v.square().sum() for v in own(images).values())
    ours = torch.autograd.grad(together, parameters)
    all_within_budget(ours, by_reference(one_by_one), by_reference(one_by_one), torch.float64)


@pytest.mark.slow
def test_ta_lora_of_all_tasks_is_that_of_each():
    """In float64: logits and the gradients of all that trains, tasks together and one by one."""
    tasks = TASKS[1:]
    model = MultiTaskSam(build_sam("vit_tiny", image_size=64, seed=1).double(), tasks)
    method = samfast.TaLora(tasks=("classes", "depth"), ranks=(3, 2, 2), dropout=0.0)
    moved(samfast.attach(model, method, train=model.trained_parts()))
    samfast.fuse(model)
    images = torch.rand(2, 3, 64, 60, dtype=torch.float64) * 255
    names, parameters = zip(*samfast.trainable_parameters(model), strict=True)

    def results(logits):
        loss = sum(values.square().mean() for values in logits.values())
        gradients = torch.autograd.grad(loss, parameters)
        return {**logits, **dict(zip(names, gradients, strict=True))}

    def one_by_one():
        return results({task.name: each_row(model, images, task.name) for task in tasks})

    budget = Budget(by_reference(one_by_one), by_reference(one_by_one), torch.float64)
    together = results(model(images))
    keep(budget, together)
    some = model(images, {"depth": [1, 0], "classes": [1, 0]})
    keep(budget, results({name: some[name].flip(0) for name in ("classes", "depth")}))
    assert (together["classes"][:, :1] - together["depth"][:, :1]).abs().max() > 1e-3
    alone = copy.deepcopy(model)
    with pytest.raises(ValueError, match="has the update of task classes merged, so no other can"):
        samfast.merge(model.eval(), task="classes")
        model(images)

    def unmerged():
        return alone(images, "classes")

    budget = Budget(by_reference(unmerged), by_reference(unmerged), torch.float64)
    keep(budget, [model(images, "classes")])
    keep(budget, [together["classes"]])


def each_row(model, images, task):
    return torch.cat([model(image[None], task) for image in images])


def moved(model):
    with torch.no_grad():
        for _, parameter in samfast.trainable_parameters(model):
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.mark.slow_on_cpu
def test_an_adapter_folder_rebuilds_the_tasks(tmp_path):
    def sam():
        return build_sam("vit_tiny", image_size=64, seed=1)

    model = MultiTaskSam(sam(), TASKS)
    moved(samfast.attach(model, samfast.Lora(rank=2), train=model.trained_parts())).eval()
    names = {name for name, _ in samfast.trainable_parameters(model)}
    assert "image_encoder.blocks.0.norm1.weight" in names
    assert "image_encoder.neck.3.bias" in names
    assert "no_mask_embeds.classes" in names and "mask_decoders.depth.iou_token.weight" in names
    assert not any("iou_prediction_head" in name for name in names)
    model(torch.rand(1, 3, 64, 64) * 255)["depth"].sum().backward()
    folder = samfast.save_adapter(model, tmp_path / "adapter")
    loaded = samfast.load_adapter(sam(), folder).eval()
    assert loaded.tasks == TASKS
    images = torch.rand(2, 3, 60, 64) * 255
    with torch.no_grad():
        mine, theirs = model(images), loaded(images)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    again = samfast.load_adapter(MultiTaskSam(sam(), TASKS), folder)
    assert all(map(torch.equal, again.state_dict().values(), model.state_dict().values()))
    with pytest.raises(ValueError, match=r"is of Task.*but the model of Task"):
        samfast.load_adapter(MultiTaskSam(sam(), TASKS[:2]), folder)
    with pytest.raises(ValueError, match="another base"):
        samfast.load_adapter(build_sam("vit_tiny", image_size=64, seed=2), folder)
    with pytest.raises(ValueError, match="trained with head 'sam'"):
        samfast.attach(other := sam(), samfast.Lora(rank=2))
        samfast.load_adapter(
            MultiTaskSam(sam(), TASKS), samfast.save_adapter(other, tmp_path / "single")
        )


def test_what_trains_has_a_gradient():
    model = MultiTaskSam(build_sam("vit_tiny", image_size=64, seed=1), TASKS)
    samfast.fuse(moved(samfast.attach(model, samfast.Lora(rank=2), train=model.trained_parts())))
    sum(v.square().sum() for v in model(torch.rand(2, 3, 64, 64) * 255).values()).backward()
    for name, parameter in samfast.trainable_parameters(model):
        assert parameter.grad is not None and parameter.grad.any(), name


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("a", "semantic", 1), "has 1 channels; semantic has at least 2"),
        (("a", "binary", 2), "has 2 channels; binary has 1"),
        (("a", "segments", 2), "has kind 'segments'; known are binary, semantic, regression"),
        (("a b",), "'a b' must consist of letters"),
        (("keys",), "is reserved"),
        (("all",), "is reserved"),
    ],
)
def test_bad_tasks(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        Task(*arguments)


def test_names_of_dictionaries_methods_are_refused():
    for name in ("get", "copy", "items"):
        with pytest.raises(ValueError, match=f"task name '{name}' is reserved"):
            Task(name)


def test_bad_models_and_calls(model, small):
    with pytest.raises(ValueError, match="two tasks are called a"):
        MultiTaskSam(small, [Task("a"), Task("b"), Task("a", "semantic", 3)])
    with pytest.raises(ValueError, match="at least one"):
        MultiTaskSam(small, [])
    with pytest.raises(ValueError, match="head 'binary'"):
        MultiTaskSam(binary_head(copy.deepcopy(small)), TASKS)
    with pytest.raises(ValueError, match="has adapters"):
        MultiTaskSam(samfast.attach(copy.deepcopy(small), samfast.Lora()), TASKS)
    images = images_of(2)
    for task, sentence in [
        (3, "task 3 does not exist; known are 0 cells, 1 classes, 2 depth"),
        (-1, "task -1 does not exist"),
        ("cell", "task 'cell' does not exist"),
        (True, "task True does not exist"),
        (["cells"], "there are 1 tasks for 2 images"),
        ({"cells": [2]}, "task cells asks for image 2 of 2"),
        ({}, "expected at least one task, got none"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            model(images, task)
    with pytest.raises(ValueError, match="decoder_chunk is 0"):
        model(images, decoder_chunk=0)

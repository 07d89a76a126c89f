# SPDX-License-Identifier: Apache-2.0
"""torch.compile(fullgraph=True) of a MultiTaskSam with TA-LoRA: a graph for each way of asking."""

import pytest
import torch

import samfast
from samfast.models import MultiTaskSam, Task, build_sam

pytestmark = pytest.mark.usefixtures("seeded")
TASKS = (Task("classes", "semantic", 2), Task("depth", "regression"))


@pytest.fixture
def model():
    """Of one fused block."""
    sam = build_sam("vit_tiny", image_size=64, seed=1)
    sam.image_encoder.blocks = sam.image_encoder.blocks[2:3]
    model = MultiTaskSam(sam, TASKS)
    method = samfast.TaLora(tasks=("classes", "depth"), ranks=(3, 2, 2), dropout=0.0)
    samfast.attach(model, method, train=model.trained_parts())
    with torch.no_grad():
        for _, parameter in samfast.trainable_parameters(model):
            parameter.add_(0.05 * torch.randn_like(parameter))
    return samfast.fuse(model)


def listed(logits):
    if isinstance(logits, torch.Tensor):
        return [logits]
    return list(logits.values()) if isinstance(logits, dict) else list(logits)


def compiled(model, backend):
    """The model compiled, and the list that every graph is added to."""
    torch._dynamo.reset()
    graphs = []

    def noted(graph, inputs):
        graphs.append(graph)
        return backend(graph, inputs)

    return torch.compile(model, fullgraph=True, backend=noted), graphs


@pytest.mark.slow
def test_the_encoder_is_one_graph_for_each_way_of_asking(model):
    """Whatever was asked before."""
    images = torch.rand(1, 3, 64, 64) * 255
    ways = {"all": {0: None, 1: None}, "one": {1: None}}

    def embeddings(way):
        return model.encode_for(images, ways[way])

    with torch.no_grad():
        expected = {way: embeddings(way) for way in ways}
        call, graphs = compiled(embeddings, lambda graph, _: graph)
        for way in ("all", "one", "one", "all", "all", "one"):
            found = call(way)
            assert list(found) == list(expected[way])
            assert all(torch.equal(found[task], expected[way][task]) for task in found), way
    assert len(graphs) == 2
    assert not torch.equal(expected["all"][0], expected["all"][1])


@pytest.mark.slow
def test_the_model_is_one_graph_for_each_way_of_asking(model):
    images = torch.rand(2, 3, 60, 64) * 255
    with torch.no_grad():
        expected = {task: listed(model(images, task)) for task in (None, "depth")}
        call, graphs = compiled(model, lambda graph, _: graph)
        for task in (None, "depth", "depth", None, None, "depth"):
            found = listed(call(images, task))
            assert all(map(torch.equal, found, expected[task])), task
    assert len(graphs) == 2
    assert not torch.equal(expected[None][0][:, :1], expected[None][1])


@pytest.mark.slow
def test_gradients_and_mixed_tasks(model):
    images = torch.rand(2, 3, 60, 64) * 255
    names, parameters = zip(*samfast.trainable_parameters(model), strict=True)

    def step(call, task):
        logits = listed(call(images, task))
        loss = sum(values.square().mean() for values in logits)
        return [*logits, *torch.autograd.grad(loss, parameters, allow_unused=True)]

    backend = torch._dynamo.lookup_backend("aot_eager")
    for task in (None, "classes", ["depth", "classes"], {"depth": [1], "classes": [0, 1]}):
        eager = step(model, task)
        call, graphs = compiled(model, backend)
        for name, mine, theirs in zip([*eager, *names], step(call, task), eager, strict=False):
            assert (mine is None) == (theirs is None), (task, name)
            assert mine is None or torch.equal(mine, theirs), (task, name)
        assert len(graphs) == 1

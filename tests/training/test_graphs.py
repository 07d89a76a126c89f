# SPDX-License-Identifier: Apache-2.0
"""--graph: which batches run compiled, their numbers, and what is said where none can.

On a CPU the compiled batches run without CUDA graphs, and with a backend that changes no number.
"""

import copy
import importlib
import pickle
from dataclasses import replace

import pytest
import torch
from test_resume import Ended, EndsAt, results, settings_for

import samfast
from samfast.models import MultiTaskSam, Task, build_sam
from samfast.training import graphs, loop
from samfast.training.callbacks import Callback
from samfast.training.checks import check_settings
from samfast.training.graphs import GraphedEncoder, check_graph, graphed
from samfast.training.loop import finetune
from samfast.training.settings import FinetuneSettings

ON = FinetuneSettings(model="vit_tiny", graph="on", batch_size=2)
CUDA = torch.device("cuda")


@pytest.fixture
def traced(monkeypatch):
    """The graphs that are compiled, by a backend that runs their operators one by one."""
    torch._dynamo.reset()
    found, backend = [], torch._dynamo.lookup_backend("aot_eager")

    def noted(graph, inputs):
        found.append(graph)
        return backend(graph, inputs)

    monkeypatch.setitem(graphs.OPTIONS, "backend", noted)
    monkeypatch.delitem(graphs.OPTIONS, "mode")
    return found


@pytest.fixture
def on_a_cpu(monkeypatch):
    monkeypatch.setattr(loop, "check_graph", lambda *_: None)


def model(method, blocks=slice(1, 3)):
    """A windowed and a global block, no neck: its convolutions round by how the map lies."""
    torch.manual_seed(0)
    sam = build_sam("vit_tiny", image_size=64, seed=0)
    sam.image_encoder.blocks = sam.image_encoder.blocks[blocks]
    sam.image_encoder.neck = torch.nn.Identity()
    samfast.attach(sam, method, train=())
    with torch.no_grad():
        for _, parameter in samfast.trainable_parameters(sam):
            parameter += 0.05 * torch.randn_like(parameter)
    return samfast.fuse(sam).train()


def step(sam, images, seed=5):
    """The result and all gradients, with the noise of that seed."""
    torch.manual_seed(seed)
    sam.zero_grad()
    y = sam.image_encoder(images)
    (y.square().mean() + samfast.aux_loss(sam)).backward()
    return [y.detach(), *(p.grad.clone() for _, p in samfast.trainable_parameters(sam))]


def same(found, expected):
    return all(map(torch.equal, found, expected)) and len(found) == len(expected) > 1


def test_a_whole_batch_of_training_runs_compiled_and_nothing_else(monkeypatch):
    ran = []

    def compiled(call, **options):
        assert options == {"mode": "reduce-overhead", "dynamic": False, "fullgraph": True}
        return lambda images: ran.append(images) or call(images)

    monkeypatch.setattr(torch, "compile", compiled)
    sam, said = model(samfast.Lora(rank=2, dropout=0.1), slice(1, 2)), []
    encoder, names = sam.image_encoder, list(sam.state_dict())
    batches = [torch.randn(count, 3, 64, 64) for count in (2, 1, 1, 2)]
    expected = [step(sam, images) for images in batches]
    graphed(sam, ON, said.append)
    for images, own in zip(batches, expected, strict=True):
        assert same(step(sam, images), own)
    with torch.no_grad():
        encoder(batches[0])
    encoder.eval()(batches[0])
    assert [images is batch for images, batch in zip(ran, batches[::3], strict=True)] == [True] * 2
    assert said == [
        "the encoder trains in CUDA graphs (never run on a GPU); the first step compiles it",
        "a batch of 1, not 2, images runs without CUDA graphs, as all like it",
    ]
    assert list(sam.state_dict()) == names and type(encoder).__name__ == "ImageEncoderViT"
    for twin in (copy.deepcopy(sam), pickle.loads(pickle.dumps(sam))):
        assert twin.image_encoder._compiled_call_impl is None


@pytest.mark.slow
def test_what_cannot_be_one_graph_runs_eagerly_and_says_so(traced):
    sam, said = model(samfast.Lora(rank=2), slice(1, 2)), []
    images = torch.randn(2, 3, 64, 64)
    expected = step(sam, images)
    sam.image_encoder.register_forward_hook(lambda *_: torch._dynamo.graph_break())
    GraphedEncoder(sam.image_encoder, 2, False, said.append)
    assert same(step(sam, images), expected) and same(step(sam, images), expected)
    assert len(said) == 1 and said[0].startswith("the encoder runs without CUDA graphs: ")
    assert traced == []


def test_summed_gradients_have_memory_of_their_own():
    """Autograd takes the first over as it is, and a graph's is written anew by the next batch."""
    sam = model(samfast.Lora(rank=2), slice(1, 2))
    trained = [p for _, p in samfast.trainable_parameters(sam.image_encoder)]
    for accumulate, own in ((1, False), (2, True)):
        sam.zero_grad()
        graphed(sam, replace(ON, accumulate=accumulate), lambda _: None).begin_step()
        assert all((p.grad is not None) == own for p in trained)
    assert not any(p.grad.any() for p in trained)
    assert sam.image_encoder.pos_embed.grad is None


def test_where_no_graph_can_be_had():
    with pytest.raises(
        ValueError, match="graph is on, which needs a CUDA device, but the device is"
    ):
        check_graph(ON, torch.device("cpu"), 1)
    with pytest.raises(
        ValueError, match="works in one process only, but there are 2; leave out --graph"
    ):
        check_graph(ON, CUDA, 2)
    check_graph(ON, CUDA, 1)
    check_graph(replace(ON, graph="off"), torch.device("cpu"), 2)
    with pytest.raises(ValueError, match="graph is on, which only the fused encoder has; leave"):
        check_settings(replace(ON, fuse=False), needs_data=False)
    sam, said = build_sam("vit_tiny", image_size=64), []
    sam.image_encoder.requires_grad_(False)
    assert graphed(sam, ON, said.append) is None
    assert said == ["graph is on, but the encoder is frozen, so it runs without CUDA graphs"]
    assert graphed(sam, replace(ON, graph="off"), said.append) is None


def test_a_cpu_is_refused_before_anything_is_written(refused, shared_data):
    options = ("--model", "vit_tiny", "--graph", "on")
    refused("finetune", "--data", shared_data, *options, pattern="graph is on, which needs a CUDA")


METHODS = {
    "lora": samfast.Lora(rank=2, dropout=0.1),
    "conv-lora": samfast.ConvLora(rank=3, experts=3, dropout=0.1),
    "cobot-lora": samfast.CobotLora(rank=4),
    "cobot-adaptformer": samfast.AdaptFormer(bottleneck=8, cobot=True, dropout=0.1),
    "kronecker": samfast.Kronecker(n=4, dropout=0.1),
    "ta-lora": samfast.TaLora(tasks=2, ranks=(4, 4, 2), dropout=0.1, orthogonality=0.1),
}


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["fast", "minimal"])
@pytest.mark.parametrize("name", METHODS)
def test_a_compiled_step_has_the_bits_of_an_eager_one(name, memory, traced):
    """Noise and dropout included; hooks and what they make for all layers are in the one graph."""
    sam, said = samfast.fuse(model(METHODS[name]), memory=memory), []
    if name == "ta-lora":
        samfast.set_task(sam, "all")
    batches = [torch.randn(2, 3, 64, 64) for _ in range(2)]
    expected = [step(sam, images, seed) for seed, images in enumerate(batches)]
    graph = graphed(sam, ON, said.append)
    for seed, images in enumerate(batches):
        graph.begin_step()
        assert same(step(sam, images, seed), expected[seed])
    assert len(traced) == 1 and len(said) == 1
    assert not same(expected[0], expected[1])


@pytest.mark.slow
def test_generated_code_has_the_bits_of_an_eager_step():
    """Where it draws as torch does; by itself the compiler has random numbers of its own."""
    torch._dynamo.reset()
    sam, images, said = model(METHODS["conv-lora"]), torch.randn(2, 3, 64, 64), []
    expected = step(sam, images)
    graph = graphed(sam, ON, said.append)
    with torch._inductor.config.patch(fallback_random=True):
        for _ in range(3):
            graph.begin_step()
            assert same(step(sam, images), expected)
    assert len(said) == 2 and "compiled, but torch used no CUDA graphs" in said[1]  # on a CPU


@pytest.mark.slow
def test_batches_with_other_tasks_are_right_and_run_eagerly(traced):
    sam = build_sam("vit_tiny", image_size=64, seed=1)
    sam.image_encoder.blocks = sam.image_encoder.blocks[2:3]
    sam.image_encoder.neck[0].register_forward_pre_hook(lambda _, x: (x[0].contiguous(),))
    model = MultiTaskSam(sam, (Task("classes", "semantic", 2), Task("depth", "regression")))
    method = samfast.TaLora(tasks=("classes", "depth"), ranks=(3, 2, 2), dropout=0.0)
    samfast.attach(model, method, train=model.trained_parts())
    with torch.no_grad():
        for _, parameter in samfast.trainable_parameters(model):
            parameter += 0.05 * torch.randn_like(parameter)
    samfast.fuse(model).train()
    images, said = torch.rand(2, 3, 64, 64) * 255, []
    asked = (None, {"classes": [0, 1], "depth": [1]}, {"classes": [0], "depth": [0, 1]}, None)

    def logits(task):
        return list(model(images, task).values())

    expected = [logits(task) for task in asked]
    graphed(model, ON, said.append)
    for task, own in zip(asked, expected, strict=True):
        assert same(logits(task), own)
    assert len(traced) == 1
    assert said[1:] == [
        "a batch of images that lack a task runs without CUDA graphs, as all like it"
    ]


class OneLayout(Callback):
    """The neck's convolutions round by how maps lie, which is another way when compiled."""

    def on_begin(self, run):
        for layer in run.sam.image_encoder.neck:
            layer.register_forward_pre_hook(lambda _, x: (x[0].contiguous(),))


@pytest.fixture
def one_gradient_layout(monkeypatch):
    """Compiled code makes the gradient of its result contiguous before it goes on."""
    module = importlib.import_module("samfast.models.segment")
    decode = module.decode

    def with_hook(sam, embeddings, *args, **kwargs):
        if embeddings.requires_grad:
            embeddings.register_hook(lambda gradient: gradient.contiguous())
        return decode(sam, embeddings, *args, **kwargs)

    monkeypatch.setattr(module, "decode", with_hook)


@pytest.mark.usefixtures("on_a_cpu", "one_gradient_layout")
@pytest.mark.slow
def test_a_run_has_the_same_bytes_and_goes_on(shared_data, tmp_path, traced, capsys):
    """Over epochs of whole batches and others, summed gradients, dropout and validation."""
    common = {"batch_size": 3, "repeats": 1, "epochs": 3, "accumulate": 2}
    eager = settings_for(shared_data, tmp_path / "eager", **common)
    finetune(eager, callbacks=[OneLayout()])
    capsys.readouterr()
    graph = replace(eager, output=tmp_path / "graph", graph="on")
    finetune(graph, callbacks=[OneLayout()])
    said = capsys.readouterr().out
    assert said.count("the encoder trains in CUDA graphs") == 1
    assert said.count("a batch of 1, not 3, images runs without CUDA graphs") == 1
    assert len(traced) == 1
    assert results(graph.output) == results(eager.output)

    resumed = replace(eager, output=tmp_path / "resumed", graph="on")
    with pytest.raises(Ended):
        finetune(resumed, callbacks=[OneLayout(), EndsAt(2)])
    capsys.readouterr()
    finetune(replace(resumed, resume="newest", graph="off"), callbacks=[OneLayout()])
    assert "graph was on and is off" in capsys.readouterr().out
    assert results(resumed.output) == results(eager.output)

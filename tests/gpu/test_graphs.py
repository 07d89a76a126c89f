# SPDX-License-Identifier: Apache-2.0
"""The encoder's training steps as CUDA graphs, by torch.compile; never run on a GPU.

On a CPU the same steps run compiled, without CUDA graphs.
"""

import pytest
import torch
from draws import DEVICE

import samfast
from samfast.models import build_sam
from samfast.training.graphs import graphed
from samfast.training.settings import FinetuneSettings

from .proofs import CUDA, need_segment_anything, same

need_segment_anything()

pytestmark = pytest.mark.slow_on_cpu

STEPS = 6 if CUDA else 2
ON = FinetuneSettings(model="vit_tiny", graph="on", batch_size=2, accumulate=2)
METHODS = {
    "lora": samfast.Lora(rank=4, target=("qkv", "proj", "lin1", "lin2"), dropout=0.1),
    "conv-lora": samfast.ConvLora(rank=3, experts=3, dropout=0.1),
    "cobot-lora": samfast.CobotLora(rank=4),
    "cobot-adaptformer": samfast.AdaptFormer(bottleneck=8, cobot=True, dropout=0.1),
    "kronecker": samfast.Kronecker(n=4, dropout=0.1),
    "ta-lora": samfast.TaLora(tasks=2, ranks=(4, 4, 2), dropout=0.1, orthogonality=0.1),
}


def model(method):
    """A windowed and a global block, no neck: generated code rounds its norms in its own way."""
    torch.manual_seed(0)
    sam = build_sam("vit_tiny", image_size=64, seed=0)
    sam.image_encoder.blocks = sam.image_encoder.blocks[1:3]
    sam.image_encoder.neck = torch.nn.Identity()
    samfast.attach(sam, method, train=())
    with torch.no_grad():
        for _, parameter in samfast.trainable_parameters(sam):
            parameter += 0.05 * torch.randn_like(parameter)
    sam = samfast.fuse(sam).train().to(DEVICE)
    return samfast.set_task(sam, "all") if isinstance(method, samfast.TaLora) else sam


def trained(sam, batches, graph):
    """Each batch's result and loss, gradients summed over two batches, and the parameters."""
    parameters = [p for _, p in samfast.trainable_parameters(sam)]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    found = []
    for i, images in enumerate(batches):
        torch.manual_seed(i)
        if graph is not None:
            graph.begin_step()
        y = sam.image_encoder(images)
        loss = y.square().mean() + samfast.aux_loss(sam)
        loss.backward()
        found += [y.detach().clone(), loss.detach()]
        if i % 2:
            found += [p.grad.clone() for p in parameters]
            optimizer.step()
            optimizer.zero_grad()
    return [*found, *(p.detach().clone() for p in parameters)]


@pytest.mark.parametrize("name", METHODS)
def test_replayed_steps_have_the_bits_of_eager_ones(name):
    """Through warm-up, capture and replay: weights that move, noise, dropout, summed gradients."""
    torch._dynamo.reset()
    batches = [torch.randn(2, 3, 64, 64, device=DEVICE) for _ in range(STEPS)]
    expected, sam, said = trained(model(METHODS[name]), batches, None), model(METHODS[name]), []
    with torch._inductor.config.patch(fallback_random=True):
        graph = graphed(sam, ON, said.append)
        assert same(trained(sam, batches, graph), expected)
    if CUDA:
        assert len(said) == 1, said
        kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=kinds) as profile:
            trained(sam, batches[:1], graph)
            torch.cuda.synchronize()
        replays = [event for event in profile.events() if event.name == "cudaGraphLaunch"]
        assert len(replays) == 2  # forward and backward

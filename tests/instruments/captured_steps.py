# SPDX-License-Identifier: Apache-2.0
"""Steps of training under the stand-in driver, and what of them a CUDA graph could not replay.

A program of its own, because tests import kernels for the interpreter. Prints JSON: by method what
two steps launch and what is wrong with them, then the same of steps with a planted fault.

``python tests/instruments/captured_steps.py [case ...]``, all cases without a name. PYTHONPATH has
the repository's root, tests/ and tests/integrations/.
"""

import contextlib
import json
import random
import sys
from unittest import mock

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import _allocation

import samfast
from benchmarks import stand_in
from samfast.counters import counting
from samfast.integrations.torchvision import declare_missing_schemas
from samfast.kernels.cobot_fold import triton_kernels
from samfast.methods.registry import VARIANTS
from samfast.models import build_sam

EVERYWHERE = ("qkv", "proj", "lin1", "lin2")
METHODS = {
    "lora": samfast.Lora(rank=2, target=EVERYWHERE, dropout=0.1),
    "qkv-lora": samfast.Lora(rank=2, slices=("q", "v"), dropout=0.1),
    "conv-lora": samfast.ConvLora(rank=3, experts=3, target=("qkv", "lin1", "lin2"), dropout=0.1),
    "cobot-lora": samfast.CobotLora(rank=4),
    "adaptformer": samfast.AdaptFormer(bottleneck=8, dropout=0.1),
    "cobot-adaptformer": samfast.AdaptFormer(bottleneck=8, cobot=True, dropout=0.1),
    "kronecker": samfast.Kronecker(n=4, dropout=0.1),
    "ta-lora": samfast.TaLora(tasks=2, ranks=(4, 4, 2), dropout=0.1, orthogonality=0.1),
}
CASES = {
    **METHODS,
    **{f"lora, {memory}": METHODS["lora"] for memory in ("balanced", "minimal")},
    "ta-lora, two tasks": METHODS["ta-lora"],
    "Hugging Face": samfast.Lora(rank=2, dropout=0.1),
    "SAM 3": samfast.Lora(rank=2, target=("q_proj", "v_proj"), dropout=0.1),
}
UNSEEN = ("cpu", "tolist", "numpy", "__array__")  # of a tensor on a CPU, by torch's dispatcher
ON_A_CPU = ("check_index", "_check_entries")  # read what lies on a CPU, on a GPU nothing


def encoder_of(name: str) -> nn.Module:
    """A windowed and a global block, in training."""
    declare_missing_schemas()  # before segment_anything, which the models below import
    if name == "SAM 3":
        from sam3_models import tracker

        model = tracker()
    elif name == "Hugging Face":
        import hugging_face_models

        model = hugging_face_models.model()
    else:
        model = build_sam("vit_tiny", image_size=64, seed=0)
        model.image_encoder.blocks = model.image_encoder.blocks[1:3]
    samfast.attach(model, CASES[name], train=())
    samfast.fuse(model, memory=name.partition(", ")[2] if name.startswith("lora, ") else "fast")
    encoder = getattr(model, "vision_encoder", None) or model.image_encoder
    if name == "ta-lora, two tasks":
        samfast.set_task(encoder, "all")
    return encoder.train()


def step(encoder: nn.Module, images: torch.Tensor) -> None:
    """Forward and backward, as a graph of the encoder has them, and the adapters' loss."""
    y = encoder(images)
    y = y if isinstance(y, torch.Tensor) else y[0]
    loss = y.sum() + samfast.aux_loss(encoder)
    trained = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
    torch.autograd.grad(loss, trained, allow_unused=True)


class _Calls(TorchDispatchMode):
    """Notes each call of torch: its name, shapes, dtypes and numbers."""

    def __init__(self, made: list, faults: set):
        super().__init__()
        self.made, self.faults = made, faults

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.made.append(f"{func} {_plain([*args, *kwargs.items()])}")
        if func is torch.ops.aten.lift_fresh.default:
            self.faults.add("a tensor is made of Python's numbers")
        return func(*args, **kwargs)


def _plain(value) -> object:
    """Tensors by shape and dtype, all else as it is."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), str(value.dtype)
    return [_plain(part) for part in value] if isinstance(value, (list, tuple)) else value


@contextlib.contextmanager
def watching():
    """Yields (calls and launches in their order, faults), filled by what runs inside."""
    made, faults, problem = [], set(), stand_in.problem

    def launched(source, metadata, grid, arguments, arch):
        kinds = list(source.signature.values())
        made.append(f"{metadata.name} {grid} {kinds} {_plain(list(arguments))}")
        return problem(source, metadata, grid, arguments, arch)

    def unseen(name):
        read = getattr(torch.Tensor, name)

        def noted(*args, **kwargs):
            if sys._getframe(1).f_code.co_name not in ON_A_CPU:
                faults.add(f"the host reads: {name}")
            return read(*args, **kwargs)

        return mock.patch.object(torch.Tensor, name, noted)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(stand_in, "problem", launched))
        for name in UNSEEN:
            stack.enter_context(unseen(name))
        stack.enter_context(_Calls(made, faults))
        counts = stack.enter_context(counting())
        yield made, faults
        faults |= {f"the host reads: {name}" for name in counts.syncs}


def faults_of(encoder: nn.Module, side: int) -> dict:
    """Of two steps behind one that warms up: launches, and what would not be replayed."""
    images = torch.randn(2, 3, side, side)
    standing = stand_in.current
    step(encoder, images)
    steps, faults, forms = [], set(), len(standing.jobs)
    for _ in range(2):
        before = len(standing.launches)
        with watching() as (made, found):
            step(encoder, images + 1)
        steps.append(made)
        faults |= found
    faults |= {"a step launches what the one before did not"} if steps[0] != steps[1] else set()
    faults |= {"a step compiles"} if len(standing.jobs) > forms else set()
    if not isinstance(_allocation._allocator.get(), _allocation.NullAllocator):
        faults.add("Triton has an allocator of its own")
    launches = len(standing.launches) - before
    return {"launches": launches, "calls": len(steps[0]), "faults": sorted(faults)}


def planted() -> dict:
    """By its name, what is found of a step with a fault in the encoder or in an operator."""
    seen = []

    def counted(y):
        seen.append(y)
        return y.abs() if len(seen) % 2 else y

    hooks = {
        "item": lambda y: y * y.sum().item(),
        "tolist": lambda y: y * len(y.flatten()[:2].tolist()),
        "cpu": lambda y: y.cpu(),
        "branch": lambda y: y if y.sum() > 0 else -y,
        "mask": lambda y: y[y.isfinite()].sum() + y,
        "nonzero": lambda y: y.nonzero().sum() + y,
        "tensor": lambda y: y * torch.tensor(2.0),
        "as_tensor": lambda y: y * torch.as_tensor([2.0]),
        "index": lambda y: y[[1, 0]],
        "number": lambda y: y * random.random(),  # a replay would have that of the capture
        "launch": counted,
    }
    found = {}
    for name, hook in hooks.items():
        encoder = encoder_of("cobot-lora")
        encoder.register_forward_hook(lambda module, args, y, hook=hook: hook(y))
        found[name] = faults_of(encoder, 64)["faults"]
    forward = triton_kernels.forward

    def reads(*args):
        made = forward(*args)
        made[0][0].sum().item()
        return made

    with mock.patch.object(triton_kernels, "forward", reads):
        found["operator"] = faults_of(encoder_of("cobot-lora"), 64)["faults"]
    return found


def main(*names: str) -> None:
    torch.set_num_threads(1)
    with stand_in.standing_in(90, compiles=False):
        told = {}
        for name in names or CASES:
            told[name] = faults_of(encoder_of(name), 56 if name == "SAM 3" else 64)
        print(json.dumps({"steps": told, "planted": planted(), "methods": list(VARIANTS)}))


if __name__ == "__main__":
    main(*sys.argv[1:])

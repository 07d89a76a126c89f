# SPDX-License-Identifier: Apache-2.0
"""Host cost of a block, forward and backward: ours and segment_anything's with PEFT.

A GPU is stood in for, as in ``benchmarks.stand_in``, and launches cost nothing. The block is so
small that aten calls cost little but their way through torch. Python calls are those of functions
in samfast, aten calls those that go through torch's dispatcher, with the ones inside them.
"""

import argparse
import dataclasses
import gc
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import samfast
from benchmarks import stand_in
from benchmarks.peers import exchange, peft_adapter, randomise, sharing
from samfast.integrations import segment_anything

WIDTH, HEADS, IMAGE, WINDOW = 16, 1, 3, 2
BLOCKS = 4  # in a row, so that what a step costs once is shared
ALL = ("qkv", "proj", "lin1", "lin2")
PLACES = ("windowed", "global")
METHODS = {
    "LoRA": lambda: samfast.Lora(rank=4, target=ALL),
    "Conv-LoRA": lambda: samfast.ConvLora(rank=4),
    "COBOT": lambda: samfast.CobotLora(rank=4),
    "TA-LoRA": lambda: samfast.TaLora(tasks=2, ranks=(8, 8, 2)),
}
_PACKAGE = str(Path(samfast.backends.__file__).parent)
_KERNELS = str(Path(samfast.functional.__file__).parent.parent / "kernels")


@dataclasses.dataclass
class Cost:
    """Of a block's forward and backward. seconds: of each; python, aten: calls"""

    seconds: tuple[float, float]
    python: float
    aten: float
    launches: float


def blocks_of(method: str, global_: bool = False, dtype=torch.bfloat16) -> nn.Sequential:
    """The windowed or the global blocks of a tiny encoder with a method."""
    family = segment_anything.load().modeling.image_encoder
    encoder = family.ImageEncoderViT(
        img_size=16 * IMAGE, embed_dim=WIDTH, depth=2 * BLOCKS, num_heads=HEADS, out_chans=16,
        use_rel_pos=True, window_size=WINDOW, global_attn_indexes=tuple(range(1, 2 * BLOCKS, 2)),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    randomise(encoder.requires_grad_(False), generator)
    samfast.attach(encoder, METHODS[method](), train=())
    for parameter in encoder.parameters():
        parameter.data = parameter.data if parameter.requires_grad else parameter.data.to(dtype)
    for hook in encoder._forward_pre_hooks.values():
        hook(encoder, (torch.zeros(1, 3, 16, 16),))
    for layer in encoder.modules():  # what all layers share is made once a step, beside the blocks
        if getattr(layer, "given", None) is not None:
            layer.given = tuple([t.detach().requires_grad_() for t in layer.given])
    return nn.Sequential(*encoder.blocks[int(global_) :: 2])


def eager_blocks(global_: bool = False) -> nn.Sequential:
    """segment_anything's blocks with PEFT's LoRA on their four layers."""
    return exchange(sharing(blocks_of("LoRA", global_)), peft_adapter)


def step_of(blocks: nn.Module, dtype=torch.bfloat16) -> tuple[Callable, Callable]:
    """A forward, and a backward of its result."""
    x = torch.randn(1, IMAGE, IMAGE, WIDTH).to(dtype).requires_grad_()
    dy = torch.randn(1, IMAGE, IMAGE, WIDTH).to(dtype)
    leaves = [x, *(p for p in blocks.parameters() if p.requires_grad)]
    leaves += [t for m in blocks.modules() for t in getattr(m, "given", None) or ()]

    def backward(y: Tensor) -> None:
        torch.autograd.grad(y, leaves, dy, allow_unused=True, retain_graph=True)

    return lambda: blocks(x), backward


def cost(blocks: nn.Sequential, repeats: int = 200) -> Cost:
    """The least of some repeats, in seconds of this processor, and counts of one, for a block."""
    forward, backward = step_of(blocks)
    for _ in range(5):
        backward(forward())
    before = len(stand_in.current.launches)
    backward(forward())
    launches = len(stand_in.current.launches) - before
    times = [[], []]
    gc.collect()
    gc.disable()
    for _ in range(repeats):
        start = time.process_time()
        y = forward()
        middle = time.process_time()
        backward(y)
        end = time.process_time()
        times[0].append(middle - start)
        times[1].append(end - middle)
    gc.enable()
    step = lambda: backward(forward())  # noqa: E731
    return Cost(
        tuple(min(t) / BLOCKS for t in times), python_calls(step) / BLOCKS,
        aten_calls(step) / BLOCKS, launches / BLOCKS,
    )  # fmt: skip


def python_calls(call: Callable) -> int:
    """Calls of samfast's own functions, and of launch plans."""
    count = 0

    def note(frame, event, _):
        nonlocal count
        name = frame.f_code.co_filename
        count += event == "call" and name.startswith((_PACKAGE, _KERNELS, "launch plan"))

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return count


def aten_calls(call: Callable) -> int:
    """Calls through torch's dispatcher, as an observer sees them that is no profiler."""
    with tempfile.TemporaryDirectory() as folder:
        observer = torch.profiler.ExecutionTraceObserver()
        observer.register_callback(str(Path(folder) / "calls.json"))
        observer.start()
        call()
        observer.stop()
        observer.unregister_callback()
        nodes = json.loads((Path(folder) / "calls.json").read_text())["nodes"]
    return sum(node["name"].startswith(("aten::", "samfast")) for node in nodes)


def costs(
    repeats: int = 200, places: Sequence[str] = PLACES, names: Sequence[str] = ("eager", *METHODS)
) -> Iterator[tuple[str, Cost]]:
    """Of the eager block and of ours under each method of these names."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.backends.mkldnn.enabled = False  # slow for so small products
    with stand_in.standing_in(90, compiles=False, checks=False):
        for place in places:
            for name in names:
                if name == "eager":
                    blocks = eager_blocks(place == "global")
                else:
                    blocks = samfast.fuse(blocks_of(name, place == "global"))
                yield f"{name}, {place}", cost(blocks, repeats)


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--repeats", type=int, default=200, help="repeats; the fastest counts [200]"
    )
    parser.add_argument("--place", choices=PLACES, nargs=1, help="place of the attention [both]")
    parser.add_argument("--of", choices=("eager", *METHODS), nargs="+", help="[all]")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        print(f"benchmarks.host: {stand_in.INTERPRETED}", file=sys.stderr)
        return 2
    found = costs(options.repeats, options.place or PLACES, options.of or ("eager", *METHODS))
    if options.json:
        print(json.dumps({name: dataclasses.asdict(cost) for name, cost in found}))
        return 0
    eager = None
    for name, one in found:
        total = sum(one.seconds)
        eager = total if name.startswith("eager") else eager or math.nan
        forward, backward = (1e6 * t for t in one.seconds)
        print(
            f"{name:22} {forward:6.0f} + {backward:6.0f} us, {total / eager:5.2f} of eager; "
            f"{one.python:4.0f} calls of ours, {one.aten:4.0f} of aten, "
            f"{one.launches:3.0f} launches",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

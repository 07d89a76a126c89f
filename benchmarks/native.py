# SPDX-License-Identifier: Apache-2.0
"""The operations that have CUDA sources, by these and by Triton, forward and backward.

python -m benchmarks.native
"""

import argparse

import torch

from benchmarks import machine
from benchmarks.run import interleaved, quantile
from benchmarks.verify import REFUSALS, refusal

BACKENDS = {"cuda": ("triton", "cuda"), "cpu": ("torch", "cpu")}


def calls(device: str, small: bool):
    """(name, backend -> results) of ViT-H's sizes, batch 4."""
    from samfast.functional import conv_experts, hypercomplex_linear, task_core

    generator = torch.Generator().manual_seed(0)

    def draw(*shape, dtype=torch.float32):
        return torch.randn(*shape, generator=generator).to(device, dtype).requires_grad_()

    half = torch.bfloat16
    windows, tokens, width = (2, 30, 16) if small else (100, 16384, 1280)
    experts = [draw(windows, 14, 14, 3, dtype=half), draw(8, 3, 3, 3, 3), draw(8, 3)]
    index = torch.arange(windows, device=device) % 8
    product = [draw(tokens, width, dtype=half), draw(4, 4, 4), draw(4, width, width // 4)]
    core = [draw(4, tokens // 4, 32, dtype=half), draw(32, 32, 4), draw(3, 4)]
    task = torch.tensor([0, 1, 2, 0], device=device)
    made = {
        "conv_experts": (
            experts, lambda b: conv_experts(*experts, index, range(1, 9), backend=b)
        ),
        "hypercomplex": (product, lambda b: hypercomplex_linear(*product, backend=b)),
        "task_core": (core, lambda b: task_core(*core, task, backend=b)),
    }  # fmt: skip
    for name, (leaves, forward) in made.items():

        def call(backend, leaves=leaves, forward=forward):
            y = forward(backend)
            return torch.autograd.grad(y, leaves, torch.ones_like(y))

        yield name, call


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description="time native sources beside Triton's")
    parser.add_argument("--device", choices=sorted(BACKENDS), default="cuda", help="(cuda)")
    parser.add_argument("--small", action="store_true", help="use tiny sizes, for a trial run")
    parser.add_argument("--repeats", type=int, default=30, help="(30)")
    options = parser.parse_args(arguments)
    if options.device == "cuda":
        from benchmarks import smoke

        if (missing := smoke.no_gpu()) is not None:
            parser.exit(2, missing + "\n")
    print(f"{machine.name(options.device)}, forward and backward, median")
    for name, call in calls(options.device, options.small):
        timed = {}
        for backend in BACKENDS[options.device]:
            try:
                call(backend)
                timed[backend] = lambda backend=backend, call=call: call(backend)
            except REFUSALS as error:
                print(f"{name:14} {backend:7} no time: {refusal(error)}")
        for backend, seconds in interleaved(timed, options.repeats, options.device).items():
            print(f"{name:14} {backend:7} {1e6 * quantile(seconds, 0.5):9.1f} µs")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

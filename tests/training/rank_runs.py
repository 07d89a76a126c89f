# SPDX-License-Identifier: Apache-2.0
"""``samfast finetune`` with its gradients written down, in two processes or in one.

python rank_runs.py FOLDER finetune … runs the command line in two ranks that are forked after the
imports. Each leaves in FOLDER/{rank}.pt its exit code and what ``recorded`` found.
"""

import csv
import multiprocessing
import os
import socket
import sys
from pathlib import Path

import pytest
import torch
from stock_runs import double

import samfast
from samfast import cli
from samfast.training import build, loop

RANKS = 2
STILL = ["--lr", "1e-30", "--weight-decay", "0", "--clip", "0"]  # the same weights in every step


def recorded(arguments, change=lambda patch: None) -> tuple[int, dict]:
    """The exit code, and the gradients of each step, the loss and the scores.

    change: more to replace, by pytest's ``MonkeyPatch``
    """
    found, steps = {}, []
    with pytest.MonkeyPatch.context() as patch:
        step, attach = torch.optim.AdamW.step, loop.attach_method

        def stepping(self, *args):
            gradients = [p.grad.clone() for group in self.param_groups for p in group["params"]]
            found.update({f"step {len(steps)}, {i}": g for i, g in enumerate(gradients)})
            steps.append(None)
            return step(self, *args)

        def attached(sam, *args):
            model = attach(sam, *args)
            generator = torch.Generator().manual_seed(2)
            with torch.no_grad():  # adapters start at 0, where most of their gradients are 0
                for _, parameter in samfast.trainable_parameters(model):
                    parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
            return model

        patch.setattr(torch.optim.AdamW, "step", stepping)
        patch.setattr(loop, "attach_method", attached)
        change(patch)
        code = cli.main(list(map(str, arguments)))
    output = Path(arguments[arguments.index("--output") + 1])
    if code == 0 and (output / "metrics.csv").exists():
        with (output / "metrics.csv").open() as file:
            (row,) = csv.DictReader(file)
        for name, value in row.items():
            if name.startswith(("val_", "train_loss")):
                found[name] = torch.tensor(float(value), dtype=torch.float64)
    return code, found


def in_float64(patch) -> None:
    """The whole run, with the random numbers of float32."""
    made, noise = build.build_sam, torch.randn
    patch.setattr(build, "build_sam", lambda *args, **options: double(made(*args, **options)))
    patch.setattr(torch.Tensor, "float", torch.Tensor.double)
    patch.setattr(
        torch, "randn", lambda *s, dtype=None, **o: noise(*s, dtype=torch.float32, **o).to(dtype)
    )


def work(rank: int, port: int, folder: Path, arguments: list[str]) -> None:
    torch.set_num_threads(1)
    place = {"RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": RANKS}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    torch.save(recorded(arguments), folder / f"{rank}.pt")


def main(folder: Path, arguments: list[str]) -> int:
    import accelerate.data_loader  # noqa: F401
    import matplotlib.figure  # noqa: F401
    import torch.utils.tensorboard  # noqa: F401
    import torchmetrics.classification  # noqa: F401

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    context = multiprocessing.get_context("fork")  # before autograd, which allows no fork
    ranks = [
        context.Process(target=work, args=(rank, port, folder, arguments)) for rank in range(RANKS)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    return any(rank.exitcode for rank in ranks)


if __name__ == "__main__":
    from samfast.integrations.torchvision import declare_missing_schemas

    declare_missing_schemas()
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))

# SPDX-License-Identifier: Apache-2.0
"""``samfast finetune`` with its gradients written down, in two processes or in one.

python rank_runs.py FOLDER CHANGE finetune … runs the command line in two ranks that are forked
after the imports. Each leaves in FOLDER/{rank}.pt its exit code and what ``recorded`` found.
CHANGE is a function of this file.
"""

import csv
import importlib
import multiprocessing
import os
import socket
import sys
from pathlib import Path

import accelerate.data_loader  # noqa: F401
import pytest
import torch
import torch.utils.tensorboard
from stock_runs import double

import samfast
from samfast import cli, command_line  # noqa: F401
from samfast.integrations import segment_anything
from samfast.integrations.torchvision import declare_missing_schemas
from samfast.training import build, loop, mask_goal, one_mask
from samfast.training.scored import Scored

RANKS = 2
STILL = ["--lr", "1e-30", "--weight-decay", "0", "--clip", "0"]  # the same weights in every step


def recorded(arguments, change) -> tuple[int, dict]:
    """The exit code, and the gradients of each step, the loss and the scores.

    change: replaces more by pytest's ``MonkeyPatch``
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
        patch.setattr(loop, "curves_png", lambda *_: b"")
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


def as_it_is(patch) -> None:
    """Nothing is replaced."""


def light(patch) -> None:
    """Two blocks, and no scores: torchmetrics takes longest of all to import."""
    made = build.build_sam

    def short(*args, **options):
        sam = made(*args, **options)
        sam.image_encoder.blocks = sam.image_encoder.blocks[1:3]
        return sam

    patch.setattr(build, "build_sam", short)
    row = dict.fromkeys(one_mask.OneMask.columns, 0.5)
    patch.setattr(one_mask.OneMask, "scores", lambda *_: Scored(row, []))
    patch.setattr(mask_goal, "all_foreground_scores", lambda *_: (0.5, 0.5))


def second_fails(patch) -> None:
    """In its first step, which the first rank waits for."""
    loss = loop.Run.loss

    def failing(self, batch, weights=None):
        if self.accelerator.process_index == 1:
            raise FloatingPointError("the second has enough")
        return loss(self, batch, weights)

    patch.setattr(loop.Run, "loss", failing)


def second_has_a_bug(patch) -> None:
    def wrong(self, batch, weights=None):
        if self.accelerator.process_index == 1:
            raise TypeError("a slip")
        return loss(self, batch, weights)

    loss = loop.Run.loss
    patch.setattr(loop.Run, "loss", wrong)


def first_cannot_write(patch) -> None:
    def save(self, folder, row):
        raise OSError(f"{folder}: no room")

    patch.setattr(loop.Run, "save", save)


def light_in_float64(patch) -> None:
    light(patch)
    in_float64(patch)


def in_float64(patch) -> None:
    """The whole run, with the random numbers of float32."""
    made, noise = build.build_sam, torch.randn
    patch.setattr(build, "build_sam", lambda *args, **options: double(made(*args, **options)))
    patch.setattr(torch.Tensor, "float", torch.Tensor.double)
    patch.setattr(
        torch, "randn", lambda *s, dtype=None, **o: noise(*s, dtype=torch.float32, **o).to(dtype)
    )


def work(rank: int, port: int, folder: Path, change: str, arguments: list[str]) -> None:
    torch.set_num_threads(1)
    place = {"RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": RANKS}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    torch.save(recorded(arguments, globals()[change]), folder / f"{rank}.pt")


def main(folder: Path, change: str, arguments: list[str]) -> int:
    segment_anything.load()
    importlib.import_module("torch._dynamo")  # what both would import, once
    if not change.startswith("light"):
        importlib.import_module("torchmetrics.classification")

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    context = multiprocessing.get_context("fork")  # before autograd, which allows no fork
    words = port, folder, change, arguments
    ranks = [context.Process(target=work, args=(rank, *words)) for rank in range(RANKS)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    return any(rank.exitcode for rank in ranks)


if __name__ == "__main__":
    declare_missing_schemas()
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:]))

# SPDX-License-Identifier: Apache-2.0
"""Small data folders made of bright rectangles, and the command line as a function."""

import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from samfast import cli
from samfast.models import build_sam


def rectangle(seed: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """A noisy RGB picture of one bright rectangle, and where that is."""
    rng = np.random.default_rng(seed)
    mask = np.zeros((height, width), bool)
    y, x = rng.integers(0, height // 2), rng.integers(0, width // 2)
    mask[y : y + height // 3, x : x + width // 3] = True
    image = rng.integers(0, 80, (height, width, 3)) + 150 * mask[..., None]
    return image.astype(np.uint8), mask


def fill_folder(folder: Path, count: int = 6) -> Path:
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    for i in range(count):
        image, mask = rectangle(i, 48 + 4 * i, 64)
        Image.fromarray(image).save(folder / "images" / f"p{i}.png")
        Image.fromarray(mask.astype(np.uint8) * 255).save(folder / "masks" / f"p{i}.png")
    return folder


@pytest.fixture(autouse=True)
def heard():
    """Signals as a program finds them that nobody started in the background, or under nohup."""
    usual = {
        "SIGINT": signal.default_int_handler,
        "SIGTERM": signal.SIG_DFL,
        "SIGHUP": signal.SIG_DFL,
    }
    present = {getattr(signal, name): own for name, own in usual.items() if hasattr(signal, name)}
    before = {number: signal.signal(number, own) for number, own in present.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def data(tmp_path) -> Path:
    """A data folder of six pairs of different sizes, p0 .. p5."""
    return fill_folder(tmp_path / "data")


@pytest.fixture(scope="session")
def shared_data(tmp_path_factory) -> Path:
    """The same for tests that only read it."""
    return fill_folder(tmp_path_factory.mktemp("shared") / "data")


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> Path:
    """Weights of vit_tiny at 64 pixels."""
    path = tmp_path_factory.mktemp("checkpoint") / "tiny.pth"
    torch.save(build_sam("vit_tiny", image_size=64, seed=3).state_dict(), path)
    return path


class Refused:
    """Runs a command that must end in one sentence, exit code 2 and no output."""

    def __init__(self, capfd, folder: Path):
        self.capfd = capfd
        self.output = folder / "refused"

    def __call__(self, *argv, pattern: str) -> None:
        arguments = [str(a) for a in argv] + ["--output", str(self.output)]
        self.capfd.readouterr()
        code = cli.main(arguments)
        err = self.capfd.readouterr().err
        assert code == 2
        assert err.startswith("samfast: ") and err.endswith("\n") and err.count("\n") == 1, err
        assert re.search(pattern, err), err
        assert not self.output.exists()


@pytest.fixture
def refused(capfd, tmp_path) -> Refused:
    return Refused(capfd, tmp_path)

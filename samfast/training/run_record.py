# SPDX-License-Identifier: Apache-2.0
"""What settings.json says of a run next to its options: versions, device, command, processes."""

import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import torch

import samfast

_PACKAGES = ("accelerate", "segment_anything", "numpy")


def run_record(device: torch.device, processes: int, command: Sequence[str] | None) -> dict:
    """The keys ``versions``, ``device``, ``command`` and ``processes``, as JSON has them.

    device: that this process trains on   processes: how many train together
    command: the words of the command line after the program's name; None from Python
    """
    return {
        "versions": versions(),
        "device": {"type": device.type, "name": _device_name(device)},
        "command": None if command is None else list(command),
        "processes": processes,
    }


def versions() -> dict[str, str | None]:
    """By package; None for one without a version on record."""
    found: dict[str, str | None] = {
        "samfast": samfast.__version__,
        "python": platform.python_version(),
    }
    found["torch"] = torch.__version__
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def _device_name(device: torch.device) -> str:
    """A GPU's product name, or the processor's as the system calls it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:  # on other systems than Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(filter(None, names), platform.processor() or platform.machine())

# SPDX-License-Identifier: Apache-2.0
"""Which of how many processes this one is, as torchrun, accelerate or mpirun put it.

Importing this loads no torch.
"""

import os
from typing import NamedTuple

# What torchrun calls each number, then the names of MPI's libraries.
_NAMES = {
    "RANK": ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK"),
    "WORLD_SIZE": ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"),
    "LOCAL_RANK": (
        "LOCAL_RANK",
        "MPI_LOCALRANKID",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "MV2_COMM_WORLD_LOCAL_RANK",
    ),
    "LOCAL_WORLD_SIZE": (
        "LOCAL_WORLD_SIZE",
        "MPI_LOCALNRANKS",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
        "MV2_COMM_WORLD_LOCAL_SIZE",
    ),
}
_PORT = "29500"  # torch's own
_TORCHRUN = "torchrun --nproc-per-node N -m samfast finetune …"


class Launched(NamedTuple):
    """rank: 0 is the one that prints and writes   processes: how many there are in all"""

    rank: int
    processes: int

    @property
    def first(self) -> bool:
        return self.rank == 0


ALONE = Launched(0, 1)


def launched() -> Launched:
    """This process's place; ValueError when the environment names several but not which one."""
    processes = _number("WORLD_SIZE")
    rank = _number("RANK")
    if processes is None and rank is None and _left_alone_by_accelerate():
        raise ValueError(
            "accelerate launch started only one of several processes, as it does with --cpu or "
            f"one GPU; use ACCELERATE_USE_CPU=1 {_TORCHRUN}, or ask it for --num_processes 1"
        )
    if processes is None or processes <= 1:
        return ALONE
    if rank is None:
        raise ValueError(
            f"WORLD_SIZE is {processes}, but RANK is not set; start all processes with "
            f"{_TORCHRUN}, or unset WORLD_SIZE"
        )
    if not 0 <= rank < processes:
        raise ValueError(f"RANK is {rank}; it must be from 0 to {processes - 1}")
    return Launched(rank, processes)


def tell_torch() -> None:
    """Give torch and accelerate MPI's numbers under torchrun's names."""
    found = {name: _number(name) for name in _NAMES}
    os.environ.update({n: str(value) for n, value in found.items() if value is not None})
    if found["LOCAL_WORLD_SIZE"] in (None, found["WORLD_SIZE"]):  # on one machine
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", _PORT)


def _number(name: str) -> int | None:
    for known in _NAMES[name]:
        text = os.environ.get(known, "")
        if text == "":
            continue
        try:
            return int(text)
        except ValueError:
            raise ValueError(f"{known} is {text!r}, not a whole number") from None
    return None


def _left_alone_by_accelerate() -> bool:
    """It sets an address only for several processes, and each of these would have a rank."""
    return "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ

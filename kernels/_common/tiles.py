# SPDX-License-Identifier: Apache-2.0
"""Tile choice: a function of the sizes over data in JSON, no search at run time.

A file holds "default" and, for a device that was measured, a table under its name: stage -> bytes
per element -> widest padded rank -> [BLOCK_M, BLOCK_N, num_warps]. A fourth number is the bound on
registers (maxnreg), given if the compiler would otherwise spill before it takes all it may have.
"""

import functools
import json
from pathlib import Path

import torch


@functools.cache
def _table(path: Path, device_name: str) -> dict:
    tables = json.loads(path.read_text(encoding="utf-8"))
    return tables["default"] | tables.get(device_name, {})


@functools.cache
def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "default"


def tile(path: Path, stage: str, ranks: int, x: torch.Tensor) -> dict:
    """BLOCK_M, BLOCK_N, BLOCK_R and num_warps for a stage; BLOCK_R is ranks padded to 16, 32, …"""
    block_r = max(16, 1 << (ranks - 1).bit_length())
    sizes = _table(path, _device_name(x.device))[stage][str(x.element_size())]
    widest = min(int(key) for key in sizes if int(key) >= block_r)
    block_m, block_n, warps, *registers = sizes[str(widest)]
    sizes = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_R": block_r, "num_warps": warps}
    return sizes | ({"maxnreg": registers[0]} if registers else {})

# SPDX-License-Identifier: Apache-2.0
"""Ceilings of this machine, measured once per machine and torch version and saved with a date.

The file is ceilings.json in SAMFAST_CACHE, else in samfast/ of XDG_CACHE_HOME, else of ~/.cache.
"""

import datetime
import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch

from samfast.files.placing import write_whole
from samfast.profiling import machine

LIMITS = ("arithmetic", "memory", "launches")
_RATES, _WORDS = ("gemm", "copy", "launch"), ("product", "date")


class Ceilings(NamedTuple):
    """gemm: FLOP/s of the fastest product   copy: bytes/s   launch: seconds of a tiny call

    product: which product was the fastest   remark: why they could not be kept, or None
    """

    machine: str
    dtype: str
    gemm: float
    copy: float
    launch: float
    product: str
    date: str
    remark: str | None = None

    def least_seconds(self, flop: int, size: int, launches: float) -> dict[str, float]:
        """Seconds by what would bind."""
        times = (flop / self.gemm, size / self.copy, launches * self.launch)
        return dict(zip(LIMITS, times, strict=True))


def cache_folder() -> Path:
    """Folder of the measured ceilings."""
    if own := os.environ.get("SAMFAST_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "samfast"


def ceilings(device: str, dtype: torch.dtype, fresh: bool = False) -> Ceilings:
    """Those of this machine, device, torch and dtype; measured where they are not on record.

    fresh: measure anew, and keep that
    """
    where, named, key = _key(device, dtype)
    known, remark = _read()
    row = known.get(key)
    if row is not None and not fresh:
        return Ceilings(where, named, **row)
    row = _measured(device, dtype)
    remark = _write({**known, key: row}) if remark is None else remark
    return Ceilings(where, named, **row, remark=remark)


def measured_again(device: str, dtype: torch.dtype, before: Ceilings) -> Ceilings:
    """Keep what is faster of what was measured before and now, and return it.

    A machine that was busy then was measured too slow, one that is busy now would be.
    """
    where, named, key = _key(device, dtype)
    row = _measured(device, dtype)
    if row["gemm"] < before.gemm:
        row["gemm"], row["product"] = before.gemm, before.product
    row["copy"] = max(row["copy"], before.copy)
    row["launch"] = min(row["launch"], before.launch)
    known, remark = _read()
    remark = _write({**known, key: row}) if remark is None else remark
    return Ceilings(where, named, **row, remark=remark)


def _key(device: str, dtype: torch.dtype) -> tuple[str, str, str]:
    """The machine, the dtype, and the name of both, torch and the precision in the file."""
    where, named = machine.name(device), str(dtype).removeprefix("torch.")
    key = " | ".join((where, f"torch {torch.__version__}", named, _precision(device)))
    return where, named, key


def _measured(device: str, dtype: torch.dtype) -> dict:
    gemm, product = machine.products(device, dtype, machine.PRODUCTS[device])
    return {
        "gemm": gemm,
        "copy": machine.copies(device, machine.COPIED[device]),
        "launch": machine.launch_seconds(device),
        "product": product,
        "date": datetime.date.today().isoformat(),
    }


def _precision(device: str) -> str:
    return (
        f"float32 products {torch.get_float32_matmul_precision() if device == 'cuda' else 'full'}"
    )


def _read() -> tuple[dict, str | None]:
    """The rows that can be used, and why there will be none."""
    path = cache_folder() / "ceilings.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}, None
    except OSError as error:
        return (
            {},
            f"the ceilings in {path} cannot be read ({error.strerror}); they were measured again",
        )
    except ValueError:
        return {}, None  # written anew
    rows = found.items() if isinstance(found, dict) else ()
    return {key: row for key, row in rows if _is_right(row)}, None


def _is_right(row: Any) -> bool:
    if not isinstance(row, dict) or set(row) != {*_RATES, *_WORDS}:
        return False
    rates = (row[name] for name in _RATES)
    numbers = all(isinstance(v, float) and math.isfinite(v) and v > 0 for v in rates)
    return numbers and all(isinstance(row[name], str) for name in _WORDS)


def _write(rows: dict) -> str | None:
    """Keep them; returns why they could not be kept."""
    folder = cache_folder()
    path = folder / "ceilings.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(rows, indent=1).encode(), durable=False)
    except OSError as error:
        why = getattr(error, "strerror", None) or error
        return f"the ceilings were measured again, but {path} cannot be written ({why})"
    return None

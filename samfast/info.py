# SPDX-License-Identifier: Apache-2.0
"""``samfast info``: installed versions, the backend of each operation, and a self-check."""

import importlib
import importlib.metadata
import json as json_format
import platform
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from samfast import __version__, backends
from samfast.integrations.torchvision import operators_problem
from samfast.kernels import operations
from samfast.kernels._common.budget import Budget

OPERATIONS = operations("example.py")
_OTHERS = ("triton", "segment-anything", "torchvision", "peft", "transformers", "accelerate")
_CODE = {"default": "plain", "avx2": "AVX2", "avx512": "AVX-512"}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def main(check: bool = False, json: bool = False) -> int:
    """Print the summary; with check, run every operation and backend. Return the exit code."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    record = summary(device)
    if check:
        record["check"] = self_check(device)
    if json:
        print(json_format.dumps(record, indent=2))
    else:
        print(_as_text(record))
    failed = any(row["error"] for row in record.get("check", []))
    return 1 if failed else 0


def summary(device: torch.device) -> dict[str, Any]:
    """Return versions, the build, and each operation's backend with the sentences."""
    versions = {"samfast": __version__, "python": platform.python_version()}
    versions["torch"] = torch.__version__
    for name in _OTHERS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    build = backends.build_record()
    native = backends.native_missing()
    return {
        "versions": versions,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "build": build["build"],
        "build_reason": build["reason"],
        "native": "loaded" if native is None else native,
        "cpu_capability": backends.cpu_capability(),
        "torchvision_problem": operators_problem(),
        "operations": {name: _choices(name, device) for name in OPERATIONS},
    }


def self_check(device: torch.device) -> list[dict[str, Any]]:
    """Compare every operation, backend and dtype with float64, within the error budget."""
    rows = []
    for name in OPERATIONS:
        example = _example(name)
        for dtype in _DTYPES:
            stock, exact = (
                partial(example.run, "reference", device, kind) for kind in (dtype, torch.float64)
            )
            budget = Budget(stock, exact, dtype)
            for backend in backends.NAMES[1:]:
                row: dict[str, Any] = {
                    "operation": name, "backend": backend, "dtype": str(dtype)[6:]
                }  # fmt: skip
                row["skipped"] = _missing(example, backend, device, dtype)
                row["error"] = None
                if row["skipped"] is None:
                    ours = example.run(backend, device, dtype)
                    row["error"] = _first_problem(example.RESULTS, budget.problems(ours))
                rows.append(row)
    return rows


def _example(operation: str) -> Any:
    return importlib.import_module(f"samfast.kernels.{operation}.example")


def _missing(example: Any, backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    interpreted = backend == "triton" and device.type == "cpu" and dtype == torch.bfloat16
    if interpreted and example.missing(backend, device, dtype) is None:
        return "Triton's interpreter multiplies bfloat16 matrices wrongly"
    return example.missing(backend, device, dtype)


def _first_problem(names: Sequence[str], problems: Mapping[str, str]) -> str | None:
    return next((f"{names[int(place)]}: {text}" for place, text in problems.items()), None)


def _choices(operation: str, device: torch.device) -> dict[str, Any]:
    example = _example(operation)

    def supports(backend: str) -> str | None:
        return example.missing(backend, device, torch.float32)

    sentences = {name: supports(name) for name in backends.NAMES[1:]}
    requested = backends.requested("auto")
    if requested != "auto" and sentences[requested] is not None:
        choice = f"none: SAMFAST_BACKEND={requested}, but {sentences[requested]}"
    else:
        choice = backends.resolve(operation, requested, device, supports)
    return {
        "backend": choice,
        "cannot": {name: sentence for name, sentence in sentences.items() if sentence},
    }


def _code(capability: str | None) -> str:
    if capability is None:
        return ""
    choices = "|".join(_CODE)
    return f", {_CODE[capability]} code (SAMFAST_CPU_CAPABILITY={choices} chooses)"


def _as_text(record: dict[str, Any]) -> str:
    lines = [f"samfast {record['versions']['samfast']} on {record['device']}"]
    lines += [f"  {name} {version}" for name, version in list(record["versions"].items())[1:]]
    lines.append(f"build: {record['build']} ({record['build_reason']})")
    lines.append(f"native extension: {record['native']}{_code(record['cpu_capability'])}")
    if record["torchvision_problem"] is not None:
        lines.append(record["torchvision_problem"])
    for name, choice in record["operations"].items():
        lines.append(f"{name}: {choice['backend']}")
        lines += [f"  not {backend}: {why}" for backend, why in choice["cannot"].items()]
    for row in record.get("check", []):
        verdict = f"skipped, {row['skipped']}" if row["skipped"] else row["error"] or "ok"
        lines.append(f"check {row['operation']} {row['backend']} {row['dtype']}: {verdict}")
    return "\n".join(lines)

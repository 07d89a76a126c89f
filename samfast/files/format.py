# SPDX-License-Identifier: Apache-2.0
"""The format of an adapter folder, PEFT's where possible, and reading one without a model.

adapter_model.safetensors  every trained tensor, shared ones once; its header carries the record
adapter_config.json        PEFT's configuration with the record inside, or only the record

The record says what the tensors belong to: method, layers, base model, image size, head, classes.
The copy in the tensors' file is the one that counts. One rename puts both in place, so a killed
write leaves the folder as it was. The record holds digests of the tensors and of itself.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch

from samfast.adapters.finite import not_finite
from samfast.adapters.method import Method
from samfast.files import peft_format, samed_format
from samfast.files.record import check_base, check_record
from samfast.methods.registry import method_from_config
from samfast.models.checkpoints import read_file

TENSORS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
VERSION = 1


@dataclass(frozen=True)
class AdapterFile:
    """An adapter folder, read and checked without a model. tensors: by the model's full names.

    numbered: the file numbers its layers, so the names here cover all blocks
    """

    folder: Path
    record: dict[str, Any]
    method: Method
    layers: tuple[str, ...]
    tensors: dict[str, torch.Tensor]
    numbered: bool = False


def read_adapter(folder: str | os.PathLike) -> AdapterFile:
    """Read an adapter folder and check it, without a model.

    It also reads a file of SAMed (.pth, .pt) or Sam_LoRA (.safetensors). Raises FileNotFoundError
    for a missing file and ValueError for a broken one.
    """
    folder = Path(folder)
    if not folder.exists():
        raise FileNotFoundError(f"adapter folder {folder} does not exist")
    if folder.is_file() and folder.suffix in samed_format.SUFFIXES:
        return _read_numbered(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file, not an adapter folder")
    for name in (CONFIG, TENSORS):
        if not (folder / name).exists():
            pickled = name == TENSORS and (folder / "adapter_model.bin").exists()
            hint = "; adapter_model.bin is a pickle, which samfast cannot read" if pickled else ""
            raise FileNotFoundError(f"adapter folder {folder} has no {name}{hint}")
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name} is not a regular file")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{folder / CONFIG} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{folder / CONFIG} holds {type(config).__name__}, not an object")
    tensors, header = _read_tensors(folder / TENSORS)
    try:
        return _parse(folder, config, tensors, header)
    except ValueError as error:
        raise ValueError(f"adapter {folder} cannot be used: {error}") from None


def read_adapter_config(folder: str | os.PathLike) -> dict[str, Any]:
    """Read an adapter's record: method, layers, base, image_size, head, classes, extra."""
    return read_adapter(folder).record


def dtype_name(dtype: torch.dtype | None) -> str | None:
    """Return a dtype's name in files."""
    return None if dtype is None else str(dtype).removeprefix("torch.")


def digest(record: dict[str, Any], tensors: dict[str, torch.Tensor]) -> str:
    """Return the sha256 of the record and every tensor's name, dtype, shape and bytes."""
    found = hashlib.sha256(json.dumps(record, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        found.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file: {error}") from None


def _parse(
    folder: Path,
    config: dict[str, Any],
    tensors: dict[str, torch.Tensor],
    header: dict[str, str],
) -> AdapterFile:
    """Read method, layers and tensors from the files; raise ValueError with only the reason."""
    if "samfast" not in header:
        mapping = config.get("auto_mapping")
        ours = isinstance(mapping, dict) and "samfast" in mapping
        if ours or "peft_type" not in config:
            raise ValueError(f"{TENSORS} has lost its record, or {CONFIG} belongs to another file")
        lora, layers, tensors = peft_format.read_lora(config, tensors)
        _check_finite(tensors)
        base = config.get("base_model_name_or_path")
        check_base({"name": base})
        record = _record_of_others(lora, layers, base)
        return AdapterFile(folder, record, lora, layers, tensors)
    record = _record(header["samfast"], tensors)
    if any(key.startswith(peft_format.PREFIX) for key in tensors):
        tensors = {peft_format.from_key(key): value for key, value in tensors.items()}
    _check_finite(tensors)
    method = method_from_config(record.get("method"))
    return AdapterFile(folder, record, method, tuple(record["layers"]), tensors)


def _read_numbered(path: Path) -> AdapterFile:
    try:
        method, layers, tensors = samed_format.read_numbered(path, read_file(path))
        _check_finite(tensors)
    except ValueError as error:
        raise ValueError(f"adapter {path} cannot be used: {error}") from None
    record = _record_of_others(method, layers, None)
    return AdapterFile(path, record, method, layers, tensors, numbered=True)


def _record_of_others(method: Method, layers: tuple[str, ...], base: str | None) -> dict[str, Any]:
    """Make a record for an adapter that samfast did not write."""
    unknown = ("base_digest", "base_identity", "base_dtype", "image_size", "head", "classes")
    return {
        "method": method.config(),
        "layers": list(layers),
        "base": {"name": base},
        **dict.fromkeys(unknown),
        "extra": {},
    }


def _check_finite(tensors: dict[str, torch.Tensor]) -> None:
    if (name := not_finite(tensors)) is not None:
        raise ValueError(f"{name} contains NaN or infinity")


def _record(text: str, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Read the record of samfast's own file and check it against the tensors."""
    try:
        content = json.loads(text)
        record, stored, version = content["record"], content["sha256"], content["record"]["format"]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise ValueError(f"the record in {TENSORS} is broken") from None
    if version != VERSION:
        raise ValueError(f"its format is {version!r}, but this samfast reads {VERSION}")
    if digest(record, tensors) != stored:
        raise ValueError(f"{TENSORS} is damaged: its content does not match its digest")
    check_record(record)
    return record

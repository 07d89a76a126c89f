# SPDX-License-Identifier: Apache-2.0
"""Read SAM's weights from files, and fit them to a model or say why they do not fit.

It reads PyTorch files (``.pth``, weights only) and safetensors, with segment_anything's or Hugging
Face's names, and folders of a Hugging Face ``SamModel``. It executes nothing in a file.
"""

import json
import os
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from samfast.adapters.finite import not_finite
from samfast.adapters.foreign import Foreign
from samfast.models import hf_names
from samfast.models.architectures import ARCHITECTURES
from samfast.models.state_search import find_sam, shown

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # in a Hugging Face folder, best first

# What torch.load raises for damaged bytes: anything, depending on what its unpickler meets.
_DAMAGE = (
    RuntimeError,
    pickle.UnpicklingError,
    EOFError,
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    OverflowError,
    struct.error,
    zipfile.BadZipFile,
)


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a checkpoint's tensors by segment_anything's names, on the CPU, as they were stored.

    It finds a SAM in nested dicts and behind a prefix. If there are several, it takes the one under
    "model", "state_dict" or "model_state_dict". A warning names the others and tensors left out.
    Tensors may be mapped from the file, so copy what you keep. Raises FileNotFoundError if `path`
    or a part of it does not exist, and ValueError if it holds no SAM or several.
    """
    state, notes = _read(Path(path))
    _warn(path, notes)
    return state


def _warn(path: str | os.PathLike[str], notes: list[str]) -> None:
    if notes:
        warnings.warn(f"checkpoint {path}: {'; '.join(notes)}", stacklevel=3)


def _read(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Read a checkpoint; return its tensors and clauses about what else the file holds."""
    if path.is_dir():
        content = _read_folder(path)
    elif path.is_file():
        content = read_file(path)
    elif path.exists():
        raise ValueError(f"checkpoint {path} is neither a file nor a folder")
    else:
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    state, notes = _sam_state(content, path)
    if hf_names.is_hugging_face(state):
        state = hf_names.to_segment_anything(state)
    return state, notes


def load_checkpoint(sam: nn.Module, name: str, path: str | os.PathLike[str]) -> None:
    """Give `sam`, built as model `name` on any device (meta too), the weights in `path`.

    Copies on the CPU replace sam's tensors and keep their dtype. Positions stored for another image
    size are interpolated. Warns of tensors that the model does not have. Raises as read_checkpoint
    does. Raises ValueError if the checkpoint is of another model, lacks a tensor, or has one of
    another shape or with NaN or infinity.
    """
    state, notes = _read(Path(path))
    wanted = sam.state_dict()
    _check_encoder(state, wanted, name, path)
    _resize_positions(state, sam)
    _check_tensors(state, wanted, name, path)
    if unknown := [key for key in state if key not in wanted]:
        notes.append(
            f"{some(unknown)} are left out, because {name} has nothing with that name; it may "
            "not compute what the saved model did"
        )
    copies = {
        key: state[key].to(tensor.dtype, copy=True, memory_format=torch.contiguous_format)
        for key, tensor in wanted.items()
    }
    if (bad := not_finite(copies)) is not None:
        raise ValueError(f"checkpoint {path} contains NaN or infinity in {bad}")
    _warn(path, notes)
    sam.load_state_dict(copies, assign=True)


def read_file(path: Path) -> Any:
    """Load a safetensors or PyTorch file on the CPU; execute nothing in it."""
    if path.suffix.lower() == ".safetensors":
        try:
            return safetensors.torch.load_file(path)
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise ValueError(
                f"checkpoint {path} is not a complete safetensors file: {error}"
            ) from None
    try:
        # Only PyTorch's zip format can be mapped; the older format is read into memory.
        return torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except _DAMAGE as error:
        unsafe = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
        if unsafe:
            raise ValueError(
                f"checkpoint {path} names {unsafe[1]!r}, which tensors do not need, and samfast "
                "runs no code from files; if you trust the file, save only its state dict"
            ) from None
        raise ValueError(f"checkpoint {path} is damaged or not a PyTorch checkpoint") from error


def _read_folder(folder: Path) -> dict[str, Any]:
    config = _read_json(folder / "config.json", "a folder of a Hugging Face SamModel")
    if config.get("model_type") != "sam":
        raise ValueError(
            f"checkpoint folder {folder} holds a model of type {config.get('model_type')!r}, "
            "not SAM ('sam')"
        )
    for weights in _WEIGHTS:
        if (folder / weights).is_file():
            return read_file(folder / weights)
        index = folder / f"{weights}.index.json"
        if index.is_file():
            return _read_shards(index)
    raise FileNotFoundError(f"checkpoint folder {folder} has neither {' nor '.join(_WEIGHTS)}")


def _read_shards(index: Path) -> dict[str, Any]:
    files = _read_json(index, "a sharded checkpoint").get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise ValueError(f"{index} has no weight_map from names to files")
    state: dict[str, Any] = {}
    for file in sorted(set(files.values())):
        shard = index.parent / file
        if Path(file).name != file:
            raise ValueError(f"{index} names the file {file!r}, which is not in its own folder")
        if not shard.is_file():
            raise FileNotFoundError(f"{index} names the file {file!r}, which does not exist")
        content = read_file(shard)
        if not isinstance(content, Mapping):
            raise ValueError(f"checkpoint {shard} holds a {type(content).__name__}, not tensors")
        state.update(content)
    absent = sorted(set(files) - set(state))
    if absent:
        raise ValueError(f"{index} lists {some(absent)}, which its files do not hold")
    return state


def _read_json(path: Path, owner: str) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist, but {owner} has it")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a readable JSON file: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a JSON object")
    return content


def _sam_state(content: Any, path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Return the SAM's tensors, checked, and clauses about what else the file holds."""
    if not isinstance(content, Mapping):
        raise ValueError(f"checkpoint {path} holds a {type(content).__name__}, not tensors by name")
    try:
        found = find_sam(content)
    except ValueError as error:
        raise ValueError(f"checkpoint {path} {error}") from None
    if found is None:
        keys = [str(key) for key in content]
        raise ValueError(f"checkpoint {path} holds no SAM image encoder; its keys are {some(keys)}")
    state: dict[str, Any] = {}
    for key, name in found.names.items():
        tensor = found.values[key]
        if not isinstance(tensor, Tensor):
            kind = type(tensor).__name__
            raise ValueError(f"checkpoint {path} holds {key!r} as {kind}, not as a tensor")
        dense = tensor.layout == torch.strided and tensor.device.type == "cpu"
        if not dense or not tensor.is_floating_point():
            raise ValueError(
                f"checkpoint {path} holds {key} as {tensor.dtype} ({tensor.layout} on "
                f"{tensor.device}), but SAM's weights are dense floating-point numbers"
            )
        if name in state:
            raise ValueError(f"checkpoint {path} holds {name} twice, once under {key}")
        state[name] = tensor
    notes = []
    if found.copies:
        copies = " and ".join(map(shown, found.copies))
        notes.append(f"the weights are {shown(found.place)}, not {copies}")
    if found.left:
        notes.append(f"{some(found.left)} are left out, since they do not belong to the SAM")
    return state, notes


def _encoder_size(state: Mapping[str, Tensor]) -> tuple[int, int] | None:
    """Return (width, blocks) of the image encoder in a state dict; None if there is none."""
    patches = state.get("image_encoder.patch_embed.proj.weight")
    if patches is None or patches.ndim != 4:
        return None
    blocks = {key.split(".")[2] for key in state if key.startswith("image_encoder.blocks.")}
    return patches.shape[0], len(blocks)


def _check_encoder(
    state: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    name: str,
    path: str | os.PathLike[str],
) -> None:
    found, needed = _encoder_size(state), _encoder_size(wanted)
    if found is None or needed is None:
        raise ValueError(
            f"checkpoint {path} holds no SAM image encoder; its tensors are {some(list(state))}"
        )
    if found != needed:
        sizes = {
            (known.width, known.depth): key for key, known in ARCHITECTURES.items() if key != "sam3"
        }
        raise ValueError(
            f"checkpoint {path} is of {sizes.get(found, 'an unknown model')} "
            f"(width {found[0]}, {found[1]} blocks), "
            f"but the model is {name} (width {needed[0]}, {needed[1]} blocks)"
        )


def _check_tensors(
    state: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    name: str,
    path: str | os.PathLike[str],
) -> None:
    differences = []
    missing = [key for key in wanted if key not in state]
    if missing:
        differences.append(f"lacks {some(missing)}")
    shapes = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(wanted[key].shape)}"
        for key in wanted
        if key in state and state[key].shape != wanted[key].shape
    ]
    if shapes:
        differences.append(f"has {some(shapes)}")
    unexpected = [key for key in state if key not in wanted]
    if unexpected and differences:
        differences.append(f"has the unknown {some(unexpected)}")
    if differences:
        raise ValueError(f"checkpoint {path} does not fit {name}: it {', '.join(differences)}")


def some(items: list[str], limit: int = 3) -> str:
    """List the first items and the number of the rest, for a sentence."""
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return (", ".join(items[:limit]) or "none") + more


def _resize_positions(state: dict[str, Tensor], sam: Foreign) -> None:
    """Interpolate the positions in `state` to sam's image size, in place.

    The positional embedding [1, n, n, width] is interpolated bilinearly, the relative positions
    [2 n - 1, head_dim] of global blocks linearly, with half-pixel centres and no antialiasing. That
    is common when fine-tuning SAM at other sizes. Windows keep their size, so their tables stay.
    """
    pos_embed = state.get("image_encoder.pos_embed")
    size = sam.image_encoder.pos_embed.shape[1]
    if pos_embed is None or pos_embed.ndim != 4 or pos_embed.shape[1] == size:
        return
    stored = pos_embed.shape[1]
    if stored == 0 or pos_embed.shape[2] != stored:
        return
    maps = pos_embed.permute(0, 3, 1, 2).double()  # [1, width, stored, stored]
    maps = F.interpolate(maps, (size, size), mode="bilinear", align_corners=False)
    state["image_encoder.pos_embed"] = maps.permute(0, 2, 3, 1)
    for i, block in enumerate(sam.image_encoder.blocks):
        for axis in "hw" if block.window_size == 0 else "":
            key = f"image_encoder.blocks.{i}.attn.rel_pos_{axis}"
            if key in state and state[key].ndim == 2 and len(state[key]) == 2 * stored - 1:
                table = state[key].t()[None].double()  # [1, head_dim, 2 stored - 1]
                table = F.interpolate(table, 2 * size - 1, mode="linear", align_corners=False)
                state[key] = table[0].t()

# SPDX-License-Identifier: Apache-2.0
"""Save what was trained to an adapter folder, and load it onto a model again."""

import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import nn

import samfast
from samfast.adapters.adapter import adapter_parameter_names, adapters
from samfast.adapters.attachment import attachment
from samfast.adapters.base_digest import digest_of, fingerprints
from samfast.adapters.finite import not_finite
from samfast.adapters.trained import trained_tensors
from samfast.adapters.wrappers import encoder_name, refuse_new_parameters, unclear, unwrapped
from samfast.files import peft_format
from samfast.files.checking import (
    check_base_of,
    check_finite_base,
    check_same,
    check_same_dtype,
    check_tensors,
    find_layers_of,
    head_for,
    image_size_of,
    level_of,
)
from samfast.files.format import (
    CONFIG,
    TENSORS,
    VERSION,
    AdapterFile,
    digest,
    dtype_name,
    read_adapter,
)
from samfast.files.placing import write_together
from samfast.files.samed_format import check_numbered
from samfast.files.spelling import base_identity, spelled_for
from samfast.integrations.libraries import call_of_owner
from samfast.methods.attach import attach_to, check_attachable
from samfast.models.heads import HEADS, MULTI_TASK, given_head, head_of
from samfast.models.multi_task import MultiTaskSam, tasks_from_config


def save_adapter(
    model: nn.Module,
    folder: str | os.PathLike,
    *,
    head: str | None = None,
    classes: Any = None,
    image_size: int | None = None,
    **extra: Any,
) -> Path:
    """Write every trained tensor of the model to a folder; ``load_adapter`` reads it.

    Plain LoRA, with or without modules trained whole, is saved in PEFT's format. A new folder
    appears in one step, with all its files. An existing adapter is replaced in one step.

    head, classes: what the decoder predicts (default: the model's head, and the tasks of a
        MultiTaskSam)
    image_size: side in pixels (default: the image encoder's)
    extra: JSON values, kept under "extra" in the configuration

    If a wrapper holds one SAM, that SAM is saved. Raises ValueError if nothing was attached, the
    head differs from the model's, a tensor has NaN or infinity, or an extra is not a JSON value.
    Raises OSError if the folder cannot be written.
    """
    folder = Path(folder)
    files = adapter_files(model, folder, head=head, classes=classes, image_size=image_size, **extra)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file, not a folder for an adapter")
    write_together(folder, files)
    return folder


def adapter_files(
    model: nn.Module,
    folder: Path,
    *,
    head: str | None = None,
    classes: Any = None,
    image_size: int | None = None,
    **extra: Any,
) -> dict[str, bytes]:
    """Return what ``save_adapter`` would write, by file name; write nothing."""
    reason, model = unclear(model), unwrapped(model)
    attached = attachment(model)
    if attached is None:
        reason = reason or "; samfast.attach adds one"
        nothing = f"this {type(model).__name__} has no adapter{reason}"
        raise ValueError(call_of_owner(model, "save") or nothing)
    if head in tuple(HEADS) and head != head_of(model):
        raise ValueError(f"head is {head!r}, but the model's is {head_of(model)!r}")
    if classes is None and isinstance(model, MultiTaskSam):
        classes = [task.config() for task in model.tasks]
    tensors = trained_tensors(model)
    if (bad := not_finite(tensors)) is not None:
        raise ValueError(
            f"{bad} contains NaN or infinity, so nothing was written to {folder}; return to the "
            "last good adapter and try a smaller learning rate"
        )
    own = adapter_parameter_names(model)
    beside = {name for name, _ in model.named_parameters() if name in tensors and name not in own}
    config = peft_format.lora_config(model, attached.method, attached.layers, beside)
    record = {
        "format": VERSION,
        "samfast": samfast.__version__,
        "method": attached.method.config(),
        "layers": list(attached.layers),
        **_record_of_base(model, tensors),
        "base_dtype": dtype_name(attached.base_dtype),
        "image_size": image_size_of(model) if image_size is None else image_size,
        "head": head_of(model) if head is None else head,
        "classes": classes,
        "extra": extra,
    }
    try:
        record = json.loads(json.dumps(record, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"the adapter's configuration must be JSON values: {error}") from None
    return _contents(record, config, tensors)


def _record_of_base(model: nn.Module, trained: Collection[str]) -> dict[str, Any]:
    base, prints = getattr(model, "samfast_base", None), fingerprints(model, trained)
    return {
        "base": dict(base) if isinstance(base, dict) else {"name": base},
        "base_digest": digest_of(prints),
        "base_identity": base_identity(prints),
        "encoder": encoder_name(model),
    }


def _contents(
    record: dict[str, Any], config: dict[str, Any] | None, tensors: dict[str, torch.Tensor]
) -> dict[str, bytes]:
    """Return a folder's files; config: PEFT's, None if it cannot express the adapter."""
    if config is None:
        config = record
    else:
        config["auto_mapping"]["samfast"] = record
        tensors = {peft_format.to_key(name): value for name, value in tensors.items()}
    # One entry only: safetensors orders several at random, and equal adapters give equal files.
    header = {"samfast": json.dumps({"record": record, "sha256": digest(record, tensors)})}
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    return {CONFIG: text.encode(), TENSORS: save(tensors, metadata=header)}


def load_adapter(
    model: nn.Module,
    folder: str | os.PathLike,
    *,
    trainable: bool = False,
    check_base: bool = True,
    base_dtype: torch.dtype | None = None,
) -> nn.Module:
    """Put a saved adapter on a model, in place, and return the model.

    If a wrapper holds one SAM, it works on that SAM. For an adapter of several tasks it turns a
    stock model into a MultiTaskSam, which shares the model's encoder, and returns that.

    A stock model gets the head and the adapters, and is frozen as ``attach`` does. A model with the
    same head and the same method on the same layers gets only the tensors. The folder comes from
    ``save_adapter``, or holds LoRA saved by PEFT. Folders of segment_anything's Sam load onto
    Hugging Face's SamModel and back. Files load too: SAMed's (.pth, .pt) with prompt encoder and
    mask decoder, and Sam_LoRA's (.safetensors).

    trainable: True if the loaded tensors require a gradient
    check_base: refuse an adapter of another base model. An adapter of the same base at another
        image size loads with a warning.
    base_dtype: as in ``attach``, for a stock model

    Raises FileNotFoundError or ValueError, before anything changes; also for NaN in the base,
    whatever check_base is.
    """
    adapter = read_adapter(folder)
    given, stock = model, level_of(model, adapter)
    adapter = spelled_for(stock, adapter)
    model = _with_tasks(stock, adapter)
    attached = attachment(model)
    with given_head(model, head_for(model, adapter)):
        if attached is None:
            check_attachable(model, base_dtype)
            if trainable:
                refuse_new_parameters(given)
            layers = find_layers_of(model, adapter)
            adapter.method.check_model(model, layers)
            adapted = adapter.method.build(layers)
        else:
            check_same(attached, adapter)
            check_same_dtype(attached, base_dtype)
            adapted = adapters(model)
        if adapter.numbered:
            check_numbered(model, adapter.folder, len(adapter.layers), adapter.tensors)
        check_tensors(model, adapter, adapted)
        check_finite_base(model, adapter)
        if check_base:
            check_base_of(model, adapter)
    own = adapter_parameter_names(model)
    beside = {name for name, _ in model.named_parameters() if name in adapter.tensors} - own
    if attached is None:
        attach_to(model, adapter.method, layers, adapted, beside, base_dtype)
        own = adapter_parameter_names(model)
    else:
        attached.trained = tuple(name for name, _ in model.named_parameters() if name in beside)
    model.load_state_dict(adapter.tensors, strict=False)
    for name, parameter in model.named_parameters():
        if name in own or name in adapter.tensors:
            parameter.requires_grad_(trainable)
    return given if model is stock else model


def _with_tasks(model: nn.Module, adapter: AdapterFile) -> nn.Module:
    """Make the MultiTaskSam for an adapter of several tasks; return the model for others."""
    if adapter.record.get("head") != MULTI_TASK:
        return model
    try:
        tasks = tasks_from_config(adapter.record.get("classes"))
        if not isinstance(model, MultiTaskSam):
            return MultiTaskSam(model, tasks)
    except (TypeError, ValueError) as error:
        raise ValueError(f"adapter {adapter.folder} cannot be used: {error}") from None
    if model.tasks != tasks:
        mine, theirs = (", ".join(map(str, own)) for own in (model.tasks, tasks))
        raise ValueError(f"adapter {adapter.folder} is for {theirs}, but the model is for {mine}")
    return model

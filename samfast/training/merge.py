# SPDX-License-Identifier: Apache-2.0
"""``samfast merge``: write a fine-tuned model as a plain checkpoint for other SAM tools."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import samfast
from samfast.adapters.adapter import adapters
from samfast.adapters.foreign import Foreign
from samfast.files.format import AdapterFile, read_adapter
from samfast.files.model_card import CARD, check_license
from samfast.files.placing import refuse_existing, write_together
from samfast.files.temporary import temporary_file, temporary_folder
from samfast.methods.adapt_former.method import AdaptFormer
from samfast.methods.conv_lora.method import ConvLora
from samfast.methods.ta_lora.layer import TaskLoraLinear
from samfast.models import MultiTaskSam, head_of, image_size, stock_state_dict
from samfast.models.architectures import ARCHITECTURES
from samfast.models.hf_folder import hugging_face_files
from samfast.models.sam3_folder import NAME as SAM3
from samfast.training.adapted import adapter_folder, base_of
from samfast.training.merge_card import merged_card
from samfast.training.merge_settings import MergeSettings
from samfast.training.remembered import Remembered, remembered
from samfast.training.tasks import TaskSpec

TORCH, SAFETENSORS = (".pth", ".pt"), ".safetensors"
_REGISTRY = ("vit_b", "vit_l", "vit_h")  # of segment_anything, at 1024 pixels
_COPIED = ("preprocessor_config.json", "processor_config.json")
_OUT = "samfast.load_adapted gives the model in Python"
_HEAD = "mask_decoder."
_QUALITY = "mask_decoder.iou_prediction_head.layers.2."


def merge(settings: MergeSettings) -> dict[str, Any]:
    """Write the model of an adapter as a plain SAM; return what was written and how to open it.

    Everything is checked before the first byte is written, and nothing is replaced.
    """
    output = settings.output
    as_folder = output.suffix.lower() not in (*TORCH, SAFETENSORS)
    _check_output(output, as_folder)
    check_license(settings.license)
    if settings.license is not None and not as_folder:
        raise ValueError(
            f"license is {settings.license}, but {output} is a file without a model card; leave "
            "out --license, or name a folder"
        )
    folder = adapter_folder(settings.adapter)
    adapter = read_adapter(folder)
    name = adapter.record["base"].get("name")
    kept = remembered(adapter, settings.task)
    channel = _chosen(settings, adapter, kept.specs)
    _check_head(adapter, name, as_folder, output)
    sam = base_of(folder, settings.checkpoint)
    prompts = {
        key: tensor for key, tensor in sam.state_dict().items() if key.startswith("prompt_encoder.")
    }
    model = samfast.load_adapter(sam, folder).eval()
    size = image_size(model) if name != SAM3 else None
    if channel is None:
        state = _plain_state(model, folder)
    else:
        state = _state_of_task(cast("MultiTaskSam", model), folder, prompts, *channel)
    text = merged_card(
        adapter,
        settings.checkpoint,
        settings.license,
        channel,
        "Sam3TrackerModel" if name == SAM3 else "SamModel",
    )
    if name == SAM3:
        _write_sam3(model, state, output, settings.checkpoint, text)
    elif as_folder:
        assert size is not None, name
        files = hugging_face_files(state, ARCHITECTURES[name], size)
        write_together(output, {CARD: text, **files})
    else:
        _write_file(state, output)
    return {
        "output": str(output),
        "model": name,
        "image_size": size,
        "task": None if channel is None else channel[0],
        "class": None if channel is None else channel[1],
        "opens": _how_it_opens(name, size, output, as_folder),
        "notes": list(_notes(kept, channel)),
    }


def _check_output(output: Path, as_folder: bool) -> None:
    if output.suffix and as_folder:
        known = ", ".join((*TORCH, SAFETENSORS))
        raise ValueError(
            f"expected --output to end in {known}, or to be a folder without a suffix, got {output}"
        )
    refuse_existing(output, folder=as_folder)


def _notes(kept: Remembered, channel: tuple[str, int] | None) -> Iterator[str]:
    """What another tool does not know of the model."""
    if channel is not None and kept.specs[0].task.channels > 1:
        yield (
            f"the mask is where the score of class {channel[1]} is above 0, but samfast chooses "
            "the class with the highest score; merge every class and compare their logits"
        )
    if kept.tiles:
        tile, overlap = kept.tiles
        yield (
            f"the model was trained on tiles of {tile} pixels with an overlap of {overlap}; give "
            "it tiles, not whole images"
        )


def _chosen(
    settings: MergeSettings, adapter: AdapterFile, specs: Sequence[TaskSpec]
) -> tuple[str, int] | None:
    """The task whose decoder is written, and its channel; None for an adapter of one mask."""
    if not specs:
        if settings.class_index is not None:
            raise ValueError(
                f"adapter {adapter.folder} has one mask and no classes; leave out --class-index"
            )
        return None
    if len(specs) > 1:
        names = ", ".join(spec.name for spec in specs)
        raise ValueError(
            f"adapter {adapter.folder} has the tasks {names}, but a plain SAM has one decoder; "
            "choose a task with --task, and merge each into its own file"
        )
    task = specs[0].task
    if task.kind == "regression":
        raise ValueError(
            f"task {task.name} predicts values, but other SAM tools would threshold them at 0; "
            f"{_OUT}"
        )
    if settings.class_index is None and task.channels == 1:
        return task.name, 0
    if settings.class_index is None or not 0 <= settings.class_index < task.channels:
        got = "none" if settings.class_index is None else settings.class_index
        raise ValueError(
            f"task {task.name} has a mask for each of {task.channels} classes, but a plain SAM "
            f"has one mask; expected --class-index 0 to {task.channels - 1}, got {got}"
        )
    return task.name, settings.class_index


def _check_head(adapter: AdapterFile, name: str, as_folder: bool, output: Path) -> None:
    if name == SAM3 and not as_folder:
        raise ValueError(f"SAM 3 is written as a folder, not as {output}; leave out the suffix")
    if isinstance(adapter.method, (ConvLora, AdaptFormer)):
        raise ValueError(
            f"adapter {adapter.folder} cannot be merged: the update of "
            f"{type(adapter.method).__name__} depends on its input; samfast export writes it as "
            f"ONNX, and {_OUT}"
        )
    if adapter.record.get("head") == "binary" and not as_folder:
        raise ValueError(
            f"adapter {adapter.folder} has a decoder of one mask token, but a {output.suffix} for "
            "segment_anything has four; write a Hugging Face folder (an --output without "
            f"suffix), or {_OUT}"
        )


def _plain_state(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    """The tensors of the model without adapters, whose updates are in the weights."""
    one_mask = head_of(model) == "binary"
    try:
        state = samfast.merged_state_dict(model) if adapters(model) else stock_state_dict(model)
    except ValueError as error:
        raise ValueError(f"adapter {folder} cannot be merged: {error}; {_OUT}") from None
    return _of_one_mask(state, model.state_dict()) if one_mask else state


def _of_one_mask(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With the decoder as it computes, of one mask token and one quality."""
    kept = {key: value for key, value in state.items() if not key.startswith(_HEAD)}
    decoder = {key: value for key, value in own.items() if key.startswith(_HEAD)}
    quality = {key: decoder[key][:1] for key in decoder if key.startswith(_QUALITY)}
    return kept | decoder | quality


def _state_of_task(
    model: MultiTaskSam, folder: Path, prompts: Mapping[str, Tensor], task: str, channel: int
) -> dict[str, Tensor]:
    """A Sam's tensors with the decoder of a task, whose channel is the answer to no prompt."""
    if any(isinstance(layer, TaskLoraLinear) for layer in adapters(model).values()):
        samfast.set_task(model, task)
    state = _plain_state(model, folder)
    encoder = {k: v for k, v in state.items() if k.startswith("image_encoder.")}
    own = f"mask_decoders.{task}."
    decoder = {_HEAD + k.removeprefix(own): v for k, v in state.items() if k.startswith(own)}
    nothing = {
        "prompt_encoder.no_mask_embed.weight": state[f"no_mask_embeds.{task}"][channel, None]
    }
    return {**encoder, **prompts, **nothing, **decoder}


def _write_file(state: Mapping[str, Tensor], output: Path) -> None:
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    output.parent.mkdir(parents=True, exist_ok=True)
    with temporary_file(output) as (file, place):
        if output.suffix.lower() == SAFETENSORS:
            save_file(plain, place, metadata={"format": "pt"})
        else:
            torch.save(plain, file)
        file.flush()
        os.replace(place, output)


def _write_sam3(
    model: Foreign,
    state: Mapping[str, Tensor],
    output: Path,
    checkpoint: Path | None,
    text: bytes,
) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(output) as place:
        model.save_pretrained(place, state_dict=dict(state))
        for name in _COPIED:
            if checkpoint is not None and (checkpoint / name).is_file():
                (place / name).write_bytes((checkpoint / name).read_bytes())
        (place / CARD).write_bytes(text)
        os.replace(place, output)


def _how_it_opens(name: str, image_size: int | None, output: Path, as_folder: bool) -> str:
    """A line of Python that opens what was written."""
    if name == SAM3:
        return f'transformers.Sam3TrackerModel.from_pretrained("{output}")'
    if as_folder:
        return f'transformers.SamModel.from_pretrained("{output}")'
    if name in _REGISTRY and image_size == 1024 and output.suffix.lower() in TORCH:
        return f'segment_anything.sam_model_registry["{name}"](checkpoint="{output}")'
    return f'samfast.models.build_sam("{name}", checkpoint="{output}", image_size={image_size})'

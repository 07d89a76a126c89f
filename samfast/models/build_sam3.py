# SPDX-License-Identifier: Apache-2.0
"""Build Hugging Face's Sam3TrackerModel, from a folder or with random weights."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from samfast.integrations.torchvision import declare_missing_schemas
from samfast.models.architectures import MOST_PIXELS
from samfast.models.sam3_folder import tracker_config


def build_sam3(
    checkpoint: str | os.PathLike | None, image_size: int | None, seed: int | None, device: str
) -> nn.Module:
    """Build the tracker in eval mode.

    checkpoint: a folder; None for random weights at full size. On the meta device, only its
        configuration is read.
    image_size: side in pixels (default: the folder's)

    Raises ImportError without transformers. Raises ValueError or FileNotFoundError if the folder
    holds no SAM 3 with a tracker, if weights are missing, or if windows do not divide the size.
    """
    transformers = _transformers()
    config = transformers.Sam3TrackerConfig() if checkpoint is None else _config(checkpoint)
    size = _square(config) if image_size is None else image_size
    _resize(config, size)
    if checkpoint is not None and device != "meta":
        return _loaded(transformers.Sam3TrackerModel, Path(checkpoint), config)
    with torch.random.fork_rng(devices=[], enabled=seed is not None), torch.device(device):
        if seed is not None:
            torch.default_generator.manual_seed(seed)
        return transformers.Sam3TrackerModel(config).eval()


def _transformers() -> Any:
    try:
        declare_missing_schemas()
        import transformers

        transformers.Sam3TrackerModel  # noqa: B018 - imports its file
    except (ImportError, AttributeError) as error:
        raise ImportError(
            'sam3 needs transformers 5 or newer: pip install "samfast[hf]"'
        ) from error
    return transformers


def _config(checkpoint: str | os.PathLike) -> Any:
    given = tracker_config(checkpoint)
    try:
        return _transformers().Sam3TrackerConfig(**given)
    except Exception as error:  # transformers may raise anything
        raise ValueError(
            f"the configuration in {checkpoint} does not fit SAM 3's tracker: {_said(error)}"
        ) from None


def _said(error: Exception) -> str:
    """Return the error of transformers in one line."""
    text = " ".join(str(error).split())
    return text if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {text}"


def _square(config: Any) -> int:
    size = config.vision_config.backbone_config.image_size
    if isinstance(size, int):
        return size
    if len(set(size)) != 1:
        raise ValueError(f"expected a square image size, but this model has {tuple(size)}")
    return size[0]


def _check_sizes(vit: Any) -> None:
    """Raise ValueError for numbers that fit no layer."""
    for name in ("patch_size", "window_size", "hidden_size", "num_attention_heads"):
        value = getattr(vit, name)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} of this SAM 3 is {value!r}, not a whole number of at least 1")
    if vit.hidden_size % (4 * vit.num_attention_heads):
        raise ValueError(
            f"hidden_size {vit.hidden_size} of this SAM 3 is not a multiple of 4 times its "
            f"{vit.num_attention_heads} heads"
        )


def _resize(config: Any, size: int) -> None:
    vit = config.vision_config.backbone_config
    _check_sizes(vit)
    unit = vit.patch_size * vit.window_size
    if isinstance(size, bool) or not isinstance(size, int) or size < unit or size % unit:
        raise ValueError(
            f"image size {size!r} is not a multiple of {unit}, the side of a window of "
            f"{vit.window_size} patches of {vit.patch_size} pixels"
        )
    if size > MOST_PIXELS:
        raise ValueError(f"image size {size} is above {MOST_PIXELS}, the largest supported size")
    if size == _square(config):
        return
    vit.image_size = config.prompt_encoder_config.image_size = size
    side = size // vit.patch_size
    config.vision_config.backbone_feature_sizes = [[side * f] * 2 for f in (4, 2, 1)]


def _loaded(kind: Any, folder: Path, config: Any) -> nn.Module:
    logging = _transformers().utils.logging
    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity(logging.CRITICAL)  # a sentence below replaces its table
    try:
        model, found = kind.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # raised below
        )
    except Exception as error:  # transformers may raise anything
        raise ValueError(f"checkpoint {folder} does not load: {_said(error)}") from None
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
    if wrong := sorted(found["mismatched_keys"], key=str):
        name, theirs, ours = wrong[0]
        raise ValueError(
            f"checkpoint {folder} has {name} of shape {tuple(theirs)}, but its configuration says "
            f"{tuple(ours)}"
        )
    if missing := sorted(found["missing_keys"]):
        raise ValueError(
            f"checkpoint {folder} lacks {len(missing)} tensors of the tracker, such as {missing[0]}"
        )
    return model.eval()

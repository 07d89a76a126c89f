# SPDX-License-Identifier: Apache-2.0
"""LoRA in the files of SAMed (``.pth``) and Sam_LoRA (``.safetensors``), read only.

``w_a_000`` and ``w_b_000`` are A and B of q in the first block, ``001`` those of v, ``002`` those
of q in the second, and so on. SAMed's files also hold the whole prompt encoder and mask decoder.
Neither format identifies the frozen encoder.
"""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from samfast.methods.lora.method import Lora
from samfast.models.hf_names import spelled

SUFFIXES = (".pth", ".pt", ".safetensors")
SLICES = ("q", "v")
_FACTOR = re.compile(r"w_([ab])_(\d{3,})")
_CLASSIFIER = re.compile(r"fc_\d+in_\d+out")  # from Sam_LoRA's vision transformer
_WHOLE = ("prompt_encoder", "mask_decoder")
_LAYER = "image_encoder.blocks.{}.attn.qkv"
_TOKENS = "mask_decoder.mask_tokens.weight"

Factors = dict[str, dict[int, Tensor]]  # "a" and "b", by number


def read_numbered(
    path: Path, content: Any
) -> tuple[Lora, tuple[str, ...], dict[str, torch.Tensor]]:
    """Read method, adapted layers and tensors, by the model's names, from such a file.

    Warns of a classifier's weight and leaves it out. Raises ValueError with the reason if it is
    another kind of file.
    """
    if not isinstance(content, Mapping) or "w_a_000" not in content:
        raise ValueError(
            "it has no w_a_000, so SAMed or Sam_LoRA did not write it; for an adapter of samfast "
            "or PEFT, pass its folder"
        )
    factors, tensors = _sorted(path, content)
    count, rank = _checked(factors)
    for layer in range(count):
        name = _LAYER.format(layer)
        for factor, numbered in factors.items():
            parts = [numbered[2 * layer], numbered[2 * layer + 1]]
            tensors[f"{name}.lora_{factor.upper()}"] = torch.cat(parts)
    layers = tuple(_LAYER.format(layer) for layer in range(count))
    return Lora(rank=rank, slices=SLICES), layers, tensors


def _sorted(path: Path, content: Mapping[Any, Any]) -> tuple[Factors, dict[str, Tensor]]:
    """Return the factors by number, and tensors trained whole by the model's names."""
    factors: Factors = {"a": {}, "b": {}}
    whole: dict[str, Tensor] = {}
    for key, value in content.items():
        if not isinstance(key, str):
            raise ValueError(f"it has a key {key!r}, which is a {type(key).__name__}, not a name")
        if not isinstance(value, Tensor) or value.layout != torch.strided:
            what = value.layout if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"its {key} is a {what}, not a plain tensor")
        found = _FACTOR.fullmatch(key)
        if found and found[2] == f"{int(found[2]):03d}":
            factors[found[1]][int(found[2])] = value.detach()
        elif key.partition(".")[0] in _WHOLE:
            whole[key] = value.detach()
        elif _CLASSIFIER.fullmatch(key):
            warnings.warn(
                f"adapter {path} has {key}, the weight of a classifier, which no Sam has; it is "
                "left out",
                stacklevel=6,
            )
        else:
            raise ValueError(
                f"it has a tensor {key}, which is neither LoRA of the image encoder nor in the "
                "prompt encoder or mask decoder"
            )
    return factors, whole


def _checked(factors: Factors) -> tuple[int, int]:
    """Return the number of layers and the rank."""
    ups, downs = factors["b"], factors["a"]
    numbers = range(len(downs) + len(downs) % 2)
    for letter, numbered in factors.items():
        if sorted(numbered) != list(numbers):
            absent = sorted(set(numbers) ^ set(numbered))[0]
            raise ValueError(
                f"it has {len(downs)} w_a and {len(ups)} w_b, which do not pair up as q and v; "
                f"look at w_{letter}_{absent:03d}"
            )
    rank, width = downs[0].shape if downs[0].dim() == 2 else (0, 0)
    for number in numbers:
        shapes = tuple(downs[number].shape), tuple(ups[number].shape)
        if shapes != ((rank, width), (width, rank)):
            raise ValueError(
                f"its w_a_{number:03d} and w_b_{number:03d} have shapes {shapes[0]} and "
                f"{shapes[1]}, while w_a_000 has {tuple(downs[0].shape)}"
            )
    return len(numbers) // 2, rank


def check_numbered(
    model: nn.Module, path: Path, layers: int, tensors: Mapping[str, Tensor]
) -> None:
    """Raise ValueError if the model has more blocks, or another number of mask tokens."""
    names, blocks = {spelled(name) for name, _ in model.named_modules()}, 0
    while _LAYER.format(blocks) in names:
        blocks += 1
    if blocks > layers:
        raise ValueError(
            f"adapter {path} adapts {layers} blocks, but the model has {blocks}, and the file does "
            "not say which ones it adapts"
        )
    state = {spelled(name): t for name, t in model.state_dict(keep_vars=True).items()}
    given = {spelled(name) for name in tensors}
    for part in _WHOLE:
        absent = [name for name in state if name.startswith(f"{part}.") and name not in given]
        held = any(name.startswith(f"{part}.") for name in given)
        if held and absent:
            raise ValueError(
                f"adapter {path} has only a part of {part}; {absent[0]} and {len(absent) - 1} "
                "more tensors are missing"
            )
    theirs, mine = tensors.get(_TOKENS), state.get(_TOKENS)
    if theirs is not None and mine is not None and len(theirs) != len(mine):
        raise ValueError(
            f"adapter {path} has a decoder with {len(theirs)} mask tokens, but the model's has "
            f"{len(mine)}; build the Sam with MaskDecoder(num_multimask_outputs="
            f"{len(theirs) - 1}), which SAMed calls num_classes"
        )

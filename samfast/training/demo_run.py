# SPDX-License-Identifier: Apache-2.0
"""The demonstration's run, which ``samfast.training.demo`` starts: a tiny SAM learns to find coins.

It compares three states on photographs no training tile touches: untrained, mask decoder trained
alone, and LoRA adapters trained with it for as many steps; then it looks inside the adapter.
"""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from samfast.integrations.torchvision import declare_missing_schemas
from samfast.models import image_size
from samfast.training.adapted import load_adapted
from samfast.training.build import attach_method, build_base
from samfast.training.demo_data import write_coins
from samfast.training.evaluate import evaluate, predicted_masks, validation_loader
from samfast.training.folders import find_split
from samfast.training.loop import finetune, seed_everything
from samfast.training.metrics import ForegroundScores
from samfast.training.segmenters import Segmenter
from samfast.training.settings import FinetuneSettings

WANTED = 0.95
TRAINING: dict[str, Any] = {"model": "vit_tiny", "epochs": 10, "repeats": 1, "batch_size": 4}
# A random encoder has more to learn than a trained one: adapters everywhere, and a large scaling.
LORA: dict[str, Any] = {"rank": 16, "alpha": 64.0, "target": ("qkv", "proj", "lin1", "lin2")}


def run(output: Path, seed: int = 0) -> bool:
    """Run it all; whether the adapter reached WANTED. Results of an earlier run are replaced."""
    began = time.perf_counter()
    declare_missing_schemas()
    data = write_coins(output / "data")
    print(f"photographs of coins and their masks are in {data}")
    lora = FinetuneSettings(data=data, output=output, overwrite=True, seed=seed, **TRAINING, **LORA)
    alone: dict[str, Any] = {
        "method": "decoder",
        "rank": None,
        "alpha": None,
        "target": None,
        "output": output / "decoder_only",
    }
    decoder = replace(lora, **alone)

    start_model = _untrained(lora)
    loader = validation_loader(find_split(data).val, image_size(start_model.sam), 4)
    untrained, _ = evaluate(start_model, loader)

    print("\nmask decoder alone")
    decoder_result = finetune(decoder)
    print("\nLoRA adapters and mask decoder")
    lora_result = finetune(lora)

    adapted = Segmenter(load_adapted(output / "adapter" / "best"))
    dice, _ = evaluate(adapted, loader)
    print("\nvalidation Dice")
    print(f"  everything foreground      {lora_result['all_foreground_dice']:.4f}")
    print(f"  untrained                  {untrained:.4f}")
    print(f"  only the mask decoder      {decoder_result['val_dice']:.4f}{_cost(decoder_result)}")
    print(f"  LoRA and mask decoder      {dice:.4f}{_cost(lora_result)}")
    _look_inside(adapted, start_model, loader)
    print(f"\nadapter, metrics.csv, curves.png and overlays are in {output}")
    print(f"the whole demonstration took {time.perf_counter() - began:.0f} s")
    if dice < WANTED:
        print(f"the adapter's Dice {dice:.4f} is below {WANTED}")
    return dice >= WANTED


def _untrained(settings: FinetuneSettings) -> Segmenter:
    """The model as ``finetune`` has it before its first step."""
    sam = build_base(settings)
    seed_everything(settings.seed)
    return Segmenter(attach_method(sam, settings))


def _cost(result: dict[str, Any]) -> str:
    return (
        f"  best of {result['epochs']} epochs, {result['steps']} steps, {result['seconds']:.0f} s, "
        f"{result['trained_parameters']:,} trained parameters"
    )


def _look_inside(adapted: Segmenter, untrained: Segmenter, loader: DataLoader) -> None:
    """How far the adapter's tensors moved, and what the masks are without them."""
    before = _adapter_tensors(untrained.sam)
    after = _adapter_tensors(adapted.sam)
    changes = [(after[name] - before[name]).abs().max().item() for name in after]
    moved = sum(change > 0 for change in changes)
    print(
        f"\n{moved} of {len(changes)} adapter tensors moved; largest change of an element "
        f"{max(changes):.4f}, smallest of a tensor's largest {min(changes):.4f}"
    )
    with_adapter = [mask for mask, _ in predicted_masks(adapted, loader)]
    with torch.no_grad():
        for name, parameter in after.items():
            if name.endswith("lora_B"):
                parameter.zero_()
    changed = total = 0
    scores = ForegroundScores()
    for mask, (without, truth) in zip(with_adapter, predicted_masks(adapted, loader), strict=True):
        changed += int((mask != without).sum())
        total += mask.numel()
        scores.update(without, truth)
    print(
        f"with every lora_B set to zero {changed / total:.1%} of the validation pixels change and "
        f"Dice is {scores.compute()[0]:.4f}"
    )


def _adapter_tensors(sam: nn.Module) -> dict[str, Tensor]:
    return {n: p.data for n, p in sam.named_parameters() if "lora_" in n}

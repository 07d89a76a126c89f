# SPDX-License-Identifier: Apache-2.0
"""Time a step by samfast and by others, in turns: ``samfast profile --compare``.

Every model has the same sizes, loss, optimizer and data, a trained mask decoder run by samfast, and
LoRA on the same layers of its encoder. Others' adapters are PEFT's.
"""

import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from samfast.adapters.foreign import Foreign
from samfast.integrations.torchvision import declare_missing_schemas, installed
from samfast.methods.registry import VARIANTS
from samfast.models import binary_head, unused_by_segment
from samfast.models.architectures import architecture
from samfast.profiling import machine
from samfast.profiling.blocks import Blocks
from samfast.profiling.counted import PARAMETERS, STATE, CountedStep
from samfast.profiling.settings import ProfileSettings
from samfast.profiling.workload import (
    Workload,
    build,
    device_of,
    dtype_of,
    training_settings,
)
from samfast.training.build import build_base
from samfast.training.precision import base_dtype
from samfast.training.recipe import method_of

_PIXEL_MEAN = (123.675, 116.28, 103.53)
_PIXEL_STD = (58.395, 57.12, 57.375)


def compare(settings: ProfileSettings, fused: Workload) -> list[dict[str, Any]]:
    """A row for each program: ms of a step and its spread, what it keeps; or what is missing.

    fused: the first of them, as it was profiled
    """
    rows: dict[str, dict[str, Any]] = {}
    runs: dict[str, Workload] = {f"samfast, {settings.memory or 'fast'}": fused}
    for name, made in _others(settings):
        if isinstance(made, str):
            rows[name] = {"name": name, "missing": made}
        else:
            rows[name], runs[name] = {}, made()
    for name, run in runs.items():
        run.step()
        rows[name] = {"name": name, "missing": None, **_counts(run)}
    for name, times in _in_turns(runs, settings.steps).items():
        rows[name] |= {
            "ms": statistics.median(times),
            "least_ms": min(times),
            "most_ms": max(times),
        }
    first, *_ = runs
    for name in runs:
        rows[name]["ratio"] = rows[name]["ms"] / rows[first]["ms"]
    return [rows.pop(first), *rows.values()]


def _in_turns(runs: dict[str, Workload], rounds: int) -> dict[str, list[float]]:
    """ms of each step; who begins changes from round to round."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs)
    for n in range(rounds):
        turn = n % len(order)
        for name in order[turn:] + order[:turn]:
            device = runs[name].device.type
            start = machine.now(device)
            runs[name].step()
            times[name].append(1e3 * (machine.now(device) - start))
    return times


def _counts(run: Workload) -> dict[str, Any]:
    """What one step keeps, needs and launches."""
    state = [t for s in run.optimizer.state.values() for t in s.values()]
    known = {PARAMETERS: [*run.model.parameters(), *run.model.buffers()], STATE: state}
    with Blocks(run.model) as blocks, CountedStep(blocks, known) as counted:
        run.step()
    return {
        "trained_parameters": sum(p.numel() for p in run.parameters),
        "saved_bytes": sum(kept.size for kept in counted.saved()),
        "peak_bytes": sum(counted.peak().values()),
        "launches": counted.counts.total_launches,
        "flop": counted.counts.flops,
    }


def _others(settings: ProfileSettings) -> Iterator[tuple[str, Callable[[], Workload] | str]]:
    """(name, what builds it or why it is not there)"""
    yield "samfast, not fused", lambda: build(settings, fuse=False)
    peft = "PEFT on segment_anything"
    hugging_face = "PEFT on Hugging Face, sdpa"
    if settings.method != "lora":
        why = f"PEFT has no {settings.method}; compare with --method lora"
        yield from ((peft, why), (hugging_face, why))
        return
    if not installed("peft"):
        why = 'peft is not installed: pip install "samfast[peft]"'
        yield from ((peft, why), (hugging_face, why))
        return
    yield peft, lambda: _with_peft(settings, _segment_anything)
    if installed("transformers"):
        yield hugging_face, lambda: _with_peft(settings, _hugging_face)
    else:
        yield hugging_face, 'transformers is not installed: pip install "samfast[hf]"'


def _segment_anything(settings: ProfileSettings) -> tuple[nn.Module, nn.Module]:
    """The model, and its image encoder."""
    training = training_settings(settings, fuse=False)
    sam: Foreign = build_base(training)
    if VARIANTS[training.method].binary_head:
        binary_head(sam)
    return sam, sam.image_encoder


def _hugging_face(settings: ProfileSettings) -> tuple[nn.Module, nn.Module]:
    """SamModel of the same sizes, with the attention that transformers calls sdpa."""
    from transformers import SamConfig, SamModel

    training = training_settings(settings, fuse=False)
    sizes = architecture(training.model)
    side = training.image_size or sizes.image_size
    vision = {
        "hidden_size": sizes.width,
        "num_hidden_layers": sizes.depth,
        "num_attention_heads": sizes.heads,
        "image_size": side,
        "window_size": sizes.window,
        "global_attn_indexes": list(sizes.global_blocks),
        "mlp_dim": 4 * sizes.width,
    }
    prompts = {"image_size": side, "image_embedding_size": side // 16}
    config = SamConfig(vision_config=vision, prompt_encoder_config=prompts)
    config._attn_implementation = config.vision_config._attn_implementation = "sdpa"
    sam = SamModel(config)
    for name, values in (("pixel_mean", _PIXEL_MEAN), ("pixel_std", _PIXEL_STD)):
        sam.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)
    return sam, sam.vision_encoder


def _with_peft(
    settings: ProfileSettings, make: Callable[[ProfileSettings], tuple[nn.Module, nn.Module]]
) -> Workload:
    declare_missing_schemas()
    import peft

    training = training_settings(settings, fuse=False)
    device = device_of(settings)
    dtype = dtype_of(settings, device)
    torch.manual_seed(0)
    sam, encoder = make(settings)
    sam.requires_grad_(False)
    if (base := base_dtype(training.base_dtype, dtype, device)) is not None:
        encoder.to(base)
    lora: Any = method_of(training)  # with a rank, an alpha and a target
    target = [lora.target] if isinstance(lora.target, str) else list(lora.target)
    alpha = lora.rank if lora.alpha is None else lora.alpha
    config = peft.LoraConfig(r=lora.rank, lora_alpha=alpha, target_modules=target)
    peft.inject_adapter_in_model(config, encoder)
    unused = set(unused_by_segment(sam))
    for name, parameter in sam.named_parameters():
        if name.startswith("mask_decoder.") and name not in unused:
            parameter.requires_grad_(True)
    return Workload(sam, training, device, dtype, own_adapters=False)

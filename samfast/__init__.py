# SPDX-License-Identifier: Apache-2.0
"""Parameter-efficient fine-tuning of the Segment Anything Model, fast and light on memory.

Everything is imported on first use: ``import samfast`` loads neither Triton nor
segment_anything, torchvision or transformers.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "AdaptFormer": "samfast.methods.adapt_former.method",
    "CobotLora": "samfast.methods.cobot.method",
    "ConvLora": "samfast.methods.conv_lora.method",
    "DecoderOnly": "samfast.methods.registry",
    "Kronecker": "samfast.methods.kronecker.method",
    "Lora": "samfast.methods.lora.method",
    "TaLora": "samfast.methods.ta_lora.method",
    "attach": "samfast.methods.attach",
    "merge": "samfast.methods.attach",
    "unmerge": "samfast.methods.attach",
    "merged_state_dict": "samfast.methods.attach",
    "trainable_parameters": "samfast.methods.attach",
    "parameter_groups": "samfast.methods.attach",
    "export_form": "samfast.export.form",
    "set_task": "samfast.methods.ta_lora.tasks",
    "fuse": "samfast.fused.fuse",
    "unfuse": "samfast.fused.fuse",
    "ranges": "samfast.kernels._common.ranges",
    "aux_loss": "samfast.adapters.aux_loss",
    "profile": "samfast.profiling.context",
    "report": "samfast.fused.report",
    "save_adapter": "samfast.files.adapter_files",
    "load_adapter": "samfast.files.adapter_files",
    "load_adapted": "samfast.training.adapted",
    "read_adapter_config": "samfast.files.format",
}
_SUBMODULES = (
    "backends",
    "counters",
    "functional",
    "integrations",
    "models",
    "modules",
    "profiling",
    "training",
)
__all__ = ["__version__", *_EXPORTS, *_SUBMODULES]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        value = getattr(importlib.import_module(_EXPORTS[name]), name)
        globals()[name] = value
        return value
    if name in _SUBMODULES:
        return importlib.import_module(f"samfast.{name}")
    raise AttributeError(f"module 'samfast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

# SPDX-License-Identifier: Apache-2.0
"""Parameter-efficient fine-tuning of the Segment Anything Model, fast and light on memory.

Everything is imported on first use: ``import samfast`` loads neither Triton nor
segment_anything, torchvision or transformers.
"""

import importlib

__version__ = "0.1.0"

_EXPORTS = {
    "AdaptFormer": "samfast.modules.methods",
    "CobotLora": "samfast.modules.methods",
    "ConvLora": "samfast.modules.methods",
    "DecoderOnly": "samfast.modules.methods",
    "Kronecker": "samfast.modules.methods",
    "Lora": "samfast.modules.methods",
    "TaLora": "samfast.modules.methods",
    "attach": "samfast.modules.attach",
    "merge": "samfast.modules.attach",
    "unmerge": "samfast.modules.attach",
    "merged_state_dict": "samfast.modules.attach",
    "trainable_parameters": "samfast.modules.attach",
    "parameter_groups": "samfast.modules.attach",
    "set_task": "samfast.modules.task_lora",
    "fuse": "samfast.modules.fuse",
    "unfuse": "samfast.modules.fuse",
    "aux_loss": "samfast.modules.aux_loss",
    "report": "samfast.modules.report",
    "save_adapter": "samfast.modules.adapter_files",
    "load_adapter": "samfast.modules.adapter_files",
    "read_adapter_config": "samfast.modules.adapter_files",
}
_SUBMODULES = (
    "backends",
    "counters",
    "functional",
    "integrations",
    "models",
    "modules",
    "training",
)
__all__ = ["__version__", *_EXPORTS, *_SUBMODULES]


def __getattr__(name):
    if name in _EXPORTS:
        value = getattr(importlib.import_module(_EXPORTS[name]), name)
        globals()[name] = value
        return value
    if name in _SUBMODULES:
        return importlib.import_module(f"samfast.{name}")
    raise AttributeError(f"module 'samfast' has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *__all__})

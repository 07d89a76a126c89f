# SPDX-License-Identifier: Apache-2.0
"""What --op names: generators of workloads, imported when they are called."""

import importlib

from samfast.integrations.torchvision import installed

# Where segment_anything is not installed, these cannot run; the other operations can.
OF_SEGMENT_ANYTHING = ("block", "encoder", "saved_bytes", "step")


def _from(module: str, name: str):
    def workloads(*arguments, **options):
        return getattr(importlib.import_module(f"benchmarks.{module}"), name)(*arguments, **options)

    return workloads


OPERATIONS = {
    "lora_linear": _from("registry", "lora_linear_workloads"),
    "conv_lora": _from("registry", "conv_lora_workloads"),
    "cobot": _from("cobot", "cobot_workloads"),
    "hypercomplex": _from("hypercomplex", "hypercomplex_workloads"),
    "task_core": _from("task_core", "task_core_workloads"),
    "relpos_attention": _from("relpos_attention", "relpos_attention_workloads"),
    "adapt_former": _from("adapt_former", "adapt_former_workloads"),
    "block": _from("blocks", "block_workloads"),
    "sam3_block": _from("sam3", "sam3_block_workloads"),
    "encoder": _from("encoder", "encoder_workloads"),
}


def segment_anything_missing(operation: str) -> str | None:
    """None when a benchmark has what it needs, or the sentence that says what to install."""
    if operation not in OF_SEGMENT_ANYTHING or installed("segment_anything"):
        return None
    return (
        f"the benchmark {operation} needs segment_anything, which is not installed; install it, or "
        "carry the wheels of benchmarks/gpu_wheels.txt (make carry-gpu)"
    )

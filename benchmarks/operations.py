# SPDX-License-Identifier: Apache-2.0
"""What --op names: generators of workloads."""

from benchmarks.adapt_former import adapt_former_workloads
from benchmarks.blocks import block_workloads
from benchmarks.cobot import cobot_workloads
from benchmarks.encoder import encoder_workloads
from benchmarks.hypercomplex import hypercomplex_workloads
from benchmarks.registry import conv_lora_workloads, lora_linear_workloads
from benchmarks.relpos_attention import relpos_attention_workloads
from benchmarks.task_core import task_core_workloads

OPERATIONS = {
    "lora_linear": lora_linear_workloads,
    "conv_lora": conv_lora_workloads,
    "cobot": cobot_workloads,
    "hypercomplex": hypercomplex_workloads,
    "task_core": task_core_workloads,
    "relpos_attention": relpos_attention_workloads,
    "adapt_former": adapt_former_workloads,
    "block": block_workloads,
    "encoder": encoder_workloads,
}

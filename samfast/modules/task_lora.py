# SPDX-License-Identifier: Apache-2.0
"""The import path of 0.1.0 for the modules below."""

from samfast.adapters.checks import QKV
from samfast.methods.ta_lora.checks import (
    check_orthogonality,
    check_ranks,
    check_scaling,
    check_tasks,
)
from samfast.methods.ta_lora.layer import TaskForward, TaskLoraLinear, orthogonal_penalty
from samfast.methods.ta_lora.tasks import numbers_of, set_task

__all__ = [
    "QKV",
    "TaskForward",
    "TaskLoraLinear",
    "check_orthogonality",
    "check_ranks",
    "check_scaling",
    "check_tasks",
    "numbers_of",
    "orthogonal_penalty",
    "set_task",
]

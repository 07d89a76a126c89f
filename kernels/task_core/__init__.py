# SPDX-License-Identifier: Apache-2.0
from samfast.kernels.task_core.cores import task_cores
from samfast.kernels.task_core.middle_map import middle_key
from samfast.kernels.task_core.op import task_core

__all__ = ["middle_key", "task_core", "task_cores"]

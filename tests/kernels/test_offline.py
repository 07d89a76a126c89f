# SPDX-License-Identifier: Apache-2.0
"""Every Triton kernel compiles for GPUs that are not here: no spills or atomics, memory fits.

Kernels imported under TRITON_INTERPRET cannot be compiled, so each check has its own process.
"""

import pytest
from offline_gate import ALL, gate

from benchmarks.launches import OPERATIONS

NAMES = [operation.__name__ for operation in OPERATIONS]
# What must be on tensor cores, and on sm_90 by which instruction.
PRODUCTS = {("sam_block", kernel): "MMA" for kernel in ("norm", "norm_backward", "gelu")}
PRODUCTS |= {("adapt_former", kernel): "MMA" for kernel in ("low", "low_backward")}
PRODUCTS |= {("task_core", kernel): "MMA" for kernel in ("product", "product_backward")}
PRODUCTS |= {
    (operation, kernel): "WGMMA"
    for operation in ("relpos_attention", "window_attention")
    for kernel in ("forward", "dq", "dkv")
}


@pytest.mark.slow_on_cpu
def test_attention_on_one_target():
    """The kernels with the most registers, and with limits on their machine code."""
    check("90", ["relpos_attention"], limits=3)


@pytest.mark.slow
def test_usual_configurations():
    """One target of each kind of tensor core; what has its own tiles for either, for both."""
    check("90", NAMES, limits=13)
    check("86", ["relpos_attention"], limits=0)


def check(arch, names, limits):
    """The usual configurations of these operations: clean, and products on tensor cores.

    limits: how many kernels have limits on their machine code
    """
    only = names[0] + " " if len(names) == 1 else ""
    code, text = gate("--archs", arch, "--quick", "--jobs", "1", "--only", only)
    assert code == 0, text
    assert text.count(", 0 wrong") == 1
    rows = [line for line in text.splitlines() if f" sm_{arch} " in line]
    for name in names:
        assert any(row.startswith(f"{name} ") for row in rows), name
    for (name, kernel), instruction in PRODUCTS.items():
        found = [row for row in rows if row.startswith(f"{name} ") and f" {kernel}_kernel " in row]
        if name in names and arch == "90":
            assert found and all(instruction in row for row in found), (name, kernel)
    assert f"{limits} with limits on machine code" in text


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_target_and_configuration(name):
    code, text = gate("--archs", *ALL, "--only", f"{name} ")
    assert code == 0, text

# SPDX-License-Identifier: Apache-2.0
"""Every Triton kernel compiles for GPUs that are not here: no spills or atomics, memory fits.

Kernels imported under TRITON_INTERPRET cannot be compiled, so each check has its own process.
"""

import pytest
from offline_gate import ALL, QUICK, gate

from benchmarks.launches import OPERATIONS

NAMES = [operation.__name__ for operation in OPERATIONS]
# What must be on tensor cores, and on sm_90 by which instruction.
PRODUCTS = {
    ("sam_block", kernel): "MMA" for kernel in ("norm", "norm_backward", "gelu", "gelu_backward")
}
PRODUCTS |= {("adapt_former", kernel): "MMA" for kernel in ("low", "low_backward")}
PRODUCTS |= {("task_core", kernel): "MMA" for kernel in ("product", "product_backward")}
PRODUCTS |= {("relpos_attention", kernel): "WGMMA" for kernel in ("forward", "dq", "dkv")}


def test_usual_configurations():
    code, text = gate("--archs", *QUICK, "--quick", "--jobs", "1")
    assert code == 0, text
    assert text.count(", 0 wrong") == 1
    rows = [line for line in text.splitlines() if " sm_" in line]
    for name in NAMES:
        for arch in QUICK:
            assert any(r.startswith(f"{name} ") and f" sm_{arch} " in r for r in rows), name
    for (name, kernel), instruction in PRODUCTS.items():
        found = [row for row in rows if row.startswith(f"{name} ") and f" {kernel}_kernel " in row]
        found = [row for row in found if " sm_90 " in row]
        assert found and all(instruction in row for row in found), (name, kernel)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_target_and_configuration(name):
    code, text = gate("--archs", *ALL, "--only", f"{name} ")
    assert code == 0, text

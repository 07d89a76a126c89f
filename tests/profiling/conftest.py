# SPDX-License-Identifier: Apache-2.0
"""Ceilings of no real machine, measured at once and kept nowhere that users look."""

import pytest
import torch

from samfast.profiling import machine


@pytest.fixture(autouse=True, scope="session")
def small_ceilings(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAMFAST_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setitem(machine.PRODUCTS, "cpu", ((64, 64, 64),))
        patch.setitem(machine.COPIED, "cpu", 2**16)
        patch.setattr(machine, "_TURN", 1e-4)
        yield


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

# SPDX-License-Identifier: Apache-2.0
"""Which backend runs where none is named."""

import warnings

import pytest
import torch

from samfast import backends

GPU, CPU = torch.device("cuda"), torch.device("cpu")


def chosen(able, device=GPU):
    def supports(name):
        return None if name in able else f"no {name} here"

    return backends.resolve("operation", "auto", device, supports)


@pytest.mark.parametrize(
    "able, name",
    [
        (("triton", "cuda", "torch"), "triton"),
        (("cuda", "triton"), "triton"),
        (("cuda", "torch"), "cuda"),
    ],
)
def test_a_gpu_runs_triton_before_cuda_sources(able, name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen(able) == name


def test_a_gpu_that_falls_back_to_torch_says_why():
    backends._warn_once.cache_clear()
    sentence = "operation runs on the torch backend: triton: no triton here; cuda: no cuda here"
    with pytest.warns(RuntimeWarning, match=sentence):
        assert chosen(("cpu", "torch")) == "torch"


def test_a_cpu_runs_neither():
    assert chosen(backends.NAMES, CPU) == "cpu"
    assert chosen(("triton", "cuda", "torch"), CPU) == "torch"
    with pytest.raises(RuntimeError, match="no backend can run operation: cpu: no cpu here; torch"):
        chosen(("triton", "cuda"), CPU)

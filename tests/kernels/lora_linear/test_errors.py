# SPDX-License-Identifier: Apache-2.0
"""Bad input to lora_linear ends in one sentence with the values in it."""

import pytest
import torch

from samfast.functional import lora_linear


def call(**changes):
    arguments = dict(
        x=torch.zeros(3, 8),
        weight=torch.zeros(6, 8),
        bias=torch.zeros(6),
        lora_a=torch.zeros(2, 8),
        lora_b=torch.zeros(6, 2),
        scaling=1.0,
    )
    return lora_linear(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"x": torch.zeros(3, 7)}, r"x has shape \(3, 7\) but weight takes 8 inputs"),
        ({"lora_a": torch.zeros(2, 768)}, "lora_a has 768 input features but x has 8"),
        ({"lora_b": torch.zeros(5, 2)}, "lora_b has 5 output features but weight has 6"),
        ({"lora_b": torch.zeros(6, 3)}, "lora_a has rank 2 but lora_b has rank 3"),
        ({"lora_a": torch.zeros(0, 8), "lora_b": torch.zeros(6, 0)}, "the rank is 0"),
        ({"bias": torch.zeros(5)}, r"bias has shape \(5,\) but weight has 6 rows"),
        ({"weight": torch.zeros(6)}, r"weight has shape \(6,\), but must be a matrix"),
        ({"x": torch.zeros(3, 8).half()}, "x is torch.float16 but weight is torch.float32"),
        ({"x": torch.zeros(3, 8).long()}, "x is torch.int64, but must be float16, bfloat16"),
        ({"x": torch.zeros(3, 8).to(torch.float8_e5m2)}, "x is torch.float8_e5m2, but must be"),
        ({"lora_a": torch.zeros(2, 8).int()}, "lora_a is torch.int32, but must be"),
        ({"lora_b": torch.zeros(6, 2, device="meta")}, "lora_b is on meta but x is on cpu"),
        ({"seed": torch.zeros(1, device="meta").long()}, "seed is on meta but x is on cpu"),
        ({"x": torch.zeros(3, 0), "weight": torch.zeros(6, 0)}, "but weight takes 0 inputs"),
        ({"dropout": 1.0}, "dropout is 1.0, but must be at least 0 and below 1"),
        ({"seed": torch.zeros(2)}, r"expected seed as one int64 element, got torch.float32 \(2,\)"),
        ({"slices": ((0, 2), (1, 3))}, "must ascend without overlap within the 6 columns"),
        ({"slices": ((0, 2), (4, 6))}, "together as long as lora_b's 6 rows"),
        ({"slices": ((0, 3), (3, 6)), "lora_a": torch.zeros(3, 8)}, "lora_a has 3 rows"),
    ],
)
def test_sentences(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        call(**changes)


def test_a_named_backend_that_cannot_run_raises_its_sentence():
    with pytest.raises(RuntimeError, match="'cuda' cannot run lora_linear: it has no CUDA source"):
        call(backend="cuda")
    wide = dict(x=torch.zeros(3, 8).double(), weight=torch.zeros(6, 8).double(), bias=None)
    with pytest.raises(RuntimeError, match=r"'cpu' cannot run lora_linear: x is torch\.float64"):
        call(**wide, backend="cpu")
    with pytest.raises(ValueError, match="unknown backend 'metal'; choose one of auto, reference"):
        call(backend="metal")


def test_the_environment_replaces_auto(monkeypatch):
    monkeypatch.setenv("SAMFAST_BACKEND", "cuda")
    with pytest.raises(RuntimeError, match="'cuda' cannot run lora_linear"):
        call()
    call(backend="torch")


def test_triton_on_a_cpu_tensor_needs_the_interpreter(monkeypatch):
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="only under TRITON_INTERPRET=1"):
        call(backend="triton")

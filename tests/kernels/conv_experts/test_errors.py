# SPDX-License-Identifier: Apache-2.0
"""Bad input to conv_experts and conv_lora_linear ends in one sentence with the values in it."""

import pytest
import torch

from samfast import backends
from samfast.functional import conv_experts, conv_lora_linear
from samfast.kernels._common.windows import Windows


def call(**changes):
    arguments = dict(
        h=torch.zeros(2, 4, 5, 3),
        weight=torch.zeros(4, 3, 3, 3, 3),
        bias=torch.zeros(4, 3),
        expert_index=torch.tensor([0, 3]),
        ratios=[1, 2, 3, 4],
    )
    return conv_experts(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"expert_index": torch.tensor([0, 4])},
            "expert_index has 4, but there are experts 0 to 3",
        ),
        ({"expert_index": torch.tensor([-1, 0])}, "expert_index has -1, but there are"),
        ({"expert_index": torch.tensor([0])}, r"int64 of shape \(2,\), one for each sample, but"),
        ({"expert_index": torch.tensor([0.0, 1.0])}, r"but is torch.float32 \(2,\)"),
        ({"ratios": [1, 2, 3]}, r"expected 4 ratios, .* got 3: \(1, 2, 3\)"),
        ({"ratios": [1, 2, 3, 0]}, "ratios has 0, which is not a whole number of at least 1"),
        ({"ratios": [1, 2, 3, 5000]}, "ratios has 5000, but the largest is 4096"),
        ({"ratios": [1, 2, 3, 2.5]}, "ratios has 2.5, which is not a whole number"),
        ({"h": torch.zeros(2, 20, 3)}, r"h has shape \(2, 20, 3\), but must be \(N, H, W, rank\)"),
        ({"h": torch.zeros(2, 0, 5, 3)}, r"h has shape \(2, 0, 5, 3\), but H and W must be"),
        ({"h": torch.zeros(2, 4, 5, 2)}, r"but rank 2 with groups 1 needs \(experts, 2, 2, 3, 3\)"),
        ({"groups": 3}, r"but rank 3 with groups 3 needs \(experts, 3, 1, 3, 3\)"),
        ({"groups": 2}, "groups is 2, but must be 1 or the rank 3"),
        ({"bias": torch.zeros(3, 3)}, r"bias has shape \(3, 3\), but 4 experts of rank 3 need"),
        ({"activation": "relu"}, "activation is 'relu'; choose one of gelu, none"),
        ({"h": torch.zeros(2, 4, 5, 3).long()}, "h is torch.int64, but must be float16"),
        ({"bias": torch.zeros(4, 3, device="meta")}, "bias is on meta but h is on cpu"),
        ({"backend": "quick"}, "unknown backend 'quick'"),
    ],
)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_one_sentence(changes, sentence, backend):
    with pytest.raises(ValueError, match=sentence):
        call(**{"backend": backend, **changes})


def test_a_named_backend_that_cannot_run_says_why():
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot run conv_experts"):
        call(backend="cuda")
    if backends.native_missing() is None:
        with pytest.raises(RuntimeError, match=r"is torch.float64, but the C.. code"):
            call(h=torch.zeros(2, 4, 5, 3).double(), backend="cpu")


def test_an_extension_that_is_too_old_is_one_sentence():
    if backends.native_missing() is not None:
        pytest.skip(backends.native_missing())
    sentence = backends.cpu_missing(torch.device("cpu"), torch.float32, "not_built_yet")
    assert sentence.startswith("the native extension is older than not_built_yet")


def layer(**changes):
    arguments = dict(
        x=torch.zeros(2, 4, 5, 6),
        weight=torch.zeros(7, 6),
        bias=None,
        lora_a=torch.zeros(3, 6),
        lora_b=torch.zeros(7, 3),
        expert_weight=torch.zeros(2, 3, 3, 3, 3),
        expert_bias=torch.zeros(2, 3),
        w_gate=torch.zeros(3, 2),
        w_noise=torch.zeros(3, 2),
        scaling=1.0,
        ratios=(1, 2),
        windows=Windows.whole(2, 4, 5),
    )
    return conv_lora_linear(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"windows": Windows.whole(2, 4, 4)},
            r"x has shape \(2, 4, 5, 6\), but the windows hold 32",
        ),
        ({"w_gate": torch.zeros(3, 4), "w_noise": torch.zeros(3, 4)}, "w_gate has 4 columns but"),
        ({"w_noise": torch.zeros(2, 2)}, r"w_noise has shape \(2, 2\), but h of rank 3 needs"),
        ({"noise": torch.zeros(3, 2)}, r"noise has shape \(3, 2\), but 2 samples and 2 experts"),
        (
            {"expert_index": torch.tensor([0, 2])},
            "expert_index has 2, but there are experts 0 to 1",
        ),
        ({"lora_a": torch.zeros(2, 6), "lora_b": torch.zeros(7, 2)}, "but rank 2 with groups 1"),
        ({"lora_b": torch.zeros(7, 2)}, "lora_a has rank 3 but lora_b has rank 2"),
        ({"top_k": 3}, "top_k is 3, but must be 1 to 2, the number of experts"),
        ({"formula": "book"}, "formula is 'book'; choose one of code, paper"),
    ],
)
def test_one_sentence_of_the_layer(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        layer(**changes)


def test_options_of_the_reference_need_it():
    with pytest.raises(RuntimeError, match="backend 'torch' cannot run top_k=2"):
        layer(top_k=2, backend="torch")

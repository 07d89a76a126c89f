# SPDX-License-Identifier: Apache-2.0
"""Bad input ends in one sentence with the values in it."""

import pytest
import torch

from samfast.functional import hypercomplex_linear, kronecker_weight
from samfast.kernels.hypercomplex import kronecker_factors


def call(**changes):
    arguments = dict(x=torch.zeros(3, 8), rules=torch.zeros(4, 4, 4), weights=torch.zeros(4, 3, 2))
    return hypercomplex_linear(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"rules": torch.zeros(4, 4)}, r"rules has shape \(4, 4\), but must be \(terms, n, n\)"),
        ({"rules": torch.zeros(4, 4, 3)}, r"rules has shape \(4, 4, 3\), but must be"),
        ({"rules": torch.zeros(0, 4, 4)}, r"rules has shape \(0, 4, 4\), but must be"),
        ({"weights": torch.zeros(3, 3, 2)}, r"\(3, 3, 2\), but rules \(4, 4, 4\) needs \(4, out"),
        ({"weights": torch.zeros(4, 3, 0)}, r"weights has shape \(4, 3, 0\), but rules"),
        ({"x": torch.zeros(3, 10)}, "x has 10 features, but must have a multiple of n = 4"),
        ({"x": torch.zeros(3, 12)}, r"x has shape \(3, 12\) but rules and weights take 8 inputs"),
        ({"x": torch.tensor(1.0)}, "x is a single number, but must be"),
        ({"bias": torch.zeros(8)}, r"bias has shape \(8,\) but there are 12 outputs"),
        ({"base": torch.zeros(8, 12)}, r"\(8, 12\) but rules and weights make \(12, 8\)"),
        ({"rules": torch.zeros(4, 4, 4, device="meta")}, "rules is on meta but x is on cpu"),
        ({"bias": torch.zeros(12, device="meta")}, "bias is on meta but x is on cpu"),
        ({"x": torch.zeros(3, 8).long()}, "x is torch.int64, but must be float16"),
        ({"base": torch.zeros(12, 8).int()}, "base is torch.int32, but must be float16"),
    ],
)
def test_sentences(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        call(**changes)


def test_parts_on_two_devices():
    with pytest.raises(ValueError, match="weights is on meta but rules is on cpu"):
        kronecker_weight(torch.zeros(1, 2, 2), torch.zeros(1, 3, 3, device="meta"))


def test_a_named_backend_that_cannot_run_raises_its_sentence():
    with pytest.raises(RuntimeError, match="'cuda' cannot run hypercomplex: x is on cpu, but the"):
        call(backend="cuda")
    wide = torch.zeros(3, 8, dtype=torch.float64)
    for backend in ("cpu", "triton"):
        with pytest.raises(
            RuntimeError, match=r"x is torch\.float64, but the kernels take float32"
        ):
            call(x=wide, backend=backend)
    with pytest.raises(RuntimeError, match=r"rules is torch\.float64, but the kernels take"):
        call(rules=torch.zeros(4, 4, 4).double(), backend="cpu")


def test_too_many_terms_for_the_kernels(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    pytest.importorskip("triton")
    many = dict(rules=torch.zeros(17, 4, 4), weights=torch.zeros(17, 3, 2))
    with pytest.raises(RuntimeError, match="17 terms are more than 16, the widest tile"):
        call(**many, backend="triton")
    assert call(**many).shape == (3, 12)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"rules": torch.zeros(4, 4, 3)}, r"rules has shape \(4, 4, 3\), but must be \(terms, n"),
        ({"left": torch.zeros(3, 5, 2)}, r"left has shape \(3, 5, 2\), but 4 terms need \(4, size"),
        ({"right": torch.zeros(4, 5, 1)}, r"right has shape \(4, 5, 1\), but 4 terms need"),
        ({"right": torch.zeros(4, 5, 2, device="meta")}, "right is on meta but rules is on cpu"),
        ({"left": torch.zeros(4, 5, 2).int()}, "left is torch.int32, but must be float16"),
    ],
)
def test_sentences_of_the_factors(changes, sentence):
    good = dict(rules=torch.zeros(4, 4, 4), left=torch.zeros(4, 5, 2), right=torch.zeros(4, 5, 2))
    with pytest.raises(ValueError, match=sentence):
        kronecker_factors(**{**good, **changes})

# SPDX-License-Identifier: Apache-2.0
"""docs/troubleshooting.md has every sentence of a report with its remedy, and no other."""

import re

from said import ROOT, of_file, sentences

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
ENTRIES = re.findall(r"^\| `([^`]+)` \| (.+) \|$", PAGE, re.M)
PIECES = {  # of the sentences around them
    "your program", "its forward", "its …", "… …", "…: …", "…; … is …", "not fused: … …",
    "… in … mode", "gradient of …", "a tensor of shape …", "(self, x)", "the factors", "the cores",
    "… is …, but the gate's noise is standard normal",
}  # fmt: skip


def test_every_sentence_has_a_remedy():
    told = {sentence for sentence, _ in ENTRIES}
    said = {text: place for text, place in sentences().items() if text not in PIECES}
    assert {text: place for text, place in said.items() if text not in told} == {}
    assert told - set(said) == set(), "the code does not say these"


def test_pieces_are_said():
    assert set(sentences()) >= PIECES


def test_remedies_are_sentences():
    for _, remedy in ENTRIES:
        assert remedy.endswith(".") and len(remedy.split()) < 40, remedy


def test_a_new_sentence_is_found(tmp_path):
    path = tmp_path / "new.py"
    body = '    """A docstring."""\n    return f"it is {x}, a new one"\n'
    path.write_text(f"def problem(x) -> str | None:\n{body}")
    assert list(of_file(path)) == [(3, "it is …, a new one")]

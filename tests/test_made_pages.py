# SPDX-License-Identifier: Apache-2.0
"""The pages that docs/makers makes of the code say all that the code says."""

import re

import pytest
import torch
from documents import ROOT

from benchmarks import methods
from docs import check_pages
from docs.makers import api, backends, commands, measured, shapes
from samfast import cli
from samfast.adapters.options import options_of
from samfast.kernels import operations


def test_every_command_and_option_has_its_line(capsys):
    assert cli.main(["--help"]) == 0
    known = re.search(r"\{([\w,]+)\}", capsys.readouterr().out)[1].split(",")
    page = commands.page()
    assert known == list(commands.COMMANDS) == re.findall(r"^## samfast (\w+)$", page, re.M)
    for settings in commands.COMMANDS.values():
        for option in options_of(settings):
            if not option.positional:
                assert f"`--{option.name.replace('_', '-')}" in page, option.name


def test_bars_of_choices_do_not_end_a_cell():
    for line in commands.page().splitlines():
        if line.startswith("|"):
            assert len(re.findall(r"(?<!\\)\|", line)) == 3, line


@pytest.mark.parametrize("title, device", [(t, d) for t, (d, _) in backends.DEVICES.items()])
def test_every_operation_has_a_row(title, device):
    asked = backends._asked
    table = backends.table(torch.device(device), backends.DEVICES[title][1])
    assert tuple(re.findall(r"^\| `(\w+)`", table, re.M)) == operations("example.py")
    assert all(line.count("**") == 2 for line in table.splitlines() if line.startswith("| `"))
    assert torch._C._dispatch_has_kernel_for_dispatch_key is asked  # nothing stays patched


def test_cells_are_what_supports_answers():
    table = backends.table(torch.device("cpu"), ("cpu", "torch"))
    assert "| `lora_linear` | **float32, bfloat16, float16<sup>" in table
    assert re.search(r"^\d\. x is torch.float64, but the C\+\+ code takes", table, re.M)


def test_measured_page_has_every_file_with_its_date():
    page = measured.page()
    for path in (ROOT / "benchmarks" / "results").glob("*.csv"):
        assert f"### {path.stem}\n" in page
    assert "2026-11-21" in page and "Never run on a GPU" in page


@pytest.mark.parametrize("name", ["lora", "adaptformer"])
def test_recorded_parameters_of_methods(name):
    sam = methods.attached(methods.COUNTED[name])
    last = methods.Rows(methods.RESULTS, methods.NAME).last(method=name)
    trained = sum(p.numel() for p in sam.parameters() if p.requires_grad)
    assert int(last["parameters"]) == trained
    assert f"| `{name}` | {trained:,} |" in methods.table()


def test_methods_without_a_recorded_row_are_a_sentence(tmp_path):
    header, first, *_ = (methods.RESULTS / methods.NAME).read_text().splitlines()
    (tmp_path / methods.NAME).write_text(f"{header}\n{first}\n")
    with pytest.raises(ValueError, match="has no row with method 'conv-lora'; record it"):
        methods.table(tmp_path)


@pytest.mark.parametrize("page", api.PAGES)
def test_public_names_are_found(page):
    names = api.names(page)
    assert names and len(names) == len(set(names))


def test_shapes_stay_lines():
    text = "Sum.\n\nx: (B, N)   y: (B,),\n    below\nSaves ``x``. Raises.\n\n>>> 1 + 1\n2"
    assert shapes.markdown(text) == (
        "Sum.\n\n```text\nx: (B, N)   y: (B,),\n    below\n```\n\nSaves `x`. Raises.\n\n"
        "```pycon\n>>> 1 + 1\n2\n```"
    )


def test_code_of_a_page():
    page = (
        '<code>menu</code><article><div class="language-python doc-signature"><code>f(x)</code>'
        '</div><div class="language-sh highlight"><pre><code><span>samfast</span> info\n</code>'
        "</pre></div><p><code>a &lt; b</code></p></article><code>foot</code>"
    )
    assert check_pages.code_of(page) == [
        ("signature", "f(x)"),
        ("sh", "samfast info\n"),
        ("inline", "a < b"),
    ]
    assert check_pages.as_markdown([("pycon", ">>> x = 1\n>>> x\n1\n"), ("text", "no")]) == (
        "```python\nx = 1\nx\n# Expected:\n## 1\n```\n"
    )

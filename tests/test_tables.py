# SPDX-License-Identifier: Apache-2.0
"""README's measured tables are those of benchmarks/results, and what is missing is a sentence."""

import shutil

import pytest

from benchmarks import saved, step, tables
from benchmarks.run import append

TEXT = tables.README.read_text(encoding="utf-8")


@pytest.fixture
def results(tmp_path):
    return shutil.copytree(tables.RESULTS, tmp_path / "results")


def changed(path, before, after):
    text = path.read_text(encoding="utf-8")
    assert before in text
    path.write_text(text.replace(before, after), encoding="utf-8")


def test_readme_has_the_tables_of_the_results():
    assert tables.filled(TEXT) == TEXT, "run python -m benchmarks.tables"


def test_readme_says_the_same_outside_of_tables():
    counted = tables.Rows(tables.RESULTS, "saved_bytes.csv")
    fast, eager = (
        tables.number(counted.last(model="vit_b", provider=p)["saved_bytes"], unit=10**9)
        for p in ("samfast, fast", "eager")
    )
    assert f"keeps {fast} GB; with eager LoRA it keeps {eager} GB" in TEXT


@pytest.mark.parametrize(
    ("file", "before", "after", "shown"),
    [
        ("saved_bytes.csv", "3156444672", "4000000000", "| ViT-B | 4.00 GB | 0.78 GB |"),
        ("steps.csv", "fast,1,1024,,2.61", "fast,1,1024,,3.5", "| ViT-B | 9.63 GiB | 3.50 GiB |"),
        (tables.CPU, "322.5,1.07,", "322.5,1.2149,", "| qkv | 1.21 | 1.47 | 1.51 |"),
        (tables.CPU, "301,1.055,", "301,1.0551,", "| 25 windows of 14×14 | 1.06 | 1.07 |"),
        ("task_scores.csv", "0.178,0.597", "0.2,0.597", "| `--method ta-lora` | 0.200 | 0.597 |"),
    ],
)
def test_a_table_follows_its_results(results, file, before, after, shown):
    assert shown not in TEXT
    changed(results / file, before, after)
    assert shown in tables.filled(TEXT, results)


def test_the_last_row_counts(results):
    settings = step.Settings(model="vit_h", memory="minimal")
    append(results / "steps.csv", [step.recorded(settings, 60.0, 5.125)], step.COLUMNS)
    assert "| 9.64 GiB | 5.12 GiB |" in tables.filled(TEXT, results)


def test_what_is_missing_is_a_sentence(results):
    changed(results / "saved_bytes.csv", "vit_l,eager", "vit_x,eager")
    with pytest.raises(ValueError, match=r"saved_bytes\.csv has no row with model 'vit_l', prov"):
        tables.filled(TEXT, results)
    for wrong in ("many", "nan"):
        shutil.copy(tables.RESULTS / "saved_bytes.csv", results)
        changed(results / "saved_bytes.csv", "3156444672,3156444672", f"{wrong},0")
        with pytest.raises(ValueError, match=f"expected a number in .*, got '{wrong}'"):
            tables.filled(TEXT, results)
    (results / "saved_bytes.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"saved_bytes\.csv does not exist; record it"):
        tables.filled(TEXT, results)


@pytest.mark.parametrize(
    ("before", "after", "sentence"),
    [
        ("<!-- results: steps -->\n", "", "needs one place for each table; see steps"),
        ("results: steps", "results: strides", "unknown table 'strides'; known are saved-bytes"),
        (f"{tables.END}\n\nTime of", "Time of", "table steps has no line <!-- end of results -->"),
    ],
)
def test_a_place_that_is_wrong_is_a_sentence(before, after, sentence):
    assert before in TEXT
    with pytest.raises(ValueError, match=sentence):
        tables.filled(TEXT.replace(before, after))


def test_the_command(tmp_path, monkeypatch, capsys):
    readme = tmp_path / "README.md"
    monkeypatch.setattr(tables, "README", readme)
    readme.write_text(TEXT.replace("| ViT-B | 3.16 GB", "| ViT-B | 3.15 GB"), encoding="utf-8")
    assert tables.main(["--check"]) == 1
    assert tables.main([]) == 0 and readme.read_text(encoding="utf-8") == TEXT
    assert tables.main(["--check"]) == 0
    readme.write_text("no table", encoding="utf-8")
    assert tables.main([]) == 2 and readme.read_text(encoding="utf-8") == "no table"
    assert "benchmarks.tables: README needs one place for each table" in capsys.readouterr().err


def test_saved_bytes_are_recorded_at_once(tmp_path, monkeypatch):
    """In place of all that was there."""
    path = tmp_path / "saved_bytes.csv"
    path.write_text("old\n", encoding="utf-8")
    monkeypatch.setattr(saved, "RESULTS", path)
    monkeypatch.setattr(saved, "ENCODERS", {})
    assert saved.main() == 0 and path.read_text(encoding="utf-8") == "old\n"
    assert saved.main(record=True) == 0
    assert path.read_text(encoding="utf-8").split() == [",".join(saved.COLUMNS)]
    assert [file.name for file in tmp_path.iterdir()] == [path.name]

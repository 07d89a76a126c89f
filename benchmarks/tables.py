# SPDX-License-Identifier: Apache-2.0
"""README's measured tables, made of benchmarks/results.

python -m benchmarks.tables            writes them into README
python -m benchmarks.tables --check    only says whether README has them; ends with 1 where not

A table stands between a line <!-- results: NAME --> and the line <!-- end of results -->. What a
results file has several times, its last row says.
"""

import argparse
import csv
import decimal
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
README, RESULTS = ROOT / "README.md", ROOT / "benchmarks" / "results"
CPU = "intel-r-xeon-r-processor-2-50ghz-2-threads.csv"  # whose times README shows
END = "<!-- end of results -->"
PLACE = re.compile(r"(<!-- results: ([\w-]+) -->\n)(.*?)(?=<!-- )", re.DOTALL)
MODELS = {"vit_b": "ViT-B", "vit_l": "ViT-L", "vit_h": "ViT-H"}


class Rows:
    """A results file, or a sentence where it or a row is not there."""

    def __init__(self, folder: Path, name: str):
        self.path = folder / name
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path} does not exist; record it (see benchmarks/)")
        with self.path.open(newline="", encoding="utf-8") as file:
            self.rows = list(csv.DictReader(file))

    def last(self, **wanted: str) -> dict[str, str]:
        """The last row with these values."""
        for row in reversed(self.rows):
            if all(row.get(name) == value for name, value in wanted.items()):
                return row
        told = ", ".join(f"{name} {value!r}" for name, value in wanted.items())
        raise ValueError(f"{self.path} has no row with {told}; record it, or change the table")

    def shape(self, operation: str, begins: str, ends: str = "") -> str:
        """The newest shape of an operation that begins and ends so."""
        for row in reversed(self.rows):
            shape = row["shape"]
            if row["operation"] == operation and shape.startswith(begins) and shape.endswith(ends):
                return shape
        raise ValueError(f"{self.path} has no {operation} of {begins} … {ends}; record it")


def number(text: str, digits: int = 2, unit: int = 1) -> str:
    """A recorded number in units, with so many digits after the point.

    Files hold four digits, so that half of a last digit may be less; it goes down. Raises
    ValueError where it is not a number.
    """
    try:
        value = decimal.Decimal(text) / unit
    except decimal.InvalidOperation:
        value = decimal.Decimal("NaN")
    if not value.is_finite():
        raise ValueError(f"expected a number in benchmarks/results, got {text!r}")
    return str(value.quantize(decimal.Decimal(1).scaleb(-digits), decimal.ROUND_HALF_DOWN))


def markdown(header: Sequence[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [f"| {' | '.join(line)} |\n".replace("|  |", "| |") for line in (header, *rows)]
    lines.insert(1, f"|{'---|' * len(header)}\n")
    return "".join(lines)


def measured(row: dict[str, str]) -> str:
    """Where and when the numbers of a row were taken, below its table."""
    torch = f"torch {row['torch']}" if row["torch"] else ""
    return "\n" + "; ".join(filter(None, (row["machine"], torch, row["date"]))) + ".\n"


def saved_bytes(folder: Path) -> str:
    found = Rows(folder, "saved_bytes.csv")
    columns = {
        "segment_anything, eager LoRA": "eager",
        "`fast`": "samfast, fast",
        "`balanced`: computes qkv and lin1 again": "samfast, balanced",
        "`minimal`: computes the whole block again": "samfast, minimal",
    }

    def cell(model, provider):
        counted = found.last(model=model, provider=provider)["saved_bytes"]
        return f"{number(counted, unit=10**9)} GB"

    rows = [[title, *(cell(model, p) for p in columns.values())] for model, title in MODELS.items()]
    return markdown(["", *columns], rows)


def steps(folder: Path) -> str:
    found = Rows(folder, "steps.csv")
    size = {"batch": "1", "image_size": "1024"}

    def cell(**wanted):
        row = found.last(**wanted, **size)
        return f"{number(row['peak_gib'])} GiB" if row["peak_gib"] else row["note"]

    rows = []
    for model in ("vit_b", "vit_h"):
        ours = [cell(model=model, provider="samfast", memory=m) for m in ("fast", "minimal")]
        rows.append([MODELS[model], cell(model=model, provider="eager"), *ours])
    table = markdown(["", "segment_anything, eager LoRA", "`fast`", "`minimal`"], rows)
    return table + measured(found.last(model="vit_b", provider="eager", **size))


def lora_linear(folder: Path) -> str:
    found = Rows(folder, CPU)
    providers = {"samfast": "samfast", "eager LoRA": "eager LoRA", "PEFT": "PEFT 0.21"}
    rows, last = [], {}
    for layer in ("qkv", "proj", "lin1", "lin2"):
        shape = found.shape("lora_linear", f"{layer} ", " r4")
        cells = []
        for provider in providers:
            last = found.last(operation="lora_linear", provider=provider, shape=shape)
            cells.append(number(last["ratio"]))
        rows.append([layer, *cells])
    return markdown(["layer", *providers.values()], rows) + measured(last)


def conv_lora(folder: Path) -> str:
    found = Rows(folder, CPU)
    maps = {"25 windows of 14×14": "qkv 25x14x14x", "64×64, enlarged 8 times": "qkv 1x64x64x"}
    rows, last = [], {}
    for title, begins in maps.items():
        full, depthwise = (
            found.shape("conv_lora", begins, kind) for kind in (" full", "depthwise")
        )

        def row(provider, shape):
            return found.last(operation="conv_lora", provider=provider, shape=shape)

        pairs = [(p, s) for p in ("samfast", "literal Conv-LoRA") for s in (full, depthwise)]
        last = row("samfast", full)
        peaks = (
            row(p, full)["peak_mib"] for p in ("samfast", "literal Conv-LoRA", "frozen linear")
        )
        ratios = (number(row(*pair)["ratio"]) for pair in pairs)
        rows.append([title, *ratios, *(f"{number(peak, 0)} MiB" for peak in peaks)])
    header = "map|samfast full|depthwise|literal full|depthwise|peak, samfast|literal|frozen"
    return markdown(header.split("|"), rows) + measured(last)


def task_scores(folder: Path) -> str:
    found = Rows(folder, "task_scores.csv")
    header = ["", "mIoU", "pixel accuracy", "distance, mean error in pixels", "relative"]
    digits = {"miou": 3, "accuracy": 3, "mean_error": 1, "relative_error": 2}
    rows = [[row["run"], *(number(row[n], d) for n, d in digits.items())] for row in found.rows]
    return markdown(header, rows)


TABLES = {
    "saved-bytes": saved_bytes,
    "steps": steps,
    "lora-linear": lora_linear,
    "conv-lora": conv_lora,
    "task-scores": task_scores,
}


def filled(text: str, folder: Path = RESULTS) -> str:
    """The text with its tables made anew. Raises ValueError where a place or a table is missing."""
    seen = []

    def table(match):
        start, name, _ = match.groups()
        if not text.startswith(END, match.end()):
            raise ValueError(f"README's table {name} has no line {END} after it")
        if name not in TABLES:
            raise ValueError(f"unknown table {name!r}; known are {', '.join(TABLES)}")
        seen.append(name)
        return start + TABLES[name](folder)

    made = PLACE.sub(table, text)
    if missing := [name for name in TABLES if seen.count(name) != 1]:
        raise ValueError(f"README needs one place for each table; see {', '.join(missing)}")
    return made


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description="write README's measured tables from the results")
    parser.add_argument(
        "--check", action="store_true", help="only compare; exit with 1 if they differ"
    )
    options = parser.parse_args(arguments)
    text = README.read_text(encoding="utf-8")
    try:
        made = filled(text)
    except (OSError, ValueError) as error:
        print(f"benchmarks.tables: {error}", file=sys.stderr)
        return 2
    if options.check:
        if made != text:
            print("README's tables differ from benchmarks/results: run python -m benchmarks.tables")
        return int(made != text)
    if made != text:
        README.write_text(made, encoding="utf-8")
    print("README's tables are those of benchmarks/results")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

# SPDX-License-Identifier: Apache-2.0
"""What benchmarks/model.py knows of a GPU: rates, and counts of the kernels' machine code.

rates.json holds both. A rate has a unit, the value assumed, its source and, once a GPU has run,
rows "measured": {"value", "device", "date"}. The newest row of the GPU asked for counts; where it
has none, the value assumed does. The first is added, the second never changed.

A count is what one warp executes in a kernel's hot loop for one tile, under the Triton and commit
named: "instructions", and its tensor core products 64 x N x 16 by "64xN". A kernel
that took over another's work has "more": instructions of a warp outside that loop, for a tile of
queries, beyond those of the kernel before it. Rows are in order of time; those of the commit
"proposed" are of code that nobody runs yet.
"""

import datetime
import json
import math
import os
import re
from pathlib import Path

FILE = Path(__file__).with_name("rates.json")
PROPOSED = "proposed"


def load(path: Path = FILE) -> dict:
    """The file's "rates" by name and its list "counts"; ValueError where it is of another form."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read rates from {path}: {error}") from None
    kinds = {name: type(part) for name, part in data.items()} if isinstance(data, dict) else {}
    if kinds != {"rates": dict, "counts": list}:
        raise ValueError(f'expected {{"rates": {{...}}, "counts": [...]}} in {path}')
    for name, rate in data["rates"].items():
        _has(rate, {"unit", "assumed", "source"}, f"rate {name} in {path}")
        _positive(name, rate["assumed"])
        for row in rate.get("measured", []):
            _has(row, {"value", "device", "date"}, f"a measurement of {name} in {path}")
            _positive(name, row["value"])
    for row in data["counts"]:
        _has(row, {"kernel", "tile", "warps", "triton", "commit"}, f"a count in {path}")
        _check_count(row, path)
    return data


def _has(row, names: set[str], what: str) -> None:
    if missing := sorted(names - set(row if isinstance(row, dict) else ())):
        raise ValueError(f"{what} lacks {', '.join(missing)}")


def _check_count(row: dict, path: Path) -> None:
    """Norms that walk twice are bound by latency and bytes, so only their tiles are known."""
    what = f"of {row['kernel']} in {path}"
    if not isinstance(row["tile"], list) or len(row["tile"]) != 2:
        raise ValueError(f"expected a tile of two sizes {what}, got {row['tile']!r}")
    numbers = [*row["tile"], row["warps"]]
    if not row["kernel"].startswith("norm") or "instructions" in row:
        numbers += [row.get("instructions"), *row.get("products", {}).values()]
    numbers += [row["more"]] if "more" in row else []
    for number in numbers:
        _positive(f"the counts {what}", number)
    for shape in row.get("products", {}):
        if not re.fullmatch(r"64x\d+", shape):
            raise ValueError(f"expected products 64xN {what}, got {shape}")


def save(data: dict, path: Path) -> None:
    """Write the file whole or not at all, a rate or a count a line."""
    rates = [f"{_json(name)}: {_json(rate)}" for name, rate in data["rates"].items()]
    counts = [_json(row) for row in data["counts"]]
    text = '{{\n"rates": {{\n{}\n}},\n"counts": [\n{}\n]\n}}\n'
    new = path.with_name(f"{path.name}.tmp")
    new.write_text(text.format(",\n".join(rates), ",\n".join(counts)), encoding="utf-8")
    os.replace(new, path)


def measure(data: dict, name: str, value: float, device: str, date: str) -> dict:
    """The data with one more measured row; the value assumed and older rows stay.

    device: the GPU's name, such as "NVIDIA H200"   date: YYYY-MM-DD
    ValueError for an unknown rate, the memory of another GPU, and a bad value or date.
    """
    if name not in data["rates"]:
        known = ", ".join(data["rates"])
        raise ValueError(f"unknown rate {name}; expected one of {known}")
    _positive(name, value)
    kind, _, of = name.partition(".")
    if kind == "memory" and of not in device.split():
        raise ValueError(f"{name} is not a rate of {device}; measure memory there")
    datetime.date.fromisoformat(date)
    rate = data["rates"][name]
    row = {"value": value, "device": device, "date": date}
    rate = rate | {"measured": [*rate.get("measured", []), row]}
    return data | {"rates": data["rates"] | {name: rate}}


class Rates:
    """The rates of one GPU, measured where they are, and counts for one state of the kernels.

    device: "H100" or "H200", a word of the measured rows' device
    commit: take the counts as of this commit; without it, the newest of the tiles asked for
    """

    def __init__(self, data: dict, device: str, commit: str | None = None):
        self.data, self.device, self.commit = data, device, commit
        counts = data["counts"]
        commits = [row["commit"] for row in counts]
        if commit is None:
            self._rows = [row for row in counts if row["commit"] != PROPOSED]
        elif commit in commits:
            self._rows = counts[: len(counts) - commits[::-1].index(commit)]
        else:
            known = ", ".join(dict.fromkeys(commits))
            raise ValueError(f"no counts of {commit}; expected one of {known}")

    def __getitem__(self, name: str) -> float:
        if name not in self.data["rates"]:
            raise ValueError(f"the file of rates does not have {name}; add it like the others")
        row = self._measured(name)
        return row["value"] if row else self.data["rates"][name]["assumed"]

    def _measured(self, name: str) -> dict | None:
        rows = self.data["rates"][name].get("measured", [])
        rows = [row for row in rows if self.device in row["device"].split()]
        return max(reversed(rows), key=lambda row: row["date"], default=None)

    def count(self, kernel: str, tile: tuple[int, int], warps: int) -> dict:
        """The newest counts of a kernel at a tile; those at a commit, whatever tile it had.

        ValueError when nobody has read them.
        """
        rows = [row for row in self._rows if row["kernel"] == kernel]
        of = f"up to {self.commit}"
        if self.commit is None:
            rows = [row for row in rows if (*row["tile"], row["warps"]) == (*tile, warps)]
            of = f"with a tile of {tile[0]}x{tile[1]} and {warps} warps"
        if not rows:
            raise ValueError(f"no counts of {kernel} {of}; read its machine code and add them")
        return rows[-1]

    def notes(self) -> list[str]:
        """Which rates are measured."""
        lines = []
        for name, rate in self.data["rates"].items():
            if row := self._measured(name):
                lines.append(
                    f"{self.device}: {name} measured {row['value']:g} {rate['unit']} on "
                    f"{row['device']}, {row['date']} (assumed {rate['assumed']:g})"
                )
        return lines or [f"{self.device}: all rates are assumed, none measured"]


def _json(value) -> str:
    return json.dumps(value, ensure_ascii=False)


def _positive(name: str, value) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value <= 0:
        raise ValueError(f"expected a positive number for {name}, got {value!r}")

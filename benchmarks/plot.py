# SPDX-License-Identifier: Apache-2.0
"""One picture of a results file: the time of every provider over the baseline's, by shape.

python -m benchmarks.plot benchmarks/results/<machine>.csv picture.png
"""

import argparse
import csv
from pathlib import Path


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description="draw a benchmark results file")
    parser.add_argument("results", type=Path)
    parser.add_argument("picture", type=Path)
    options = parser.parse_args(arguments)
    with options.results.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["ratio"]]
    if not rows:
        raise SystemExit(f"{options.results} holds no timed row")
    draw(rows, options.picture)
    return 0


def draw(rows: list[dict], picture: Path) -> None:
    """Grouped bars, one group a shape and mode, one colour a provider."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = list(dict.fromkeys((row["shape"], row["mode"]) for row in rows))
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    width = 0.8 / len(providers)
    figure, axes = pyplot.subplots(figsize=(2.2 + 2.2 * len(groups), 4.5), layout="constrained")
    for i, provider in enumerate(providers):
        found = {(r["shape"], r["mode"]): float(r["ratio"]) for r in rows
                 if r["provider"] == provider}  # fmt: skip
        at = [j + (i - (len(providers) - 1) / 2) * width for j in range(len(groups))]
        bars = axes.bar(at, [found.get(group, 0.0) for group in groups], width, label=provider)
        axes.bar_label(bars, fmt="%.2f", fontsize=7, padding=1)
    axes.set_xticks(range(len(groups)), [f"{shape}\n{mode}" for shape, mode in groups], fontsize=8)
    axes.set_ylabel("time, forward and backward / baseline")
    axes.set_title(f"{rows[0]['operation']}, {rows[0]['dtype']}, {rows[0]['machine']}", fontsize=10)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.legend(fontsize=8)
    figure.savefig(picture, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    raise SystemExit(main())

# SPDX-License-Identifier: Apache-2.0
"""One self-contained page of a profile: tables and drawings, nothing from the network."""

import base64
from collections.abc import Sequence
from html import escape
from typing import Any

from samfast.profiling import text
from samfast.profiling.plot import memory_png, roofline_png

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1e; --paper: #ffffff; --line: #d9d9de;
  --quiet: #5c5c66; --bar: #9cc4e4; }
@media (prefers-color-scheme: dark) { :root { --ink: #ececf0; --paper: #17181b; --line: #3a3b41;
  --quiet: #a5a6b0; --bar: #2b5777; } }
body { margin: 0 auto; padding: 1rem; max-width: 84rem; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.3rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.loss { font-size: 1.15rem; font-weight: 600; }
.quiet { color: var(--quiet); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.8rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.2rem 0.45rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0;
  background: var(--paper); }
td.why { text-align: left; }
td.share { background: linear-gradient(to right, var(--bar) var(--part), transparent 0); }
img { max-width: 100%; height: auto; background: #ffffff; border-radius: 4px; }
"""


def page(result: dict[str, Any]) -> str:
    """Return the whole page as HTML."""
    operations = [[row["name"], *text.cells(row)] for row in text.shown(result["operations"])]
    parts = [
        f"<h1>{escape(text.head(result))}</h1>",
        f'<p class="loss">{escape(_sentence(result["largest_loss"]))}</p>',
        *(f'<p class="quiet">{escape(_sentence(line))}</p>' for line in text.totals(result)),
        *(f"<p>Note: {escape(note)}.</p>" for note in result["notes"]),
        _titled("Operations", _table(text.heads_of_operations(), operations)),
        _titled("Phases", _groups("phase", result["phases"])),
        _titled("Blocks", _groups("block", result["blocks"])),
    ]
    if result.get("compare"):
        heads, *rows = text.comparison_cells(result["compare"])
        parts.append(_titled("Compared, in turns", _table(heads, rows)))
    parts.append(_titled("Ceilings", _image(roofline_png(result), _about_roofline(result))))
    parts.append(_titled("Memory", _image(memory_png(result), _about_memory(result))))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>samfast profile</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def _titled(title: str, content: str) -> str:
    return f"<h2>{title}</h2>\n{content}"


def _groups(kind: str, rows: Sequence[dict[str, Any]]) -> str:
    cells = [[row["name"], *text.group_cells(row)] for row in rows]
    return _table(text.heads_of_groups(kind), cells)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    share = heads.index("share") if "share" in heads else -1
    lines = ["<tr>" + "".join(f'<th scope="col">{escape(h)}</th>' for h in heads) + "</tr>"]
    for row in rows:
        if len(row) == 2:
            why = f'<td class="why" colspan="{len(heads) - 1}">{escape(row[1])}</td>'
            lines.append(f"<tr><td>{escape(row[0])}</td>{why}</tr>")
            continue
        cells = (
            f'<td class="share" style="--part: {cell}">{cell}</td>'
            if i == share
            else f"<td>{escape(cell)}</td>"
            for i, cell in enumerate(row)
        )
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return '<div class="scroll"><table>\n' + "\n".join(lines) + "\n</table></div>"


def _image(png: bytes, about: str) -> str:
    data = base64.b64encode(png).decode("ascii")
    return f'<img alt="{escape(about)}" src="data:image/png;base64,{data}">'


def _about_roofline(result: dict[str, Any]) -> str:
    limits = result["ceilings"]
    return (
        f"Operations by FLOP per byte and FLOP per second, under {limits['copy'] / 1e9:.1f} GB/s "
        f"and {limits['gemm'] / 1e12:.3f} TFLOP/s"
    )


def _about_memory(result: dict[str, Any]) -> str:
    return (
        "Bytes of tensors over one step by what they are for; the most are "
        f"{result['totals']['peak_bytes'] / 1e6:.1f} MB"
    )


def _sentence(line: str) -> str:
    first = line if "::" in line.partition(" ")[0] else f"{line[:1].upper()}{line[1:]}"
    return f"{first}."

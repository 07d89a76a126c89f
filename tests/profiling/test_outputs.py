# SPDX-License-Identifier: Apache-2.0
"""Files of a profile: whole, self-contained, and refused before the profile runs."""

import html.parser
import io
import json
import re

import pytest
import torch
from PIL import Image
from torch import nn

import samfast
from samfast import cli


class Page(html.parser.HTMLParser):
    """Tags that are open at the end, what is linked, and the cells of tables."""

    def __init__(self, text):
        super().__init__()
        self.open, self.links, self.rows = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag == "tr":
            self.rows.append([])
        self.links += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1].append(data)


@pytest.fixture(scope="module")
def profile():
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))
    optimizer = torch.optim.AdamW(model.parameters())
    with samfast.profile(model) as p:
        for _ in range(3):
            model(torch.randn(32, 64)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return p


@pytest.mark.slow_on_cpu
def test_page(profile, tmp_path):
    profile.html(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert len(page.links) == 2 and all(link.startswith("data:image/png;") for link in page.links)
    assert "http" not in re.sub(r"base64,[A-Za-z0-9+/=]+", "", text)
    assert "width=device-width" in text and "prefers-color-scheme: dark" in text
    names = {row[0] for row in page.rows if row}
    assert {row["name"] for row in profile.as_dict()["operations"][:5]} <= names
    assert {"phase", "block", "operation"} <= names


def test_plot(profile, tmp_path):
    profile.plot(tmp_path / "plot.png")
    image = Image.open(io.BytesIO((tmp_path / "plot.png").read_bytes()))
    assert image.format == "PNG" and min(image.size) > 600
    assert len(image.convert("RGB").getcolors(1 << 20)) > 50  # something is drawn


def test_trace(profile, tmp_path):
    profile.trace(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = [event.get("name") for event in events]
    assert {"samfast/step", "aten::addmm", "samfast/block/0"} <= set(names)


def test_tables_name_everything_once(profile):
    from samfast.profiling.text import shown

    rows = [{**profile.as_dict()["operations"][0], "name": str(i)} for i in range(40)]
    *first, rest = shown(rows)
    assert len(first) == 24 and rest["name"] == "16 others"
    assert rest["share"] == pytest.approx(16 * rows[0]["share"])


def refused(capsys, *words):
    assert cli.main(["profile", *map(str, words)]) == 2
    return capsys.readouterr().err.strip().splitlines()[-1].removeprefix("samfast: ")


def test_files_that_cannot_be_written(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("samfast.profiling.command.build", None)  # nothing is built
    assert refused(capsys, "--plot", tmp_path).endswith("is a folder; name a file to write")
    gone = tmp_path / "gone" / "page.html"
    assert refused(capsys, "--html", gone).endswith(f"the folder {gone.parent} does not exist")
    twice = tmp_path / "twice"
    sentence = refused(capsys, "--html", twice, "--plot", twice)
    assert sentence == f"{twice} is given for two outputs; give each its own file"
    long = tmp_path / ("x" * 300)
    assert "cannot be written (" in refused(capsys, "--trace", long)
    assert not list(tmp_path.iterdir())


def test_settings_that_cannot_be_run(capsys):
    assert "is for several tasks" in refused(capsys, "--method", "ta-lora")
    assert "unknown model 'vit_x'" in refused(capsys, "--model", "vit_x")
    assert "skip is 1; it must be at least 2" in refused(capsys, "--skip", "1")
    assert "is not a positive multiple of 16" in refused(capsys, "--image-size", "100")
    if not torch.cuda.is_available():
        assert "finds no GPU; use --device cpu" in refused(capsys, "--device", "cuda")
        assert "float16 needs a GPU" in refused(capsys, "--dtype", "float16")
        assert "backend 'triton' cannot run" in refused(capsys, "--backend", "cuda").replace(
            "'cuda'", "'triton'"
        )


def test_matplotlib_is_asked_for_before(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    sentence = refused(capsys, "--plot", tmp_path / "plot.png")
    assert sentence == "No module named 'matplotlib': pip install \"samfast[train]\""

# SPDX-License-Identifier: Apache-2.0
"""Run whatever a reader can copy from the built pages, as the page shows it.

python docs/check_pages.py build/site

Takes code out of the HTML, checks that no block of the sources got lost or changed, and runs Python
and commands by tests/test_documents.py, the slow ones too, in a folder of stand-ins. Ends with 1
where something fails.
"""

import argparse
import doctest
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

ROOT = Path(__file__).parents[1]
SHOWN = ("python", "sh", "yaml", "pycon")  # languages of blocks that a reader runs or copies
TESTS = ("test_python", "test_commands", "test_yaml", "test_accelerate_s_yaml")


@dataclass
class Code(HTMLParser):
    """What stands in blocks and between backticks of a page, in order, as (language, text)."""

    found: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self):
        super().__init__()
        self.languages: list[str] = []  # of the open elements div, "" where one has none
        self.inside, self.text, self.body = "", "", False

    def handle_starttag(self, tag, attrs):
        classes = (dict(attrs).get("class") or "").split()
        if tag == "article":
            self.body = True
        elif tag == "div":
            named = [c.removeprefix("language-") for c in classes if c.startswith("language-")]
            signature = "doc-signature" in classes
            self.languages.append("signature" if signature else named[0] if named else "")
        elif tag == "code" and self.body:
            self.inside, self.text = self.language() or "inline", ""

    def handle_endtag(self, tag):
        if tag == "article":
            self.body = False
        elif tag == "div" and self.languages:
            self.languages.pop()
        elif tag == "code" and self.inside:
            if self.text.strip():
                self.found.append((self.inside, self.text))
            self.inside = ""

    def handle_data(self, data):
        self.text += data

    def language(self) -> str:
        """Of the innermost block around here."""
        return next((name for name in reversed(self.languages) if name), "")


def code_of(page: str) -> list[tuple[str, str]]:
    """(language, text) of every block and inline piece of a page's HTML."""
    reader = Code()
    reader.feed(page)
    return reader.found


def as_markdown(code: list[tuple[str, str]]) -> str:
    """The same as a document; examples of docstrings become Python without their output."""
    lines = []
    for language, text in code:
        if language == "inline":
            lines.append(f"`{text}`")
        elif language == "pycon":
            lines.append(f"```python\n{doctest.script_from_examples(text).strip()}\n```")
        elif language in SHOWN:
            lines.append(f"```{language}\n{text.strip(chr(10))}\n```")
    return "\n\n".join(lines) + "\n"


def lost(site: Path) -> list[str]:
    """Blocks of the sources that their page does not show as they are."""
    sys.path.insert(0, str(ROOT / "tests"))
    from documents import DOCUMENTS, blocks

    found = []
    for document in DOCUMENTS:
        if not document.startswith("docs/"):
            continue
        page = site / Path(document).relative_to("docs").with_suffix(".html")
        shown = [(name, text.strip()) for name, text in code_of(page.read_text(encoding="utf-8"))]
        wanted = [b for b in blocks(document) if b.language != "inline"]
        found += [str(b) for b in wanted if (b.language, b.source.strip()) not in shown]
    return found


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description="run the code of the built pages")
    parser.add_argument("site", type=Path, help="the folder that mkdocs built")
    parser.add_argument("--quick", action="store_true", help="leave out what takes long")
    options = parser.parse_args(arguments)
    pages = sorted(options.site.rglob("*.html"))
    if not pages:
        print(f"{options.site} has no pages; run make docs first", file=sys.stderr)
        return 2
    if missing := lost(options.site):
        print(f"pages do not show these blocks as they are: {', '.join(missing)}", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        for page in pages:
            place = Path(folder, "docs", page.relative_to(options.site).with_suffix(".md"))
            place.parent.mkdir(parents=True, exist_ok=True)
            text = as_markdown(code_of(page.read_text(encoding="utf-8")))
            place.write_text(text, encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-q", "tests/test_documents.py"]
        command += ["-k", " or ".join(TESTS)]
        command += ["-m", "not slow"] if options.quick else []
        environment = {**os.environ, "SAMFAST_PAGES": folder}
        return subprocess.run(command, cwd=ROOT, env=environment).returncode


if __name__ == "__main__":
    raise SystemExit(main())

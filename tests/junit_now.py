# SPDX-License-Identifier: Apache-2.0
"""Results as junit xml that is whole after every test: what a stop leaves is kept.

``pytest --junit-now FILE``; pytest's own --junitxml writes when all is over.
"""

from pathlib import Path
from xml.sax.saxutils import escape, quoteattr

HEAD = '<?xml version="1.0" encoding="utf-8"?>\n<testsuites><testsuite name="pytest">\n'
FOOT = "</testsuite></testsuites>\n"


class JunitNow:
    """A test case is its node's id, its seconds, and why it failed or was left out."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("w", encoding="utf-8")
        self.seconds: dict[str, float] = {}
        self.told: set[str] = set()
        self._write(HEAD)

    def pytest_runtest_logreport(self, report):
        """Called where results arrive: with pytest-xdist that is one process."""
        node = report.nodeid
        self.seconds[node] = self.seconds.get(node, 0.0) + report.duration
        if report.outcome == "passed" and report.when != "teardown":
            return  # it may fail later
        if node in self.told:
            return
        if report.outcome != "passed" or report.when == "teardown":
            self.told.add(node)
            self._write(self._case(node, report))

    def _case(self, node: str, report) -> str:
        file, _, name = node.partition("::")
        what = ""
        if report.outcome != "passed":
            kind = "skipped" if report.skipped else "failure"
            text = str(report.longrepr)
            last = text.strip().splitlines()[-1] if text.strip() else ""
            what = f"<{kind} message={quoteattr(_plain(last))}>{escape(_plain(text))}</{kind}>"
        seconds = self.seconds.pop(node)
        head = f"<testcase classname={quoteattr(file)} name={quoteattr(name)}"
        return f'{head} time="{seconds:.3f}">{what}</testcase>\n'

    def _write(self, text: str) -> None:
        """Over the end, which follows again."""
        self.file.write(text)
        at = self.file.tell()
        self.file.write(FOOT)
        self.file.flush()
        self.file.seek(at)


def _plain(text: str) -> str:
    """Without the characters that xml has no place for, such as a terminal's colours."""
    return "".join(c for c in text if c in "\t\n" or (c >= " " and c not in "\ufffe\uffff"))

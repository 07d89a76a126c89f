# SPDX-License-Identifier: Apache-2.0
"""The site builds: every page, link and name of the reference."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow  # some 15 s, and an extra of its own
def test_the_site_builds(tmp_path):
    pytest.importorskip("mkdocs", reason='needs pip install ".[docs]"')
    shutil.rmtree(ROOT / "build" / "sources", ignore_errors=True)  # as in a fresh clone
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "reference" / "samfast.html").read_text(encoding="utf-8")
    assert "samfast.ranges" in page and "samfast.load_adapted" in page

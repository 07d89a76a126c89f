# SPDX-License-Identifier: Apache-2.0
"""What mkdocs asks before it builds: pages that are made of the code, and where the code is."""

import re
import shutil
from pathlib import Path

from mkdocs.structure.files import File

from benchmarks import methods
from docs.makers import api, backends, commands, measured

ROOT = Path(__file__).parents[2]
PAGES = {  # by their places in docs/
    "reference/command-line.md": commands.page,
    "reference/backends.md": backends.page,
    "reference/measured.md": measured.page,
    **{f"reference/{name}.md": api.page_of(name) for name in api.PAGES},
}
FITS = re.compile(r"The largest batch, counted:.*?(?=<!-- end of what fits)", re.DOTALL)


def on_startup(command, dirty):
    """Put samfast and kernels into one package, as a wheel has them, for mkdocstrings to read.

    It looks for the folder when it is configured, before any hook's ``on_config``.
    """
    target = ROOT / "build" / "sources" / "samfast"
    shutil.rmtree(target, ignore_errors=True)
    for folder, place in ((ROOT / "samfast", target), (ROOT / "kernels", target / "kernels")):
        for path in folder.rglob("*.py"):
            copy = place / path.relative_to(folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)  # of a link, submodules would be sought where it leads
    for folder in (target, *(path for path in target.rglob("*") if path.is_dir())):
        if not (folder / "__init__.py").exists():
            (folder / "__init__.py").touch()


def on_files(files, config):
    """Add the pages that the code makes."""
    for place, page in PAGES.items():
        files.append(File.generated(config, place, content=page()))
    return files


def on_page_markdown(markdown, page, config, files):
    """Put in the tables that stand elsewhere."""
    if "<!-- table: methods -->" in markdown:
        return markdown.replace("<!-- table: methods -->", methods.table())
    if "<!-- table: what fits -->" in markdown:
        table = FITS.search((ROOT / "README.md").read_text(encoding="utf-8"))[0]
        return markdown.replace("<!-- table: what fits -->", table)
    return markdown

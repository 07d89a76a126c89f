# SPDX-License-Identifier: Apache-2.0
"""Workflows, citation and change log agree with the project that they are about."""

import re
from pathlib import Path

import pytest
import yaml
from project_file import project

import samfast

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def loaded(path: Path) -> dict:
    # In YAML 1.1 the word "on" is true, whereas GitHub reads it as a word.
    return yaml.load(path.read_text(), yaml.BaseLoader)


def steps_of(flow: dict) -> list[dict]:
    return [step for job in flow["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_may_only_read_and_pins_its_actions(path):
    flow = loaded(path)
    assert flow["permissions"] == {"contents": "read"}
    assert set(flow["concurrency"]) == {"group", "cancel-in-progress"}
    assert all("timeout-minutes" in job for job in flow["jobs"].values())
    assert not any("permissions" in job for job in flow["jobs"].values())
    used = [step["uses"] for step in steps_of(flow) if "uses" in step]
    assert used and all(re.fullmatch(r"actions/[\w-]+@v\d+\.\d+\.\d+", name) for name in used)
    (checkout,) = (s for s in steps_of(flow) if s.get("uses", "").startswith("actions/checkout@"))
    assert checkout["with"]["persist-credentials"] == "false"


def test_there_are_workflows_for_all_that_a_change_can_break():
    assert [path.stem for path in WORKFLOWS] == ["docs", "lint", "tests", "wheels"]


def test_tests_run_on_every_python_and_from_the_oldest_torch():
    matrix = loaded(ROOT / ".github" / "workflows" / "tests.yml")["jobs"]["tests"]["strategy"]
    matrix = matrix["matrix"]
    assert matrix["python"] == ["3.10", "3.11", "3.12", "3.13"]
    assert project()["requires-python"] == f">={matrix['python'][0]}"
    oldest, pinned, newest = matrix["torch"]
    assert f"torch>={oldest['name']}" in project()["dependencies"]
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    assert {*pinned["packages"].split(), pinned["triton"]} <= set(pins)
    assert newest["packages"] == "torch torchvision"


def test_files_that_workflows_name_exist():
    commands = "\n".join(
        step.get("run", "") for path in WORKFLOWS for step in steps_of(loaded(path))
    )
    named = set(re.findall(r"[\w/-]+\.(?:py|txt)\b", commands))
    assert {"setup.py", "requirements-dev.txt", "tests/test_release.py"} <= named
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []


def test_the_citation_is_of_this_version_and_names_three_papers():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == samfast.__version__ == project()["version"]
    assert citation["license"] == project()["license"]
    assert [len(paper["authors"]) for paper in citation["references"]] == [5, 6, 3]
    assert all(paper["title"] and paper["year"] == 2024 for paper in citation["references"])


def test_the_change_log_begins_with_what_is_not_released():
    titles = re.findall(r"^##+ .*$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert titles[0] == "## [Unreleased]"
    kinds = {f"### {kind}" for kind in ("Added", "Changed", "Deprecated", "Removed", "Fixed")}
    assert all(
        title in kinds | {"### Security"} or re.fullmatch(r"## \[[^\]]+\].*", title)
        for title in titles
    )

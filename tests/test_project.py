"""The project's own files: license, citation, hooks, workflows and templates say what is so."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
YAML = sorted([*(ROOT / ".github").rglob("*.yml"), ROOT / ".pre-commit-config.yaml"])


def loaded(path: str | Path) -> Any:
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.mark.parametrize("path", YAML, ids=lambda path: path.name)
def test_yaml_is_a_mapping(path: Path) -> None:
    assert isinstance(loaded(path), dict) and loaded(path)


def test_license_is_the_text_of_apache_2_and_its_notice_names_the_project() -> None:
    text = " ".join((ROOT / "LICENSE").read_text(encoding="utf-8").split())
    assert text.startswith("Apache License Version 2.0, January 2004 http://www.apache.org/")
    assert "TERMS AND CONDITIONS FOR USE, REPRODUCTION, AND DISTRIBUTION" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert (ROOT / "NOTICE").read_text(encoding="utf-8").startswith("eagle3fn\nCopyright 2026")


def test_hooks_have_the_versions_of_pyproject() -> None:
    """A file that a hook has formatted passes scripts/test.sh too."""
    (repository,) = loaded(".pre-commit-config.yaml")["repos"]
    assert repository["repo"] == "local"
    pins: set[str] = set()
    for hook in repository["hooks"]:
        assert hook["language"] == "python", hook["id"]
        pins |= set(hook["additional_dependencies"])
    assert all(re.fullmatch(r"[\w-]+==[\d.]+", pin) for pin in pins)
    declared = [one for one in project()["optional-dependencies"]["test"] if one.startswith("ruff")]
    assert [pin for pin in pins if pin.startswith("ruff==")] == declared


def test_citation_has_what_its_schema_requires_and_the_projects_own_license() -> None:
    """cff-version 1.2.0: these keys, and at least one author with a name."""
    citation = loaded("CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["cff-version"] == "1.2.0"
    assert all(author.get("name") or author.get("family-names") for author in citation["authors"])
    assert citation["license"] == project()["license"]
    assert citation["authors"] == project()["authors"]
    for reference in citation["references"]:
        assert {"type", "title", "authors"} <= reference.keys()


def test_workflows_run_the_commands_that_people_run() -> None:
    """Each in a limit of time, without rights to write, on the oldest Python that is supported."""
    for name, command in (("ci", ".ci/run"), ("lanes", "scripts/lane.sh ${{ matrix.lane }}")):
        workflow = loaded(f".github/workflows/{name}.yml")
        assert workflow["permissions"] == {"contents": "read"}
        (job,) = workflow["jobs"].values()
        assert job["timeout-minutes"] <= 60
        python, run = job["steps"][1:]
        assert run["run"] == command
        assert (ROOT / command.split()[0]).stat().st_mode & 0o111
        assert project()["requires-python"] == f">={python['with']['python-version']}"

    lanes = loaded(".github/workflows/lanes.yml")
    assert lanes[True]["schedule"]  # YAML reads `on` as true
    named = lanes["jobs"]["lane"]["strategy"]["matrix"]["lane"]
    assert {f"{name}.txt" for name in named} == {
        path.name for path in (ROOT / "scripts/lanes").iterdir()
    }


def test_bug_form_asks_for_what_is_needed_to_repeat_it() -> None:
    fields = {one["id"]: one for one in loaded(".github/ISSUE_TEMPLATE/bug.yml")["body"][1:]}
    for name in ("command", "seen", "expected", "versions"):
        assert fields[name]["validations"]["required"], name


def test_files_that_contributing_names_are_there() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert 5000 <= len(text.encode()) <= 9000
    named = re.findall(r"\b(?:scripts|bench|tests|\.ci)/[\w./-]+\w", text)
    assert len(set(named)) > 8
    for name in set(named):
        assert (ROOT / name).exists(), name
    for module in re.findall(r"python -m ((?:tests|bench)\.[\w.]+)", text):
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), module

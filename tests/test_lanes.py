"""The lanes of the tests: their versions are pyproject.toml's, and a bad call is one line."""

import os
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
LANES = ROOT / "scripts" / "lanes"
# Triton comes with torch, or by hand where torch is for CPUs. pyparsing is matplotlib's: from 3.3
# on it warns of names that matplotlib 3.10.0 uses.
NOT_DECLARED = {"triton", "pyparsing"}


def declared() -> dict[str, Requirement]:
    """The requirements of the package, its data files, its demo and its tests, by name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    texts = project["dependencies"] + extras["data"] + extras["demo"] + extras["testing"]
    return {one.name: one for one in map(Requirement, texts)}


def minimum(requirement: Requirement) -> Version:
    (specifier,) = requirement.specifier
    assert specifier.operator == ">=", requirement
    return Version(specifier.version)


def pinned(lane: str, python: str) -> dict[str, Version]:
    """A lane's versions by name, for one Python."""
    lines = (LANES / f"{lane}.txt").read_text().splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    mine = [
        one
        for one in found
        if one.marker is None or one.marker.evaluate({"python_version": python})
    ]
    assert len({one.name for one in mine}) == len(mine), (
        f"{lane}.txt pins a package twice for Python {python}"
    )
    for one in mine:
        assert [specifier.operator for specifier in one.specifier] == ["=="], one
    return {one.name: Version(next(iter(one.specifier)).version) for one in mine}


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_the_oldest_lane_is_pyprojects_minima(python: str) -> None:
    minima = {name: minimum(requirement) for name, requirement in declared().items()}
    oldest = pinned("oldest", python)
    assert {name: version for name, version in oldest.items() if name not in NOT_DECLARED} == minima
    assert oldest["torch"] == Version("2.11.0") and oldest["triton"] == Version("3.6.0")
    assert oldest["transformers"] <= Version("5.17.0")


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_the_newest_lane_names_every_package_and_none_older(python: str) -> None:
    oldest, newest = pinned("oldest", python), pinned("newest", python)
    assert newest.keys() == oldest.keys()
    assert [name for name, version in newest.items() if version < oldest[name]] == []


@pytest.mark.parametrize(
    ("arguments", "profile", "message"),
    [
        ([], "ci", "lane '': must be oldest or newest"),
        (["middle"], "ci", "lane 'middle': must be oldest or newest"),
        (["oldest"], "weekly", "HYPOTHESIS_PROFILE 'weekly': must be dev, ci or nightly"),
    ],
)
def test_a_bad_call_is_one_line(arguments: list[str], profile: str, message: str) -> None:
    command = ["bash", str(ROOT / "scripts" / "lane.sh"), *arguments]
    environment = {**os.environ, "HYPOTHESIS_PROFILE": profile}
    ran = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout, ran.stderr.count("\n")) == (2, "", 1)
    assert message in ran.stderr

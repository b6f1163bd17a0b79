"""What is installed: the wheel has the whole package and nothing else, and the tests run on it."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

import eagle3fn

ROOT = Path(__file__).resolve().parent.parent
CHECKOUT = os.environ.get("CHECKOUT", "")
"""The checkout whose wheel scripts/test.sh installed; empty: none, and ROOT is imported."""

SOURCE = Path(CHECKOUT or ROOT)
NEEDED = ("pyproject.toml", "README.md", "LICENSE", "NOTICE")
BUILD = "import sys; import setuptools.build_meta as made; getattr(made, sys.argv[1])(sys.argv[2])"


def files_of(folder: Path) -> dict[str, bytes]:
    """The package's files below a folder that has it, by name."""
    paths = (folder / "eagle3fn").rglob("*")
    kept = [path for path in paths if path.is_file() and "__pycache__" not in path.parts]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in kept}


def build(kind: str, source: Path, out: Path) -> Path:
    """Build `source` with the setuptools at hand, without a network; the file that was made."""
    out.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", BUILD, kind, str(out)],
        cwd=source,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (made,) = out.iterdir()
    return made


def unpacked(wheel: Path) -> dict[str, bytes]:
    """A wheel's files by name; RECORD, which is a list of them, is left out."""
    with zipfile.ZipFile(wheel) as file:
        names = [name for name in file.namelist() if not name.endswith("/RECORD")]
        return {name: file.read(name) for name in names}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The wheel of a copy of the checkout: building leaves files in the folder that it reads."""
    root = tmp_path_factory.mktemp("wheel")
    copy_source(root / "source")
    return unpacked(build("build_wheel", root / "source", root / "dist"))


def copy_source(place: Path) -> None:
    leave_out = shutil.ignore_patterns("__pycache__")
    shutil.copytree(SOURCE / "eagle3fn", place / "eagle3fn", ignore=leave_out)
    for name in NEEDED:
        shutil.copy(SOURCE / name, place)


def metadata(files: dict[str, bytes]) -> Message:
    (name,) = [name for name in files if name.endswith(".dist-info/METADATA")]
    return Parser().parsestr(files[name].decode())


def test_wheel_has_every_file_of_the_package_and_nothing_else(wheel: dict[str, bytes]) -> None:
    expected = files_of(SOURCE)
    assert "eagle3fn/py.typed" in expected
    inside = {name: data for name, data in wheel.items() if ".dist-info/" not in name}
    assert sorted(inside) == sorted(expected)
    assert inside == expected


def test_wheel_has_the_license_and_says_it(wheel: dict[str, bytes]) -> None:
    said = metadata(wheel)
    assert said["License-Expression"] == "Apache-2.0"
    assert said.get_all("License-File") == ["LICENSE", "NOTICE"]
    for name in ("LICENSE", "NOTICE"):
        (text,) = [data for path, data in wheel.items() if path.endswith(f"/licenses/{name}")]
        assert text == (SOURCE / name).read_bytes()


def test_sdist_has_the_license_and_makes_the_same_wheel(
    wheel: dict[str, bytes], tmp_path: Path
) -> None:
    copy_source(tmp_path / "source")
    sdist = build("build_sdist", tmp_path / "source", tmp_path / "sdist")
    with tarfile.open(sdist) as file:
        file.extractall(tmp_path / "unpacked", filter="data")

    (source,) = (tmp_path / "unpacked").iterdir()
    assert source.name == f"eagle3fn-{eagle3fn.__version__}"
    for name in NEEDED:
        assert (source / name).read_bytes() == (SOURCE / name).read_bytes()
    assert unpacked(build("build_wheel", source, tmp_path / "dist")) == wheel


def test_version_is_written_once_and_wheel_changelog_and_citation_have_it(
    wheel: dict[str, bytes],
) -> None:
    version = eagle3fn.__version__
    assert metadata(wheel)["Version"] == version
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["dynamic"] == ["version"] and "version" not in project

    # The newest section with a number; an Unreleased one may be above it.
    changelog = (ROOT / "CHANGELOG.md").read_text()
    number, date = re.findall(r"^## \[(\d[\w.]*)\] - ([\d-]+)$", changelog, re.M)[0]
    assert number == version
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.findall(r"^version: (.*)$", citation, re.M) == [version]
    assert re.findall(r"^date-released: (.*)$", citation, re.M) == [date]


def test_tests_run_on_the_installed_wheel_where_the_lane_says_so() -> None:
    """In this process and in one that it starts; elsewhere the checkout is tested."""
    show = "import eagle3fn; print(eagle3fn.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", show], cwd=ROOT, capture_output=True, text=True, check=True
    )
    found = {Path(place).resolve().parent for place in (eagle3fn.__file__, done.stdout.strip())}
    if CHECKOUT:
        assert found == {Path(sysconfig.get_path("purelib")).resolve() / "eagle3fn"}
        assert files_of(ROOT) == files_of(SOURCE)
    else:
        assert found == {ROOT / "eagle3fn"}

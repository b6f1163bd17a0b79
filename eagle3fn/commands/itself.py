"""Commands on the program itself: its version, and completion of its options in a shell."""

import argparse
import platform
from typing import Any

from eagle3fn.base.output import Result, json_line
from eagle3fn.commands.grammar import JSON, Command, parsers_of


def add_version(root: argparse.ArgumentParser) -> None:
    """Add the options of `eagle3fn` without a command."""
    root.add_argument("--version", action="store_true", help="show the versions and end")
    root.add_argument(
        JSON.flag, dest="version_as_json", action="store_true", help="with --version: as JSON"
    )


def show_version(as_json: bool) -> int:
    """Print the versions of this package, torch and Python on one line; returns the exit code."""
    import torch

    import eagle3fn

    versions = {
        "eagle3fn": eagle3fn.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    text = ", ".join(f"{name} {number}" for name, number in versions.items())
    print(json_line(versions) if as_json else text)
    return 0


# Completion

_FILES = ("FILE", "PATH", "PYTHON", "CHECKPOINT", "TARGET")
_FOLDERS = ("FOLDER",)
_SHELLS = ("bash", "zsh", "tcsh")


def completion(options: Any) -> Result:
    """Print the script by which a shell completes commands, options, files and folders."""
    import shtab

    root = options.parser
    for sub in parsers_of(root).values():
        for action in sub._actions:
            if action.metavar in _FILES:
                action.complete = shtab.FILE  # pyright: ignore[reportAttributeAccessIssue]
            elif action.metavar in _FOLDERS:
                action.complete = shtab.DIRECTORY  # pyright: ignore[reportAttributeAccessIssue]

    script = shtab.complete(root, options.shell)
    print(script)
    return Result({"shell": options.shell, "script": script})


COMPLETION = Command(
    name="completion",
    stage="this program",
    run=completion,
    about="print a script by which a shell completes commands, options and files",
    example="bash > ~/.local/share/bash-completion/completions/eagle3fn",
    options=(),
    arguments=({"name": "shell", "choices": _SHELLS},),
)

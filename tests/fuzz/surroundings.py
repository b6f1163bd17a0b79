"""What a call did besides its result: to its inputs, to files outside its folder, by their code."""

import os
from pathlib import Path
from typing import NamedTuple

from tests.fuzz.pickles import CANARY
from tests.fuzz.tasks import Task

SOMEBODYS = "a folder of somebody's"
"""The mutation after which that folder must still be there."""

_WRITTEN = ("run/report.json", "run/report.html", "plain.json")
"""What commands write among their inputs, besides their results."""


class State(NamedTuple):
    """Files before a call."""

    inside: dict[str, tuple[int, ...]]  # stamps of the case's own
    outside: dict[str, bytes]  # contents of those next to it


class Changes(NamedTuple):
    """What is otherwise after it."""

    canary: bool  # code of a file ran
    outside: bool  # files outside the folder changed
    left: list[str]  # half-written files
    written: list[str]  # inputs that changed
    somebody: bool  # a folder of somebody else's was replaced


def write_outside(folder: Path) -> None:
    """Files of somebody else, next to the case's folder."""
    folder.mkdir()
    (folder / "victim.json").write_text('{"victim": true}\n')
    (folder / "config.json").write_text("{}\n")


def take(folder: Path) -> State:
    """The state of `folder`/case and `folder`/outside."""
    return State(_stamps(folder / "case"), _contents(folder / "outside"))


def compare(before: State, folder: Path, task: Task, path: Path, mutation: str) -> Changes:
    """What changed; `path` is the mutated file.

    If the mutated file is a link, new files elsewhere are what the command was told to write.
    """
    now = take(folder)
    outside = now.outside
    if path.is_symlink():
        outside = {name: data for name, data in outside.items() if name in before.outside}
    new = now.inside.keys() - before.inside.keys()
    own = (*task.writes, *_WRITTEN)
    written = []
    for name, stamp in before.inside.items():
        if now.inside.get(name) != stamp and not name.startswith(own):
            written.append(name)
    return Changes(
        canary=any(name.rpartition("/")[2] == CANARY for name in new),
        outside=outside != before.outside,
        left=sorted(name for name in new if name.endswith((".tmp", ".old"))),
        written=written,
        somebody=mutation == SOMEBODYS and not (path / "victim.json").is_file(),
    )


def _contents(folder: Path) -> dict[str, bytes]:
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        found[name] = path.read_bytes() if path.is_file() else b"folder"
    return found


def _stamps(folder: Path) -> dict[str, tuple[int, ...]]:
    """Of every file its number, size and time; of a folder its number."""
    found = {}
    for root, folders, files in os.walk(folder):
        for name in files + folders:
            path = os.path.join(root, name)
            stat = os.lstat(path)
            size = () if name in folders else (stat.st_size, stat.st_mtime_ns)
            found[os.path.relpath(path, folder)] = (stat.st_ino, *size)
    return found

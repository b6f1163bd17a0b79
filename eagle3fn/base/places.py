"""Places of outputs, checked before work: what is there and is no older output is not replaced."""

import os
import stat
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from eagle3fn.base.errors import UserError, printable
from eagle3fn.base.temporary import clear

Foreign = Callable[[Path], str | None]
"""The name of something in a folder that is of no older output; None: a new one may replace it."""

_LONGEST_NAME = 235  # bytes: the name of what is not finished has 20 more, and 255 are allowed


def check_out_file(path: str | Path) -> None:
    """Refuse a place that no file can be written to. Called before any work.

    Raises:
        UserError: a folder, device, pipe or socket, or a link; inside of a file; not writable.
    """
    found = _check_place(Path(path))
    if found is not None and not stat.S_ISREG(found.st_mode):
        raise UserError(f"{path}: is a {kind_of(found)}; name a file that is none, or a new one")


def check_out_folder(path: str | Path, foreign: Foreign | None = None) -> None:
    """Refuse a place that no folder can be written to. Called before any work.

    A link to a folder is followed. A folder that a killed call had moved away is put back.

    Args:
        path: the place.
        foreign: of a folder that is written as a whole: what is in the one that is there and may
            not be replaced. None: files are written into the folder.

    Raises:
        UserError: a file, device, pipe or socket, or a link to one; inside of a file; not writable;
            a folder that holds something else.
    """
    real = Path(os.path.realpath(path))
    clear(real)
    found = _check_place(real)
    if found is None:
        return
    if not stat.S_ISDIR(found.st_mode):
        raise UserError(f"{path}: is a {kind_of(found)}; name a folder")
    name = foreign(real) if foreign else None
    if name is not None:
        raise UserError(
            f"{path}: holds {printable(name)}, and only what eagle3fn wrote is replaced; "
            "name a new folder, or remove this one"
        )


def check_apart(
    outputs: Mapping[str, str | Path],
    inputs: Mapping[str, str | Path],
    target: str | Path | None = None,
) -> None:
    """Refuse outputs that are inputs, or each other, or lie in the target's folder.

    Args:
        outputs: by option, what is written.
        inputs: by option, what is read, but the target.
        target: its folder, GGUF file or id.

    Raises:
        UserError: names the two options.
    """
    read = dict(inputs) if target is None else {**inputs, "--target": target}
    written = list(outputs.items())
    for place, (option, path) in enumerate(written):
        for other, there in [*read.items(), *written[:place]]:
            if _is_same(path, there):
                raise UserError(
                    f"{option} {path}: is {other} too, and would replace it; name another"
                )
        if target is not None and os.path.isdir(target) and _is_in(path, target):
            raise UserError(
                f"{option} {path}: lies in the target's folder, which is only read; name another "
                "place"
            )


def check_keeps(output: tuple[str, str | Path], given: tuple[str, str | Path]) -> None:
    """Refuse an output folder that is an input, or that an input lies in.

    Args:
        output: the option, and the folder that is written.
        given: the option or setting, and what is read.

    Raises:
        UserError: names both.
    """
    option, folder = output
    setting, path = given
    if _is_same(folder, path) or _is_in(path, folder):
        raise UserError(
            f"{option} {folder}: {setting} = {printable(path)} lies there, and what is written "
            "would replace it; name another"
        )


def _is_same(path: str | Path, other: str | Path) -> bool:
    """Whether two paths are of one file or folder, by a link too."""
    if os.path.realpath(path) == os.path.realpath(other):
        return True
    return os.path.exists(path) and os.path.exists(other) and os.path.samefile(path, other)


def _is_in(path: str | Path, folder: str | Path) -> bool:
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def check_own_folder(path: str | Path) -> None:
    """Refuse what is in the place of a folder that a run writes within its own, a link too.

    Raises:
        UserError: it is there, and no folder.
    """
    path = Path(path)
    if os.path.lexists(path) and not stat.S_ISDIR(path.lstat().st_mode):
        raise UserError(f"{path}: is a {kind_of(path.lstat())}, not a folder; remove it")


def check_own_file(path: str | Path) -> None:
    """Refuse what is in the place of a file that a run writes in its folder, a link too.

    Raises:
        UserError: it is there, and no regular file.
    """
    path = Path(path)
    if os.path.lexists(path) and not stat.S_ISREG(path.lstat().st_mode):
        raise UserError(f"{path}: is a {kind_of(path.lstat())}, not a file; remove it")


def anything(folder: Path) -> str | None:
    """A `Foreign` for outputs that replace no older one: only an empty folder is replaced."""
    return min(os.listdir(folder), default=None)


def other_than(folder: Path, names: Collection[str]) -> str | None:
    """The name of something in a folder that is no regular file of these names, if there is one."""
    with os.scandir(folder) as entries:
        found = [
            entry.name
            for entry in entries
            if entry.name not in names or not entry.is_file(follow_symlinks=False)
        ]
    return min(found, default=None)


def _check_place(path: Path) -> os.stat_result | None:
    """What is at a path, not followed, once it is sure that something can be written there."""
    if len(os.fsencode(path.name)) > _LONGEST_NAME:
        raise UserError(f"{path}: its name is longer than {_LONGEST_NAME} bytes; name a shorter")
    try:
        found = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        found = None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; name another place") from None

    # The folder that it is in, or the first above that is there.
    above = path.absolute().parent
    while not os.path.exists(above) and above != above.parent:
        above = above.parent
    if not os.path.isdir(above):
        raise UserError(f"{path}: {above} is no folder; name another place")
    if not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"{path}: {above} is not writable; make it so, or name another place")
    return found


def kind_of(found: os.stat_result) -> str:
    """What something is that is no regular file, in words."""
    kinds = {
        stat.S_ISDIR: "folder",
        stat.S_ISLNK: "link",
        stat.S_ISFIFO: "pipe",
        stat.S_ISSOCK: "socket",
        stat.S_ISCHR: "device",
        stat.S_ISBLK: "device",
    }
    return next((name for test, name in kinds.items() if test(found.st_mode)), "file")

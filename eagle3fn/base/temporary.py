"""What is not finished yet lies in a locked folder next to its place; a later call clears it away.

A file or folder `NAME` is made in `.NAME.RANDOM.tmp/`, and what it replaces waits in
`.NAME.RANDOM.old/`. Such a folder is locked for as long as its process lives: one that can be
locked, and holds nothing but `NAME`, was left by a kill.
"""

import errno
import fcntl
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from eagle3fn.base.errors import UserError

UNFINISHED = ".tmp"
REPLACED = ".old"
_RANDOM = r"[a-z0-9_]{8}"  # as tempfile names folders
_NOT_WRITTEN_BY_TORCH = ("PytorchStreamWriter", "inline_container", "iostream error")

_REMEDIES = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room, the quota is used up",
    errno.EFBIG: "files of this size are not allowed: raise the limit (ulimit -f)",
    errno.EACCES: "make the folder writable, or name another",
    errno.EPERM: "make the folder writable, or name another",
    errno.EROFS: "the disk is read-only: name a folder on another",
    errno.EIO: "the disk has a fault: name a folder on another",
}


@contextmanager
def side_folder(path: Path, ending: str) -> Iterator[Path]:
    """A locked folder `.NAME.RANDOM` + `ending` next to `path`; removed when the block ends.

    Only what is named as `path` is to be made in it: of a folder that a kill leaves, anything else
    is somebody else's.
    """
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=ending, dir=path.parent))
        handle = _lock(folder)
        if handle is not None:
            break  # else another process took it for one that a kill left, and removes it

    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def clear(path: Path) -> None:
    """Remove what killed calls left next to `path`.

    Where such a call had moved the old folder away and not yet put the new one in its place, the
    old one is put back.
    """
    _clear(path.parent, re.escape(path.name))


def clear_in(folder: Path) -> None:
    """`clear` for every name in a folder."""
    _clear(folder, ".+")


def _clear(folder: Path, name: str) -> None:
    """Clear away the side folders of the names that a pattern matches.

    One with anything else in it is somebody else's, and stays.
    """
    found = []
    with suppress(OSError):
        found = os.listdir(folder)

    pattern = re.compile(rf"\.({name})\.{_RANDOM}({UNFINISHED}|{REPLACED})")
    for side in found:
        matched = pattern.fullmatch(side)
        handle = _lock(folder / side) if matched else None
        if matched is None or handle is None:
            continue
        try:
            # What cannot be cleared, as on a disk that is now read-only, stays for a later call.
            with suppress(OSError):
                if {*os.listdir(folder / side)} <= {matched[1]}:
                    _clear_one(folder / side, folder / matched[1])
        finally:
            os.close(handle)


def _clear_one(left: Path, path: Path) -> None:
    """Remove a side folder; what it had moved away is put back where nothing took its place."""
    moved = left / path.name
    if left.name.endswith(REPLACED) and os.path.lexists(moved) and not os.path.lexists(path):
        os.replace(moved, path)
    shutil.rmtree(left, ignore_errors=True)


def _lock(folder: Path) -> int | None:
    """A handle that holds a folder's lock; None if another has it, or the folder is gone."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    # Another process's lock, or a folder that is gone by now, is no error: it is not ours to clear.
    is_ours = False
    with suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_ours = os.path.samestat(os.fstat(handle), os.lstat(folder))
    if is_ours:
        return handle
    os.close(handle)
    return None


def usual_mode(path: Path) -> None:
    """Give a file or folder the permissions of one made plainly, by the process's umask."""
    # The umask can be read only by setting it; what another thread makes meanwhile is private.
    umask = os.umask(0o077)
    os.umask(umask)

    found = path.lstat().st_mode
    plain = 0o777 if stat.S_ISDIR(found) else 0o666
    inherited = found & stat.S_ISGID if stat.S_ISDIR(found) else 0
    path.chmod(plain & ~umask | inherited)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Raise a failure to write `path`, or what lies next to it, as a UserError that names it.

    Failures of other files, and of what is not a disk, are raised as they are.
    """
    try:
        yield
    except OSError as error:
        if not _is_of(path, error):
            raise
        raise not_written(path, error) from None
    except SafetensorError as error:
        if not str(error).startswith("Error while serializing"):
            raise
        number = re.search(r"\(os error (\d+)\)", str(error))
        code = int(number[1]) if number else errno.EIO
        raise not_written(path, OSError(code, os.strerror(code))) from None
    except RuntimeError as error:
        if not any(name in str(error) for name in _NOT_WRITTEN_BY_TORCH):
            raise
        raise UserError(
            f"{path}: not written (torch could not write all of it); make room, then call again"
        ) from None


@contextmanager
def naming_temporary(path: Path | None = None) -> Iterator[None]:
    """As `naming`, of a write into the system's folder of temporary files, which `TMPDIR` names.

    Without `path` the folder itself is named.
    """
    try:
        with naming(path or Path(tempfile.gettempdir())):
            yield
    except UserError as error:
        raise UserError(
            f"{error}; or let TMPDIR name a folder on another disk, for temporary files"
        ) from None


def _is_of(path: Path, error: OSError) -> bool:
    """Whether an error is of `path`, of a folder that it is in, or of what is not finished of it.

    An error without a name is, if disks have such.
    """
    if error.filename is None:
        return error.errno in _REMEDIES
    named = Path(os.fsdecode(error.filename)).absolute()
    unfinished = any(part.startswith(f".{path.name}.") for part in named.parts)
    return unfinished or path.absolute().is_relative_to(named)


def not_written(path: Path, error: OSError) -> UserError:
    """The failure of a write to `path`, with its remedy."""
    remedy = _REMEDIES.get(error.errno or 0, "check the path")
    reason = error.strerror or str(error)
    return UserError(f"{path}: not written ({reason}); {remedy}, then call again")

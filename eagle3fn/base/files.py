"""Files and folders written whole or not at all, rows appended, folders held by one process.

Every file that the package writes goes through `whole_file` or `whole_folder`, or one of the
`write_…` functions on them: a reader sees the old content or the new, never a part. Rows of a log
are appended by `append_line`.
"""

import gzip
import hashlib
import json
import lzma
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from eagle3fn.base.errors import UserError
from eagle3fn.base.places import Foreign, anything, check_out_file, check_out_folder, kind_of
from eagle3fn.base.read import open_regular
from eagle3fn.base.temporary import (
    REPLACED,
    UNFINISHED,
    clear,
    clear_in,
    naming,
    not_written,
    side_folder,
    usual_mode,
)

LOCK = ".lock"
"""The file in a folder by which one process holds it."""
_LOCK_TRIES = 100  # each but the last is in vain because another process removed the folder

OPENERS: dict[str, Callable[..., IO[str]]] = {".gz": gzip.open, ".xz": lzma.open}


# Written whole or not at all


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path of the same name; on success it replaces `path` in one rename.

    Raises:
        UserError: `path` is no place for a file (`check_out_file`), or could not be written.
    """
    path = Path(path)
    check_out_file(path)
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        clear(path)
        with side_folder(path, UNFINISHED) as side:
            temporary = side / path.name
            temporary.touch()
            yield temporary

            # The content must be on the disk before the name is, and the name before this returns.
            usual_mode(temporary)
            fsync_path(temporary)
            check_out_file(path)
            os.replace(temporary, path)
            fsync_path(path.parent)


@contextmanager
def whole_folder(path: str | Path, foreign: Foreign = anything) -> Iterator[Path]:
    """Yield a temporary folder; on success it takes the name `path`.

    A folder of that name is replaced unless there is something `foreign` in it; of a link, the
    folder that it names.

    Raises:
        UserError: `path` is no place for a folder (`check_out_folder`), or could not be written.
    """
    path = Path(os.path.realpath(path))
    check_out_folder(path, foreign)
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with side_folder(path, UNFINISHED) as side:
            temporary = side / path.name
            temporary.mkdir()
            yield temporary
            check_out_folder(path, foreign)
            publish_folder(temporary, path)


def publish_folder(temporary: Path, path: Path) -> None:
    """Flush a folder and its files to the disk, and rename it to `path`.

    A folder of that name is replaced. Modes are those of files and folders made plainly.
    """
    for file in reversed([temporary, *temporary.rglob("*")]):
        usual_mode(file)
        fsync_path(file)

    if os.path.lexists(path):
        if not stat.S_ISDIR(path.lstat().st_mode):
            raise UserError(f"{path}: is a {kind_of(path.lstat())}; name a folder")
        # A rename does not replace a folder that holds files: move it away, then delete it.
        with side_folder(path, REPLACED) as side:
            os.replace(path, side / path.name)
            try:
                os.replace(temporary, path)
            except OSError:
                os.replace(side / path.name, path)
                raise
    else:
        os.replace(temporary, path)
    fsync_path(path.parent)


def fsync_path(path: Path) -> None:
    """Flush a file's or folder's metadata and data to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: str | Path, text: str) -> None:
    """Write a text in UTF-8, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_jsonl(path: str | Path, rows: Iterable[Any]) -> None:
    """Write one JSON value a line, compressed by the name's ending, whole or not at all."""
    opener = OPENERS.get(Path(path).suffix, open)
    with whole_file(path) as temporary, opener(temporary, "wt", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def append_line(path: str | Path, text: str) -> None:
    """Append a line in UTF-8, all of it or nothing. The file is made if it is not there.

    Raises:
        UserError: `path` is a link, or no regular file; or the line could not be written.
    """
    path = Path(path)
    line = memoryview((text + "\n").encode())
    with naming(path):
        handle = _open_own(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        size = os.fstat(handle).st_size
        try:
            while line:
                line = line[os.write(handle, line) :]
        except OSError as error:
            os.ftruncate(handle, size)
            raise not_written(path, error) from None
    finally:
        os.close(handle)


def _open_own(path: Path, flags: int) -> int:
    """Open a regular file of a run; a link is not followed.

    Raises:
        FileNotFoundError: its folder is not there, or without `O_CREAT` the file.
        UserError: no regular file, or not to be opened.
    """
    # Without waiting for the reader of a pipe.
    flags |= os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        handle = os.open(path, flags, 0o666)
    except FileNotFoundError:
        raise
    except OSError as error:
        if not os.path.lexists(path) or stat.S_ISREG(path.lstat().st_mode):
            raise not_written(path, error) from None
        handle = None
    if handle is None or not stat.S_ISREG(os.fstat(handle).st_mode):
        if handle is not None:
            os.close(handle)
        raise UserError(f"{path}: is a {kind_of(path.lstat())}, not a file; remove it")
    return handle


# Digests and locks


def sha256(path: str | Path) -> str:
    """Hex digest of a file's bytes.

    Raises:
        UserError: missing, or no regular file.
    """
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_sha256(value: Any, default: Callable[[Any], Any] | None = None) -> str:
    """Hex digest of a JSON value: of its text with sorted keys.

    `default` gives a JSON value for what has none.
    """
    text = json.dumps(value, sort_keys=True, default=default)
    return hashlib.sha256(text.encode()).hexdigest()


@contextmanager
def locked(folder: str | Path, shared: bool = False) -> Iterator[bool]:
    """Hold `folder` (made if need be) for this process, until the block or the process ends.

    A link to a folder is followed. What killed calls left in the folder is removed. Yields whether
    this call made the folder. With `shared`, other processes may join by `locked_too`.

    Raises:
        UserError: another process holds it, it cannot be made, or its file `.lock` is no regular
            file.
    """
    folder = Path(folder)
    check_out_folder(folder)
    if folder.is_symlink():
        folder = Path(os.path.realpath(folder))
    with naming(folder):
        handle, is_new = _lock_folder(folder)
    try:
        clear_in(folder)
        if shared:
            _flock(handle, folder, shared)
        yield is_new
    finally:
        os.close(handle)


@contextmanager
def locked_too(folder: str | Path) -> Iterator[None]:
    """Hold a folder that another process of the same program holds, shared, as long as either.

    Raises:
        UserError: it is not held so, or not seen here.
    """
    folder = Path(os.path.realpath(folder))
    try:
        handle = _open_own(folder / LOCK, os.O_RDWR)
    except FileNotFoundError:
        raise UserError(
            f"{folder}: rank 0's folder is not seen here; name one that all machines share"
        ) from None
    try:
        _flock(handle, folder, shared=True)
        yield
    finally:
        os.close(handle)


@contextmanager
def locked_as_is(folder: str | Path) -> Iterator[None]:
    """Hold `folder` as `locked` does, if one held it before; neither folder nor file is made.

    Raises:
        UserError: another process holds it, or its file `.lock` is no regular file.
    """
    path = Path(folder)
    handle = None
    with suppress(FileNotFoundError, NotADirectoryError):
        handle = _open_own(path / LOCK, os.O_RDWR)
    if handle is None:
        yield
        return
    try:
        _flock(handle, path)
        yield
    finally:
        os.close(handle)


def _lock_folder(folder: Path) -> tuple[int, bool]:
    """A handle that holds a folder's lock, and whether the folder was made here.

    Another process may remove the folder that it held at any time before the lock is ours: the file
    that was locked must be the one that is there.
    """
    path = folder / LOCK
    for _ in range(_LOCK_TRIES):
        is_new = _make_folder(folder)
        try:
            handle = _open_own(path, os.O_RDWR | os.O_CREAT)
        except FileNotFoundError:
            continue

        try:
            _flock(handle, folder)
        except UserError:
            os.close(handle)
            raise
        if _is_at(handle, path):
            return handle, is_new
        os.close(handle)
    raise _held_by_another(folder)


def _is_at(handle: int, path: Path) -> bool:
    """Whether an open file is the one at a path."""
    try:
        return os.path.samestat(os.fstat(handle), os.lstat(path))
    except FileNotFoundError:  # removed meanwhile
        return False


def _make_folder(folder: Path) -> bool:
    """Make a folder unless there is one; whether it was made.

    Raises:
        UserError: none can be made there, as in `/proc`.
    """
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        return False
    except FileNotFoundError as error:
        raise UserError(
            f"{folder}: no folder can be made there ({error.strerror}); name another place"
        ) from None
    return True


def _flock(handle: int, folder: Path, shared: bool = False) -> None:
    import fcntl

    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _held_by_another(folder) from None
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be locked ({error.strerror}); name a folder on another disk"
        ) from None


def _held_by_another(folder: Path) -> UserError:
    return UserError(f"{folder}: another process is at work there; wait, or name another folder")

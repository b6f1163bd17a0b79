"""Files written whole or not at all, and readers that name the line they cannot read.

Every file that the package writes goes through `whole_file` or `whole_folder`, or one of the
`write_…` functions on them: a reader sees the old content or the new, never a part.
"""

import gzip
import hashlib
import json
import lzma
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from eagle3fn.base.errors import UserError

_OPENERS: dict[str, Callable[..., IO[str]]] = {".gz": gzip.open, ".xz": lzma.open}


# Written whole or not at all


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder; on success it replaces `path` in one rename."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)

    try:
        yield temporary

        # mkstemp gives mode 0600; the file gets the mode that a plain `open` would give it. The
        # process's umask can be read only by setting it.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)

        # The content must be on the disk before the name is, and the name before this returns.
        fsync_path(temporary)
        os.replace(temporary, path)
        fsync_path(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder next to `path`; on success it takes the name `path`.

    A folder of that name is replaced; of a link, the folder that it names.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))

    try:
        yield temporary
        publish_folder(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def publish_folder(temporary: Path, path: Path) -> None:
    """Flush a folder and its files to the disk, and rename it to `path`.

    A folder of that name is replaced. Modes are set to 0755 for folders and 0644 for files.
    """
    temporary.chmod(0o755)
    for file in temporary.rglob("*"):
        file.chmod(0o755 if file.is_dir() else 0o644)
        fsync_path(file)
    fsync_path(temporary)

    if path.exists():
        # A rename does not replace a folder that holds files: move it away, then delete it.
        old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
        os.replace(path, old)
        os.replace(temporary, path)
        shutil.rmtree(old)
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
    opener = _opener(path)
    with whole_file(path) as temporary, opener(temporary, "wt", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


# Read


def open_text(path: str | Path) -> IO[str]:
    """Open plain, `.gz` or `.xz` text for reading, chosen by the name's ending."""
    return _opener(path)(path, "rt", encoding="utf-8")


def _opener(path: str | Path) -> Callable[..., IO[str]]:
    return _OPENERS.get(Path(path).suffix, open)


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: the file is missing, or is not a file of JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}); write it anew") from None


def read_jsonl(path: str | Path) -> list[Any]:
    """Read one JSON value a line (plain, `.gz`, `.xz`); empty lines are skipped.

    Raises:
        UserError: the file is missing or damaged, or a line is not JSON; the message names the
            line.
    """
    rows = []
    try:
        with open_text(path) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    rows.append(_parse_line(path, number, line))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; name a JSONL file (plain, .gz or .xz)") from None
    except (OSError, EOFError, lzma.LZMAError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: damaged or not text ({error}); write it anew") from None
    return rows


def _parse_line(path: str | Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}:{number}: not JSON ({error.msg}, column {error.colno}); "
            "mend or delete the line"
        ) from None
    except (ValueError, RecursionError) as error:
        # Numbers of too many digits, and values nested too deeply.
        raise UserError(
            f"{path}:{number}: not usable JSON ({error}); mend or delete the line"
        ) from None


# Digests and locks


def sha256(path: str | Path) -> str:
    """Hex digest of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_sha256(value: Any, default: Callable[[Any], Any] | None = None) -> str:
    """Hex digest of a JSON value: of its text with sorted keys.

    `default` gives a JSON value for what has none.
    """
    text = json.dumps(value, sort_keys=True, default=default)
    return hashlib.sha256(text.encode()).hexdigest()


@contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Hold `folder` (made if need be) for this process, until the block or the process ends.

    Raises:
        UserError: another process holds it.
    """
    import fcntl

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{folder}: another process is at work there; wait, or name another folder"
            ) from None
        yield

"""Files that appear whole or not at all, and readers that name the line they cannot read."""

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


def fsync_path(path: Path) -> None:
    """Flush a file's or folder's metadata and data to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        fsync_path(temporary)
        os.replace(temporary, path)
        fsync_path(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success it takes `path`'s name, replacing a folder there."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        yield temporary
        publish_folder(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def publish_folder(temporary: Path, path: Path) -> None:
    """Flush a folder with all it holds to the disk, and rename it to `path`, replacing a folder there."""
    temporary.chmod(0o755)
    for file in temporary.rglob("*"):
        file.chmod(0o755 if file.is_dir() else 0o644)
        fsync_path(file)
    fsync_path(temporary)
    if path.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
        os.replace(path, old)
        os.replace(temporary, path)
        shutil.rmtree(old)
    else:
        os.replace(temporary, path)
    fsync_path(path.parent)


@contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Hold `folder` (made if need be) for this process; the lock goes with the process, however it ends.

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


def open_text(path: str | Path, mode: str = "rt") -> IO[str]:
    """Open plain, `.gz` or `.xz` text, chosen by the name's ending."""
    return _OPENERS.get(Path(path).suffix, open)(path, mode, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: the file is missing or is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}); write it anew") from None


def write_jsonl(path: str | Path, rows: Iterable[Any]) -> None:
    """Write one JSON value a line, compressed by the name's ending, whole or not at all."""
    suffix = Path(path).suffix
    with (
        whole_file(path) as temporary,
        _OPENERS.get(suffix, open)(temporary, "wt", encoding="utf-8") as file,
    ):
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_jsonl(path: str | Path) -> list[Any]:
    """Read one JSON value a line (plain, `.gz`, `.xz`); empty lines are skipped.

    Raises:
        UserError: the file is missing or damaged, or a line is not JSON; the message names the line.
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
        message = f"{path}:{number}: not JSON ({error.msg}, column {error.colno}); mend or delete the line"
        raise UserError(message) from None
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path}:{number}: not usable JSON ({error}); mend or delete the line"
        ) from None


def sha256(path: str | Path) -> str:
    """Hex digest of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

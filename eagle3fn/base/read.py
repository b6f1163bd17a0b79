"""Readers of JSON that say in one line which file, and which line of it, they cannot read.

Only regular files are read: opening a pipe or a device could wait for ever. Refused are values
nested deeply, numbers beyond what a float holds, NaN and infinity, keys that are there twice, and
half surrogate pairs: JSON's grammar allows some of them, but no file needs one.
"""

import gzip
import json
import lzma
import math
import os
import re
import stat
import zlib
from collections.abc import Callable, Iterator
from io import BufferedReader
from pathlib import Path
from typing import IO, Any, NamedTuple

from eagle3fn.base.errors import UserError, printable
from eagle3fn.base.places import kind_of

LIMIT = 2**30  # bytes of a file, and of a line
CONFIG_LIMIT = 2**24  # bytes of a configuration
UNFINISHED = ", in a line without an end"  # of a reason: of a last row that may yet be written
DEEPEST = 64  # boxes within boxes
_DIGITS = 300  # of a whole number: a float holds those of 308
_UNPACKERS: dict[str, Callable[..., IO[bytes]]] = {".gz": gzip.open, ".xz": lzma.open}  # pyright: ignore
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
DAMAGED = (OSError, EOFError, lzma.LZMAError, zlib.error)
"""What reading a damaged file raises, a compressed one too."""


class Rows(NamedTuple):
    """The rows of a file of which some may be damaged."""

    good: list[Any]
    bad: list[tuple[int, str]]  # line number, counted from 1, and reason


# Texts


def parse_json(text: str | bytes, nan: bool = False) -> Any:
    """The value of a JSON text.

    Args:
        text: in UTF-8, if it is bytes.
        nan: whether NaN and infinity are values; some models' configurations have them.

    Raises:
        ValueError: it is none, or one that is refused; the message gives the reason, on one line.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        value = json.loads(
            text,
            parse_int=_whole,
            parse_float=float if nan else _finite,
            parse_constant=float if nan else _no_number,
            object_pairs_hook=_object,
        )
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8, byte {error.start + 1}") from None
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        if error.lineno == 1:
            place = f"column {error.colno}"
        raise ValueError(f"{error.msg}, {place}") from None
    except RecursionError:
        raise ValueError(f"nested more than {DEEPEST} deep") from None

    check_depth(value)
    if _SURROGATE.search(text):
        _check_surrogates(value)
    return value


def _whole(text: str) -> int:
    if len(text) > _DIGITS:
        raise ValueError(f"a whole number of {len(text)} digits")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{printable(text, 20)}: too large for a number")
    return value


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number of JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        for key, value in pairs:
            if found[key] != value:
                raise ValueError(f"the key {printable(repr(key), 40)} is there twice")
    return found


def check_depth(value: Any) -> None:
    """Raise a ValueError if dicts and lists lie within each other more than `DEEPEST` deep."""
    boxes = [[value]]
    for _ in range(DEEPEST + 1):
        inner = []
        for box in boxes:
            items = box.values() if isinstance(box, dict) else box
            inner += [item for item in items if isinstance(item, (dict, list))]
        boxes = inner
        if not boxes:
            return
    raise ValueError(f"nested more than {DEEPEST} deep")


def _check_surrogates(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair, which is no character") from None


# Files


def open_regular(path: str | Path) -> BufferedReader:
    """Open a file for reading, unless it is a folder, pipe, socket or device.

    Raises:
        UserError: it is missing, not readable, or no regular file.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:  # a name that is too long, or holds a zero byte
        raise UserError(f"{path}: not readable ({error})") from None
    found = os.fstat(handle)
    if not stat.S_ISREG(found.st_mode):
        os.close(handle)
        raise UserError(f"{path}: is a {kind_of(found)}; name a regular file")
    return os.fdopen(handle, "rb")


def check_regular(path: str | Path) -> None:
    """Refuse what is there and is no regular file, before a library opens it and waits.

    What is missing is left to that library.

    Raises:
        UserError: a folder, pipe, socket, device, or a link that leads nowhere; not readable.
    """
    if os.path.lexists(path):
        open_regular(path).close()


def read_text(path: str | Path, limit: int = CONFIG_LIMIT) -> str:
    """The text of a file in UTF-8.

    Raises:
        UserError: missing, no regular file, larger than `limit` bytes, or not UTF-8.
    """
    try:
        return _read_bytes(path, limit).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8, byte {error.start + 1}; write it anew") from None


def _read_bytes(path: str | Path, limit: int) -> bytes:
    with open_regular(path) as file:
        try:
            data = file.read(limit + 1)
        except OSError as error:
            raise UserError(f"{path}: not readable ({error.strerror})") from None
    if len(data) > limit:
        raise UserError(f"{path}: larger than {limit} bytes, which no such file is; mend it")
    return data


def read_json(path: str | Path, limit: int = LIMIT, nan: bool = False) -> Any:
    """Read a JSON file of at most `limit` bytes; `nan`: as in `parse_json`.

    Raises:
        UserError: the file is missing, or is not a file of JSON; one line names it.
    """
    data = _read_bytes(path, limit)
    try:
        return parse_json(data, nan)
    except ValueError as error:
        several = str(error).startswith("Extra data")
        hint = "; it must be one value, not JSONL's one a line" if several else ""
        raise UserError(f"{path}: not readable as JSON ({error}){hint}; write it anew") from None


def read_object(path: str | Path, limit: int = LIMIT, nan: bool = False) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        UserError: as `read_json`; or it holds something else.
    """
    found = read_json(path, limit, nan)
    if not isinstance(found, dict):
        raise UserError(
            f"{path}: holds a {type(found).__name__}, it must be a JSON object; write it anew"
        )
    return found


def read_jsonl(path: str | Path) -> list[Any]:
    """Read one JSON value a line (plain, `.gz`, `.xz`); empty lines are skipped.

    Raises:
        UserError: the file is missing or damaged, or a line is not JSON; the message names the
            line.
    """
    rows = read_rows(path)
    for number, reason in rows.bad:
        raise UserError(f"{path}:{number}: {reason}; mend or delete the line")
    return rows.good


def read_rows(path: str | Path, check: Callable[[Any], str | None] = lambda row: None) -> Rows:
    """Read one JSON value a line; lines that are damaged are left out, and said.

    Args:
        path: plain, `.gz` or `.xz`; empty lines are skipped.
        check: why a value is no row, None if it is one.

    Raises:
        UserError: the file is missing, no regular file, or cannot be unpacked.
    """
    rows = Rows([], [])
    for number, line in _lines(path):
        try:
            value = parse_json(line)
        except ValueError as error:
            cut = "" if line.endswith(b"\n") else UNFINISHED
            rows.bad.append((number, f"not JSON ({error}){cut}"))
            continue
        reason = check(value)
        if reason is None:
            rows.good.append(value)
        else:
            rows.bad.append((number, reason))
    return rows


def _lines(path: str | Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file that are not empty, with their numbers, counted from 1."""
    number = 0
    with open_regular(path) as packed:
        unpack = _UNPACKERS.get(Path(path).suffix)
        try:
            file = unpack(packed) if unpack else packed
            while line := file.readline(LIMIT):
                number += 1
                if len(line) == LIMIT:
                    raise UserError(
                        f"{path}:{number}: longer than {LIMIT} bytes, which no row is; mend it"
                    )
                if line.strip():
                    yield number, line
        except DAMAGED as error:
            raise UserError(
                f"{path}: damaged after line {number} ({error}); write it anew"
            ) from None

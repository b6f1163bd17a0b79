"""What a file holds, found from its first bytes, and its bytes, unpacked."""

import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Literal, NamedTuple

from eagle3fn.base.errors import UserError

Kind = Literal["empty", "lines", "array", "parquet", "arrow stream", "arrow file"]

DAMAGED = (OSError, EOFError, lzma.LZMAError, zlib.error)
"""What the reading of a damaged compressed file raises."""

BOM = b"\xef\xbb\xbf"
_HEAD = 1 << 16  # bytes that are looked at
_PIECE = (
    1 << 10
)  # bytes of a zst file unpacked at once: to 32 MB at the very most, to some kB mostly
_LONGEST_WINDOW = 1 << 31  # bytes; what `zstd --long=31` writes


# Compressed files


def open_unpacked(path: Path) -> IO[bytes]:
    """The bytes of a plain, gz, xz or zst file, distinguished by its first bytes.

    Raises:
        UserError: zst, and the package that reads it is missing.
    """
    with path.open("rb") as file:
        head = file.read(8)
    for magic, opener in _OPENERS.items():
        if head.startswith(magic):
            return opener(path)
    return path.open("rb")


def _open_gz(path: Path) -> IO[bytes]:
    return gzip.open(path)  # pyright: ignore[reportReturnType]


def _open_xz(path: Path) -> IO[bytes]:
    return lzma.open(path)


def _open_zst(path: Path) -> IO[bytes]:
    try:
        import zstandard  # noqa: F401
    except ImportError:
        raise UserError(missing_extra(path, "a zst file", "zstandard")) from None
    return io.BufferedReader(_Unzst(path))


_OPENERS: dict[bytes, Callable[[Path], IO[bytes]]] = {
    b"\x1f\x8b": _open_gz,
    b"\xfd7zXZ\x00": _open_xz,
    b"\x28\xb5\x2f\xfd": _open_zst,
}


class _Unzst(io.RawIOBase):
    """A zst file's bytes, frame after frame. A file that is cut off raises EOFError."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("rb")
        self.frame = None
        self.unpacked = memoryview(b"")

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self.file.close()
        super().close()

    def readinto(self, buffer) -> int:
        while not self.unpacked:
            packed = self.file.read(_PIECE)
            if not packed:
                if self.frame is not None:
                    raise EOFError("the file ends before its last frame does")
                return 0
            self.unpacked = memoryview(self._unpack(packed))
        size = min(len(buffer), len(self.unpacked))
        buffer[:size] = self.unpacked[:size]
        self.unpacked = self.unpacked[size:]
        return size

    def _unpack(self, packed: bytes) -> bytes:
        import zstandard

        parts = []
        while packed:
            if self.frame is None:
                unpacker = zstandard.ZstdDecompressor(max_window_size=_LONGEST_WINDOW)
                self.frame = unpacker.decompressobj()
            try:
                parts.append(self.frame.decompress(packed))
            except zstandard.ZstdError as error:
                raise OSError(str(error)) from None
            if not self.frame.eof:
                break
            packed = self.frame.unused_data
            self.frame = None
        return b"".join(parts)


def missing_extra(path: Path, what: str, package: str) -> str:
    """The error where an optional package is needed."""
    return (
        f"{path}: {what} is read by the package {package}, which is not installed; "
        f"pip install {package}"
    )


# Kinds


def kind_of(path: Path) -> Kind:
    """What the rows of a file are written as.

    Raises:
        UserError: a file of another kind, with the remedy for it; or damaged.
    """
    try:
        with path.open("rb") as file:
            packed = file.read(8)
        with open_unpacked(path) as file:
            head = file.read(_HEAD)
    except DAMAGED as error:
        raise UserError(
            f"{path}: damaged or unreadable ({error}); copy or download it again"
        ) from None

    for magic, kind in _TABLES.items():
        if head.startswith(magic):
            if head[:8] != packed:
                raise UserError(f"{path}: a compressed {kind} file; unpack it and name the result")
            return kind
    _refuse_foreign(path, head)
    return _kind_of_text(path, head.removeprefix(BOM))


_TABLES: dict[bytes, Kind] = {
    b"PAR1": "parquet",
    b"ARROW1": "arrow file",
    b"\xff\xff\xff\xff": "arrow stream",
}


class _Foreign(NamedTuple):
    """A file that holds no rows, or whose rows are not read."""

    offset: int  # where the mark stands, in bytes
    mark: bytes
    inside: bytes  # and what is somewhere in the first bytes
    name: str
    remedy: str


_SAVE = "save its rows as parquet or JSONL and name that"
_UNPACK = "unpack it and name the file of rows, or their folder"
_LFS = b"version https://git-lfs"
_FOREIGN = (
    _Foreign(0, _LFS, b"", "a Git LFS pointer, not the file itself", "run git lfs pull"),
    _Foreign(0, b"PK\3\4", b"[Content_Types].xml", "an Office document", _SAVE),
    _Foreign(0, b"PK\3\4", b"data.pkl", "a file of torch.save", _SAVE),
    _Foreign(0, b"PK\3\4", b"", "a zip archive", _UNPACK),
    _Foreign(257, b"ustar", b"", "a tar archive", _UNPACK),
    _Foreign(4, b"1AY&SY", b"", "a bzip2 file", "unpack it with bunzip2 and name the result"),
    _Foreign(8, b'{"', b"\0", "safetensors, which hold tensors", "name a file of conversations"),
)


def _refuse_foreign(path: Path, head: bytes) -> None:
    """Refuse what is surely neither JSON nor a table that is read."""
    for foreign in _FOREIGN:
        if head[foreign.offset :].startswith(foreign.mark) and foreign.inside in head:
            raise UserError(f"{path}: {foreign.name}; {foreign.remedy}")

    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or (b"\0" in head and _is_utf16(head)):
        raise UserError(
            f"{path}: UTF-16 text; write it in UTF-8: iconv -f UTF-16 -t UTF-8 {path} > NEW"
        )
    if b"\0" in head:
        raise UserError(f"{path}: a binary file of an unknown kind; unpack it, or {_SAVE}")
    if head.lstrip()[:1] == b"<":
        raise UserError(f"{path}: a web page or XML; download the file of rows itself, or {_SAVE}")


def _is_utf16(head: bytes) -> bool:
    """Text of mostly Latin letters: every second byte is 0."""
    half = len(head) // 2
    return max(head[0::2].count(0), head[1::2].count(0)) > 0.4 * half


def _kind_of_text(path: Path, head: bytes) -> Kind:
    lines = [line.strip() for line in head.split(b"\n")]
    lines = [line for line in lines if line]
    if not lines:
        return "empty"
    first = lines[0]
    if first.startswith(b"["):
        return "array"
    if any(line.startswith(b"{") for line in lines):
        _refuse_spread(path, first)
        return "lines"
    if first.startswith(b'"') and len(lines) == 1 and len(head) == _HEAD:
        return "lines"
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        raise UserError(_plain_text(path)) from None
    return "lines"


def _refuse_spread(path: Path, first: bytes) -> None:
    """Refuse an object that is written over several lines."""
    if first.startswith(b"{") and first.endswith((b"{", b"[", b",")):
        raise UserError(
            f"{path}: its first line is the beginning of a JSON object that goes on after it; "
            f"write one object a line: jq -c . {path} > NEW.jsonl"
        )


def _plain_text(path: Path) -> str:
    if ".csv" in path.suffixes or ".tsv" in path.suffixes:
        return (
            f"{path}: a table of text (CSV); write it as JSONL: "
            f"pandas.read_csv({str(path)!r}).to_json('NEW.jsonl', orient='records', lines=True)"
        )
    return (
        f"{path}: plain text, not rows of JSON; write one JSON object a line, "
        'such as {"prompt": …} or {"messages": [{"role", "content"}, …]}'
    )

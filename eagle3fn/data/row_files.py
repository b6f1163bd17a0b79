"""The rows of a file or a folder, whatever container they are in, each with where it stands.

Read are JSONL, a JSON array, each also as gz, xz or zst; parquet and Arrow files; a folder of such
files; and a folder that `datasets` saved. What a file holds is found from its bytes.
"""

import glob
import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from eagle3fn.base.errors import UserError
from eagle3fn.base.files import sha256
from eagle3fn.base.read import read_json
from eagle3fn.data.arrow_rows import arrow_rows, parquet_rows
from eagle3fn.data.file_kinds import BOM, DAMAGED, kind_of, open_unpacked
from eagle3fn.data.json_array import BrokenArrayError, array_items

_SHOWN = 6  # names in an error
_MEND = "mend or delete the line"
_ENDINGS = re.compile(r"\.(parquet|arrow|jsonl|ndjson|json)(\.gz|\.xz|\.zst)?$")
_PACKED = re.compile(r"\.(gz|xz|zst)$")
_NOT_ROWS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_HELD_OUT = re.compile(r"(?<![a-z])(test|validation|valid|val|dev|eval)(?![a-z])")


class FileRow(NamedTuple):
    """A row of a file, or the place of one that could not be read."""

    where: str  # "chats.jsonl:7", "chats.json: item 7", "chats.parquet: row 7"
    value: Any  # where it could not be read: its text, or None
    fault: str | None = None  # why not, and the remedy

    @property
    def number(self) -> str:
        """Its line, or its place in its file, counted from 1; in digits."""
        return re.split(r"\D", self.where)[-1]


def read_rows(path: str | Path) -> Iterator[FileRow]:
    """The rows of a file or folder in order, one in memory at a time.

    A row that cannot be read has a fault, and the rows after it are read. Empty lines are skipped.
    Numbers are as Python's `json` reads them, NaN among them. Of parquet and Arrow rows, keys with
    null are left out (`data.arrow_rows.batch_rows` says why). An empty file has no rows.

    Args:
        path: JSONL or a JSON array, plain, gz, xz or zst, in UTF-8 with or without a byte-order
            mark; a parquet or Arrow file; a folder that `datasets` saved; a folder with such
            files, or a pattern such as `rows/train-*.parquet`: they are read in the names' order.

    Raises:
        UserError: at once: no such file, a folder that does not say which rows are meant. While
            reading: a file of another kind; a damaged file; a JSON array with an item that is not
            JSON, as the items after it cannot be found; a package that is not installed.
    """
    files = data_files(path)
    return (row for file in files for row in _rows_of_file(file))


def rows_digest(path: str | Path) -> str:
    """Hex digest of what `read_rows` reads: of a file's bytes, or of all files' names and bytes.

    Raises:
        UserError: no such file, or a folder that does not say which rows are meant.
    """
    files = data_files(path)
    if Path(path).is_file():
        return sha256(path)
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}\0{sha256(file)}\n".encode())
    return digest.hexdigest()


# One file


def _rows_of_file(path: Path) -> Iterator[FileRow]:
    kind = kind_of(path)
    if kind == "lines":
        yield from _line_rows(path)
    elif kind == "array":
        yield from _array_rows(path)
    elif kind == "parquet":
        yield from _numbered(path, "row", parquet_rows(path))
    elif kind in ("arrow stream", "arrow file"):
        yield from _numbered(path, "row", arrow_rows(path, stream=kind == "arrow stream"))


def _numbered(path: Path, name: str, rows: Iterable[tuple[Any, str | None]]) -> Iterator[FileRow]:
    for number, (value, fault) in enumerate(rows, 1):
        yield FileRow(f"{path}: {name} {number}", value, fault)


def _array_rows(path: Path) -> Iterator[FileRow]:
    count = 0
    try:
        with open_unpacked(path) as file:
            for value, fault in array_items(file):
                count += 1
                remedy = "; mend or delete the item"
                yield FileRow(f"{path}: item {count}", value, fault and fault + remedy)
    except BrokenArrayError as error:
        raise UserError(
            f"{path}: broken JSON array: {error}; what follows cannot be read: "
            "mend the file, or write one object a line without [ and ]"
        ) from None
    except DAMAGED as error:
        raise _damaged(path, f"item {count}", error) from None


def _line_rows(path: Path) -> Iterator[FileRow]:
    number = 0
    try:
        with open_unpacked(path) as file:
            for number, line in enumerate(file, 1):
                written = line.removeprefix(BOM).strip()
                if written:
                    value, fault = _parse(written)
                    yield FileRow(f"{path}:{number}", value, fault)
    except DAMAGED as error:
        raise _damaged(path, f"line {number}", error) from None


def _parse(line: bytes) -> tuple[Any, str | None]:
    """The value; or its text and why it is none."""
    text = line.decode("utf-8", "replace")
    try:
        return json.loads(line.decode("utf-8")), None
    except UnicodeDecodeError as error:
        return text, f"not UTF-8 (byte {error.start + 1} of the line); {_MEND}"
    except json.JSONDecodeError as error:
        return text, f"not JSON ({error.msg}, column {error.colno}); {_MEND}"
    except (ValueError, RecursionError) as error:
        # Numbers of too many digits, and values nested too deeply.
        return text, f"not usable JSON ({error}); {_MEND}"


def _damaged(path: Path, after: str, error: BaseException) -> UserError:
    return UserError(f"{path}: damaged after {after} ({error}); copy or download it again")


# Folders


def data_files(path: str | Path) -> list[Path]:
    """The files whose rows `path` names, in order.

    Raises:
        UserError: none; or a folder with several splits, several kinds of files, or files in
            several folders: which of them are meant is then for the caller to say.
    """
    path = Path(path)
    if path.is_dir():
        return _folder_files(path)
    if path.is_file():
        return [path]
    if path.exists():
        raise UserError(f"{path}: no regular file; write the rows to a file and name it")
    found = [Path(name) for name in sorted(glob.glob(str(path)))]
    files = [file for file in found if file.is_file()]
    if not files:
        raise UserError(
            f"{path}: no such file; name a file of rows (JSONL, a JSON array, parquet), a folder "
            "of them, or a folder saved by datasets; what is on a server is downloaded first"
        )
    return files


def _folder_files(folder: Path) -> list[Path]:
    # What `datasets` saved has its files listed.
    if (folder / "state.json").is_file():
        return _saved_files(folder)
    if (folder / "dataset_dict.json").is_file():
        return _saved_files(_only_split(folder))
    if (folder / "dataset_info.json").is_file() and list(folder.glob("*.arrow")):
        raise UserError(
            f"{folder}: the cache of datasets, not a saved data set; "
            "save one split by dataset.save_to_disk(OUT) and name OUT"
        )

    # Other folders: files of one kind, in one folder, of one split.
    by_kind = _files_by_kind(folder)
    if len(by_kind) > 1:
        by_kind.pop("json", None)  # beside rows in another form it describes them
    if not by_kind:
        raise UserError(
            f"{folder}: no file of rows in it (.jsonl, .json, .parquet or .arrow); "
            "name one that has some"
        )
    if len(by_kind) > 1:
        counts = ", ".join(f"{len(files)} .{kind}" for kind, files in by_kind.items())
        raise UserError(
            f"{folder}: files of several kinds ({counts}), which may hold the same rows twice; "
            f"name one kind, such as '{folder}/*.{min(by_kind)}'"
        )
    (files,) = by_kind.values()
    _refuse_packed_twice(folder, files)
    _refuse_several_folders(folder, files)
    _refuse_splits(folder, files)
    return files


def _saved_files(folder: Path) -> list[Path]:
    """The Arrow files of a folder that `Dataset.save_to_disk` wrote."""
    state = read_json(folder / "state.json")
    listed = state.get("_data_files") if isinstance(state, dict) else None
    if not isinstance(listed, list) or not all(isinstance(one, dict) for one in listed):
        raise UserError(f"{folder / 'state.json'}: lists no data files; save the data set again")
    if state.get("_indices_data_files"):
        raise UserError(
            f"{folder}: its rows are chosen by a file of indices; "
            "save dataset.flatten_indices() and name that"
        )
    files = [folder / str(one.get("filename")) for one in listed]
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}: no such file, but state.json lists it; copy the folder again")
    return files


def _only_split(folder: Path) -> Path:
    """The folder of the one split of what `DatasetDict.save_to_disk` wrote."""
    tree = read_json(folder / "dataset_dict.json")
    splits = tree.get("splits") if isinstance(tree, dict) else None
    if not isinstance(splits, list) or not splits:
        raise UserError(f"{folder / 'dataset_dict.json'}: no splits; save the data set again")
    if len(splits) > 1:
        raise UserError(
            f"{folder}: a data set of {len(splits)} splits ({_some(splits)}); "
            f"name one: {folder / str(splits[0])}"
        )
    return folder / str(splits[0])


def _files_by_kind(folder: Path) -> dict[str, list[Path]]:
    """The files of rows in a folder and those inside it, by ending; hidden ones are left out."""
    found = defaultdict(list)
    for file in sorted(folder.rglob("*")):
        inside = file.relative_to(folder)
        ending = _ENDINGS.search(file.name)
        hidden = any(part.startswith(".") for part in inside.parts)
        if ending and not hidden and file.name not in _NOT_ROWS and not file.is_dir():
            if not file.is_file():
                raise UserError(f"{file}: no file that can be read; delete it or name the others")
            kind = ending[1].replace("ndjson", "jsonl")
            found[kind].append(file)
    return dict(found)


def _refuse_packed_twice(folder: Path, files: list[Path]) -> None:
    names = [_PACKED.sub("", file.name) for file in files]
    twice = [file.name for file, name in zip(files, names, strict=True) if names.count(name) > 1]
    parents = {file.parent for file in files}
    if twice and len(parents) == 1:
        raise UserError(
            f"{folder}: {_some(sorted(twice))} may hold the same rows twice; name one of them"
        )


def _refuse_several_folders(folder: Path, files: list[Path]) -> None:
    parents = list(dict.fromkeys(file.parent for file in files))
    if len(parents) > 1:
        raise UserError(
            f"{folder}: files of rows in {len(parents)} folders ({_some(parents)}), which may be "
            "other splits or subsets; name one of them"
        )


def _refuse_splits(folder: Path, files: list[Path]) -> None:
    """Refuse files whose names say that some are for tests, and others not."""
    held_out = [file for file in files if _HELD_OUT.search(file.name.lower())]
    if held_out and len(held_out) < len(files):
        (other, *_) = [file for file in files if file not in held_out]
        raise UserError(
            f"{folder}: several splits ({_some([other.name, *(one.name for one in held_out)])}); "
            f"name one by a pattern, such as '{other.parent / _pattern(other.name)}'"
        )


def _pattern(name: str) -> str:
    """`train-*.parquet` for `train-00000-of-00002.parquet`."""
    return re.sub(r"\d[\d\-of]*\d(?=\.)", "*", name)


def _some(names: Iterable[Any]) -> str:
    texts = [str(name) for name in names]
    shown = ", ".join(texts[:_SHOWN])
    return f"{shown}, …" if len(texts) > _SHOWN else shown

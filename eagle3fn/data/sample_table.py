"""The table of a feature folder's samples: `samples.safetensors`, mapped by columns, never parsed.

| tensor | of N samples |
|---|---|
| `length`, `supervised` | (N,) int64: tokens, supervised ones; -1 where an older index has none |
| `id`, `key`, `tokens` | (bytes,) uint8: the texts one after another, in UTF-8 |
| `id.ends`, `key.ends`, `tokens.ends` | (N,) int64: the end of each text in these bytes |

Samples stand in the order of their shards, so a shard's are a range of them.
"""

import hashlib
from collections.abc import Hashable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file

from eagle3fn.base.errors import UserError, printable
from eagle3fn.base.files import sha256, whole_file

FILE = "samples.safetensors"
REMEDY = "run eagle3fn extract again"

_NUMBERS = ("length", "supervised")
_TEXTS = ("id", "key", "tokens")
_UNKNOWN = -1
_NO_TEXT = ""

Columns = dict[str, np.ndarray]


class SampleTable(Sequence[dict[str, Any]]):
    """A folder's samples in order. An entry is made when it is asked for.

    It has `id`, `key`, `shard`, `length`, and where they are known `supervised` and `tokens`, the
    digest of its tokens.

    Args:
        path: names the table in errors.
        columns: as the file has them.
        shards: the shards' files.
        counts: samples of each.
    """

    def __init__(
        self, path: Path, columns: Columns, shards: Sequence[str], counts: Sequence[int]
    ) -> None:
        self._path = path
        self._columns = columns
        self._shards = shards
        self._ends = np.cumsum(counts)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of every sample, (N,) int64."""
        return self._columns["length"]

    def of_shard(self, shard: int) -> range:
        """The numbers of a shard's samples."""
        start = self._ends[shard - 1] if shard else 0
        return range(int(start), int(self._ends[shard]))

    def shard_of(self, number: int) -> int:
        """The number of the shard that a sample is in."""
        return int(np.searchsorted(self._ends, number, side="right"))

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...

    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...

    def __getitem__(self, index: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = range(len(self))[index]  # refuses what is past the end
        entry: dict[str, Any] = {
            "id": self._text("id", number),
            "key": self._text("key", number),
            "shard": self._shards[self.shard_of(number)],
            "length": int(self._columns["length"][number]),
            "supervised": int(self._columns["supervised"][number]),
            "tokens": self._text("tokens", number),
        }
        if entry["supervised"] == _UNKNOWN:
            del entry["supervised"]
        if entry["tokens"] == _NO_TEXT:
            del entry["tokens"]
        return entry

    def _text(self, name: str, number: int) -> str:
        ends = self._columns[f"{name}.ends"]
        start = ends[number - 1] if number else 0
        data = self._columns[name][start : ends[number]].tobytes()
        try:
            return data.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            raise UserError(
                f"{self._path}: the {name} of sample {number} is no text; {REMEDY}"
            ) from None


def columns_of(entries: Sequence[dict[str, Any]]) -> Columns:
    """The columns of entries as an index or a sidecar has them."""
    columns = {}
    for name in _NUMBERS:
        values = [entry.get(name, _UNKNOWN) for entry in entries]
        columns[name] = np.array(values, dtype=np.int64)
    for name in _TEXTS:
        texts = [entry.get(name, _NO_TEXT).encode("utf-8", "surrogatepass") for entry in entries]
        columns[name] = np.frombuffer(b"".join(texts), dtype=np.uint8)
        columns[f"{name}.ends"] = np.cumsum([len(text) for text in texts], dtype=np.int64)
    return columns


def write_table(folder: Path, columns: Columns) -> dict[str, Any]:
    """Write the table whole; what the index says of it: `file`, `bytes`, `sha256`.

    The same samples have the same bytes.
    """
    path = folder / FILE
    with whole_file(path) as temporary:
        save_file(_tensors(columns), temporary)
    return {"file": FILE, "bytes": path.stat().st_size, "sha256": sha256(path)}


def table_record(columns: Columns) -> dict[str, Any]:
    """What `write_table` returns, of a table that is not written."""
    data = save(_tensors(columns))
    return {"file": FILE, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _tensors(columns: Columns) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(column) for name, column in columns.items()}


def read_table(
    folder: Path, record: dict[str, Any], shards: Sequence[str], counts: Sequence[int]
) -> SampleTable:
    """The table that `write_table` wrote; its columns are mapped into memory.

    Args:
        folder: the feature folder.
        record: what the index says of the table, with its types.
        shards: the shards' files.
        counts: samples of each.

    Raises:
        UserError: missing, changed, or columns that don't belong together.
    """
    path = folder / FILE
    size = path.stat().st_size if path.is_file() else None
    if size != record["bytes"]:
        found = "missing" if size is None else f"{size} bytes"
        raise UserError(f"{path}: {found}, must be {record['bytes']} bytes; {REMEDY}")
    if sha256(path) != record["sha256"]:
        raise UserError(f"{path}: its bytes have changed; {REMEDY}")

    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not readable ({printable(str(error))}); {REMEDY}") from None
    _check_columns(tensors, sum(counts), path)
    columns = {name: tensor.numpy() for name, tensor in tensors.items()}
    return SampleTable(path, columns, shards, counts)


def _check_columns(tensors: dict[str, torch.Tensor], count: int, path: Path) -> None:
    """Refuse columns of other names, dtypes or lengths, and texts that end before they begin."""
    kinds: dict[str, tuple[int | None, torch.dtype]] = dict.fromkeys(_NUMBERS, (count, torch.int64))
    for name in _TEXTS:
        kinds[name] = (None, torch.uint8)
        kinds[f"{name}.ends"] = (count, torch.int64)

    for name in sorted(kinds.keys() | tensors.keys()):
        if name not in tensors or name not in kinds:
            what = "is missing" if name in kinds else "is no column"
            raise UserError(f"{path}: {printable(name)} {what}; {REMEDY}")
        size, dtype = kinds[name]
        tensor = tensors[name]
        if tensor.dtype != dtype or tensor.ndim != 1 or size not in (None, len(tensor)):
            raise UserError(
                f"{path}: {name} is {tuple(tensor.shape)} {tensor.dtype}, must be "
                f"({'bytes' if size is None else size},) {dtype}; {REMEDY}"
            )
    for name in _TEXTS:
        ends = tensors[f"{name}.ends"]
        ascending = bool((ends.diff(prepend=ends.new_zeros(1)) >= 0).all())
        if not ascending or int(ends[-1]) != len(tensors[name]):
            raise UserError(f"{path}: {name}.ends are not the ends of its texts; {REMEDY}")


def first_doubled(keys: Sequence[Hashable]) -> int | None:
    """The place of the first key that was there before, if one was."""
    seen: set[Hashable] = set()
    for place, key in enumerate(keys):
        if key in seen:
            return place
        seen.add(key)
    return None


def all_entries(sidecars: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The samples' entries of shards' sidecars, in order."""
    return list(chain.from_iterable(sidecar["samples"] for sidecar in sidecars))

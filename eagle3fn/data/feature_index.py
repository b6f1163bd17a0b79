"""The index of a feature folder: what it must hold, and whether it is as it was written.

Folders of schema 1 list their samples in the index; since schema 2 these are in a table of their
own (`data.sample_table`), whose hash the index has.
"""

from pathlib import Path
from typing import Any

import torch

from eagle3fn.base.errors import UserError, printable
from eagle3fn.base.files import json_sha256
from eagle3fn.base.read import read_json
from eagle3fn.data.sample_table import (
    FILE,
    REMEDY,
    SampleTable,
    columns_of,
    first_doubled,
    read_table,
)
from eagle3fn.data.storage import STORES

SCHEMA = 2
_LISTED = 1  # the schema whose index lists the samples

# What an index must hold, and of which types.
_INDEX_KEYS = ("schema", "target", "dtype", "max_length", "shards", "totals")
_INDEX_TYPES = {"totals": dict, "target": dict, "dtype": str, "shards": list}
_TABLE_TYPES = {"file": str, "bytes": int, "sha256": str}
_SAMPLE_TYPES = {"id": str, "key": str, "shard": str, "length": int}
_OPTIONAL_TYPES = {"supervised": int, "tokens": str}
_SHARD_TYPES = {"file": str, "bytes": int, "sha256": str}
_TARGET_TYPES = {"vocab_size": int, "hidden_size": int}
_RECORD_TYPES = {"dtype": str, "embed_tokens": str, "head": str, "norm": str}


def own_hash(index: dict[str, Any]) -> str:
    """The hash of an index, of all that it holds but this hash."""
    return json_sha256({key: value for key, value in index.items() if key != "sha256"})


def read_index(path: Path) -> tuple[dict[str, Any], SampleTable]:
    """An index whose entries have their types and belong together, and its samples.

    Its own hash is compared last, so that a fault is named where it is; an index of an earlier
    version has none.

    Raises:
        UserError: damaged, of another version, or changed since it was written.
    """
    index = read_json(path)
    for key in _INDEX_KEYS:
        if not isinstance(index, dict) or key not in index:
            raise UserError(f"{path}: {key} is missing; {REMEDY}")
    if index["schema"] not in (_LISTED, SCHEMA):
        found = printable(repr(index["schema"]))
        raise UserError(
            f"{path}: schema {found}: this version reads {_LISTED} and {SCHEMA}; {REMEDY}"
        )

    _check_types(index, _INDEX_TYPES, "", path)
    for number, entry in enumerate(index["shards"]):
        _check_types(entry, _SHARD_TYPES, f"shards[{number}]", path)
    _check_files(index, path)
    samples = _listed(index, path) if index["schema"] == _LISTED else _in_table(index, path)
    _check_totals(index, samples, path)
    _check_types(index["target"], _TARGET_TYPES, "target", path)
    if "store" in index and str(index["store"]) not in STORES:
        found = printable(repr(index["store"]))
        raise UserError(
            f"{path}: store is {found}: this version reads {', '.join(STORES)}; update eagle3fn, "
            f"or {REMEDY}"
        )
    if "tensors" in index["target"]:
        _check_record(index["target"]["tensors"], path)

    if index.get("sha256", "") not in ("", own_hash(index)):
        raise UserError(f"{path}: has been changed since it was written; {REMEDY}")
    return index, samples


def _check_files(index: dict[str, Any], path: Path) -> None:
    """Refuse shards outside of the folder, and those listed twice."""
    known = set()
    for number, shard in enumerate(index["shards"]):
        file = shard["file"]
        plain = Path(file).name == file and file.isprintable() and file not in ("", ".", "..", FILE)
        if not plain or file in known:
            raise UserError(
                f"{path}: shards[{number}].file is {printable(repr(file))}: must be the name of a "
                f"file in this folder, listed once; {REMEDY}"
            )
        known.add(file)


def _in_table(index: dict[str, Any], path: Path) -> SampleTable:
    """The samples of the table next to the index."""
    _check_types(index, {"table": dict}, "", path)
    record = index["table"]
    _check_types(record, _TABLE_TYPES, "table", path)
    if record["file"] != FILE:
        found = printable(repr(record["file"]))
        raise UserError(f"{path}: table.file is {found}: must be {FILE!r}; {REMEDY}")

    counts = []
    for number, shard in enumerate(index["shards"]):
        _check_types(shard, {"samples": int}, f"shards[{number}]", path)
        if shard["samples"] < 0:
            raise UserError(f"{path}: shards[{number}].samples is negative; {REMEDY}")
        counts.append(shard["samples"])
    if not sum(counts):
        raise UserError(f"{path}: no samples; {REMEDY} on more conversations")
    return read_table(path.parent, record, [shard["file"] for shard in index["shards"]], counts)


def _listed(index: dict[str, Any], path: Path) -> SampleTable:
    """The samples that an index of schema 1 lists, in the order of its shards."""
    _check_types(index, {"samples": list}, "", path)
    entries = index["samples"]
    for number, entry in enumerate(entries):
        _check_types(entry, _SAMPLE_TYPES, f"samples[{number}]", path)
        for key, kind in _OPTIONAL_TYPES.items():
            if key in entry:
                _check_types(entry, {key: kind}, f"samples[{number}]", path)
    if not entries:
        raise UserError(f"{path}: no samples; {REMEDY} on more conversations")

    # A shard's samples are a range.
    files = [shard["file"] for shard in index["shards"]]
    numbers = {file: number for number, file in enumerate(files)}
    counts = [0] * len(files)
    last = 0
    for number, entry in enumerate(entries):
        shard = numbers.get(entry["shard"], -1)
        if shard < last:
            raise UserError(
                f"{path}: samples[{number}].shard is {printable(repr(entry['shard']))}: "
                f"must be one of its shards, in their order; {REMEDY}"
            )
        counts[shard] += 1
        last = shard

    doubled = first_doubled([(entry["shard"], entry["key"]) for entry in entries])
    if doubled is not None:
        raise UserError(
            f"{path}: samples[{doubled}].key is {printable(repr(entries[doubled]['key']))}: "
            f"another sample has it; {REMEDY}"
        )
    return SampleTable(path, columns_of(entries), files, counts)


def _check_totals(index: dict[str, Any], samples: SampleTable, path: Path) -> None:
    """Refuse totals that are not those of the samples and shards listed."""
    totals = index["totals"]
    found = {
        "samples": len(samples),
        "tokens": int(samples.lengths.sum()),
        "bytes": sum(shard["bytes"] for shard in index["shards"]),
    }
    for name, value in found.items():
        if totals.get(name, value) != value:
            raise UserError(
                f"{path}: totals.{name} is {printable(repr(totals[name]))}, but {value} are "
                f"listed; {REMEDY}"
            )


def _check_record(record: Any, path: Path) -> None:
    _check_types(record, _RECORD_TYPES, "target.tensors", path)
    if not isinstance(getattr(torch, record["dtype"], None), torch.dtype):
        raise UserError(f"{path}: target.tensors.dtype is {record['dtype']!r:.80}; {REMEDY}")


def _check_types(tree: Any, types: dict[str, type], where: str, path: Path) -> None:
    """Refuse a `tree` that is no dict or lacks one of the typed keys; `where` is its place."""
    if not isinstance(tree, dict):
        raise UserError(f"{path}: {where} is {tree!r:.80}: must be a dict; {REMEDY}")
    for key, kind in types.items():
        name = f"{where}.{key}" if where else key
        if key not in tree:
            raise UserError(f"{path}: {name} is missing; {REMEDY}")
        if type(tree[key]) is not kind:
            raise UserError(
                f"{path}: {name} is {tree[key]!r:.80}: must be a {kind.__name__}; {REMEDY}"
            )

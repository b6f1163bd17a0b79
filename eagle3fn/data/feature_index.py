"""The index of a feature folder: what it must hold, and whether it is as it was written."""

from pathlib import Path
from typing import Any

import torch

from eagle3fn.base.errors import UserError, printable
from eagle3fn.base.files import json_sha256
from eagle3fn.base.read import read_json
from eagle3fn.data.storage import STORES

SCHEMA = 1
REMEDY = "run eagle3fn extract again"

# What an index must hold, and of which types.
_INDEX_KEYS = ("schema", "target", "dtype", "max_length", "samples", "shards", "totals")
_INDEX_TYPES = {"totals": dict, "target": dict, "dtype": str, "samples": list, "shards": list}
_SAMPLE_TYPES = {"id": str, "key": str, "shard": str, "length": int}
_SHARD_TYPES = {"file": str, "bytes": int, "sha256": str}
_TARGET_TYPES = {"vocab_size": int, "hidden_size": int}
_RECORD_TYPES = {"dtype": str, "embed_tokens": str, "head": str, "norm": str}


def own_hash(index: dict[str, Any]) -> str:
    """The hash of an index, of all that it holds but this hash."""
    return json_sha256({key: value for key, value in index.items() if key != "sha256"})


def read_index(path: Path) -> dict[str, Any]:
    """An index whose entries have their types and belong together.

    Its own hash is compared last, so that a fault is named where it is; an index of an earlier
    version has none.

    Raises:
        UserError: damaged, of another version, or changed since it was written.
    """
    index = read_json(path)
    for key in _INDEX_KEYS:
        if not isinstance(index, dict) or key not in index:
            raise UserError(f"{path}: {key} is missing; {REMEDY}")
    if index["schema"] != SCHEMA:
        found = printable(repr(index["schema"]))
        raise UserError(f"{path}: schema {found}: this version reads {SCHEMA}; {REMEDY}")

    _check_entries(index, path)
    _check_names(index, path)
    _check_totals(index, path)
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
    return index


def _check_entries(index: dict[str, Any], path: Path) -> None:
    _check_types(index, _INDEX_TYPES, "", path)
    for number, entry in enumerate(index["samples"]):
        _check_types(entry, _SAMPLE_TYPES, f"samples[{number}]", path)
    for number, entry in enumerate(index["shards"]):
        _check_types(entry, _SHARD_TYPES, f"shards[{number}]", path)

    if not index["samples"]:
        raise UserError(f"{path}: no samples; {REMEDY} on more conversations")


def _check_names(index: dict[str, Any], path: Path) -> None:
    """Refuse shards outside of the folder, and samples of no shard or there twice."""
    known = set()
    for number, shard in enumerate(index["shards"]):
        file = shard["file"]
        plain = Path(file).name == file and file.isprintable() and file not in ("", ".", "..")
        if not plain or file in known:
            raise UserError(
                f"{path}: shards[{number}].file is {printable(repr(file))}: must be the name of a "
                f"file in this folder, listed once; {REMEDY}"
            )
        known.add(file)
    keys = set()
    for number, entry in enumerate(index["samples"]):
        if entry["shard"] not in known:
            raise UserError(
                f"{path}: samples[{number}].shard is {printable(repr(entry['shard']))}: "
                f"must be one of its shards; {REMEDY}"
            )
        place = (entry["shard"], entry["key"])
        if place in keys:
            raise UserError(
                f"{path}: samples[{number}].key is {printable(repr(entry['key']))}: "
                f"another sample has it; {REMEDY}"
            )
        keys.add(place)


def _check_totals(index: dict[str, Any], path: Path) -> None:
    """Refuse totals that are not those of the samples and shards listed."""
    totals = index["totals"]
    found = {
        "samples": len(index["samples"]),
        "tokens": sum(entry["length"] for entry in index["samples"]),
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

"""The files of a feature folder as they are written: shards, their sidecars, table and index.

    index.json                   target, dtype, totals, the hashes of the shards and of the table
    samples.safetensors          the table: an entry for each sample (`data.sample_table`)
    shard-00000.safetensors      tensors `<key>.input_ids`, `<key>.loss_mask`, `<key>.aux_hidden`,
                                 `<key>.last_hidden` of each sample; in a smaller store
                                 (`data.storage`) also `<key>.aux_hidden.scale` and so on
    shard-00000.json             the shard's hash and its samples' entries: what a resumed
                                 extraction reads

The index is written last. `data.features` opens and reads a folder.
"""

import hashlib
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from eagle3fn.base.files import sha256, whole_file, write_json
from eagle3fn.base.types import Sample
from eagle3fn.data.feature_index import SCHEMA, own_hash
from eagle3fn.data.sample_file import pack
from eagle3fn.data.sample_table import FILE as TABLE
from eagle3fn.data.sample_table import all_entries, columns_of, write_table
from eagle3fn.data.samples import Encoded
from eagle3fn.data.storage import STORES, encode

# The name in a shard of each field of `Sample`. The mask's differs: files of schema 1 have it so.
STORED = {
    "input_ids": "input_ids",
    "token_mask": "loss_mask",
    "aux_hidden": "aux_hidden",
    "last_hidden": "last_hidden",
}
_HIDDEN = ("aux_hidden", "last_hidden")  # what a smaller store holds in fewer bytes


def shard_name(number: int) -> str:
    """File name of shard `number`; its sidecar ends in `.json` instead."""
    return f"shard-{number:05d}.safetensors"


def stored_name(key: str, field: str) -> str:
    """The name in a shard of a sample's tensor."""
    return f"{key}.{STORED[field]}"


def stored_names(key: str, field: str, store: str | None) -> dict[str, str]:
    """The names in a shard of a sample's field, by their ends; `""` is no end."""
    name = stored_name(key, field)
    if store is None or field not in _HIDDEN:
        return {"": name}
    return {end: f"{name}.{end}" if end else name for end in STORES[store].dtypes}


def tokens_digest(name: str, ids: Tensor, mask: Tensor) -> str:
    """Hex digest of a sample's id, `input_ids` and `token_mask`, as its entry has it."""
    return hashlib.sha256(pack(Encoded(name, ids, mask)).data).hexdigest()[:16]


def write_shard(
    folder: Path,
    number: int,
    samples: dict[str, Sample],
    sidecar: dict[str, Any],
    store: str | None = None,
) -> dict[str, Any]:
    """Write a shard whole, then its sidecar.

    Args:
        folder: the feature folder.
        number: the shard's.
        samples: by their keys in the index.
        sidecar: what the sidecar holds next to the shard's name, size and hash.
        store: the index's: a name of `data.storage.STORES`; None: the values as they are.

    Returns:
        The whole sidecar.

    Raises:
        UserError: a value that the store has no number for.
    """
    tensors = {}
    for key, sample in samples.items():
        width = sample.last_hidden.shape[-1]
        for field, value in sample._asdict().items():
            parts = {"": value.cpu().contiguous()}
            if store is not None and field in _HIDDEN:
                parts = encode(store, parts[""], width)
            for end, name in stored_names(key, field, store).items():
                tensors[name] = parts[end]

    path = folder / shard_name(number)
    with whole_file(path) as temporary:
        save_file(tensors, temporary)
    sidecar = {**sidecar, "file": path.name, "bytes": path.stat().st_size, "sha256": sha256(path)}
    write_json(path.with_suffix(".json"), sidecar)
    return sidecar


def write_index(
    folder: Path, index: dict[str, Any], sidecars: list[dict[str, Any]]
) -> dict[str, Any]:
    """Write the samples' table, then `index.json`: `index`, and of the sidecars totals and shards.

    Returns:
        The whole index.
    """
    shards = []
    for sidecar in sidecars:
        shard = {key: sidecar[key] for key in ("file", "bytes", "sha256")}
        shards.append({**shard, "samples": len(sidecar["samples"])})

    samples = all_entries(sidecars)
    totals = {
        "samples": len(samples),
        "tokens": sum(entry["length"] for entry in samples),
        "supervised": sum(entry["supervised"] for entry in samples),
        "bytes": sum(shard["bytes"] for shard in shards),
    }
    table = write_table(folder, columns_of(samples))
    index = {"schema": SCHEMA, **index, "totals": totals, "table": table, "shards": shards}
    index["sha256"] = own_hash(index)
    write_json(folder / "index.json", index)
    return index


def remove_index(folder: Path) -> None:
    """Remove the index and then its table: the folder is not complete, its shards stay."""
    (folder / "index.json").unlink(missing_ok=True)
    (folder / TABLE).unlink(missing_ok=True)

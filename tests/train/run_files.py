"""What two finished runs have written, compared."""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

ROWS = ("metrics.jsonl", "eval.jsonl")


def rows(path: Path) -> list[dict[str, Any]]:
    """A file's rows without their times."""
    found = []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        row.pop("seconds", None)
        found.append(row)
    return found


def read_leaves(path: Path) -> dict[str, torch.Tensor]:
    """All leaves of a checkpoint under their names, whole, in this process alone."""
    reader = FileSystemReader(path)
    leaves: dict[str, Any] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        load(leaves, storage_reader=reader, no_dist=True)
    return leaves


def same_leaves(one: Path, other: Path) -> bool:
    """Whether two checkpoints hold the same leaves, bit for bit."""
    left = read_leaves(one)
    right = read_leaves(other)
    if left.keys() != right.keys():
        return False
    return all(torch.equal(left[name], right[name]) for name in left)


def same_rows(run: Path, other: Path, names: tuple[str, ...] = ROWS) -> bool:
    """Whether two runs have the same rows in the files named."""
    return all(rows(run / name) == rows(other / name) for name in names)


def same_end(run: Path, other: Path, step: int, names: tuple[str, ...] = ROWS) -> bool:
    """Whether two runs have the same checkpoint of `step` and the same rows in the files named."""
    last = f"checkpoints/step-{step:08d}"
    return same_leaves(run / last, other / last) and same_rows(run, other, names)

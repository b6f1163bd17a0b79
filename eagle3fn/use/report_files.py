"""The files that a report gathers, read and checked: a damaged one is named, and its row."""

import math
import os
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from eagle3fn.base.draft_config import DraftConfig
from eagle3fn.base.errors import UserError
from eagle3fn.base.kinds import is_amount, is_count
from eagle3fn.base.read import UNFINISHED, read_object, read_rows
from eagle3fn.base.sections import (
    STARTS,
    DataConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TrainConfig,
)
from eagle3fn.base.toml import read_toml
from eagle3fn.data.feature_index import read_index
from eagle3fn.train.track import HELD_OUT, STEPS, RowKind

T = TypeVar("T")
_BUCKETS = 20  # of the samples' lengths
_VOCABULARIES = ("draft_vocab_size", "vocab_size")
_SECTIONS = {
    "draft": DraftConfig,
    "objective": ObjectiveConfig,
    "optimizer": OptimizerConfig,
    "data": DataConfig,
    "train": TrainConfig,
}


def training_folder(folder: Path) -> Path:
    """The folder of `train --out`: this one, or its `train/`.

    Raises:
        UserError: neither has the rows of a training.
    """
    for found in (folder, folder / "train"):
        if os.path.lexists(found / "metrics.jsonl"):
            return found
    raise UserError(
        f"{folder}: has no metrics.jsonl, nor has its train/; name the folder of eagle3fn train "
        "--out, or the one that has it as train/"
    )


def run_file(folder: Path, name: str) -> Path:
    """A file of a run: in the folder named, or next to it where that is the run's `train/`."""
    inside = folder / name
    outside = folder.resolve().parent / name
    if (
        not os.path.lexists(inside)
        and folder.resolve().name == "train"
        and os.path.lexists(outside)
    ):
        return outside
    return inside


def if_there(read: Callable[[Path], T], path: Path, default: T) -> T:
    """What `read` makes of a file, or the default without the file."""
    return read(path) if os.path.lexists(path) else default


def begins_warm(path: Path) -> bool:
    """Whether a run's `config.toml` names a draft to start from; not known without the file.

    Raises:
        UserError: it is no TOML.
    """
    settings = if_there(read_toml, path, {}).get("train")
    return isinstance(settings, dict) and settings.get("init", STARTS[0]) not in STARTS


# The rows of a training


def read_steps(path: Path) -> list[dict[str, Any]]:
    """The rows of `metrics.jsonl`; one of a skipped update has no loss.

    Raises:
        UserError: missing, or a row is damaged; a last one that is not whole yet is left out.
    """
    return _rows(path, STEPS)


def read_held_out(path: Path) -> list[dict[str, Any]]:
    """The rows of `eval.jsonl`.

    Those of a run that holds no samples out have no accepted length; null is one not finite.

    Raises:
        UserError: as `read_steps`.
    """
    return _rows(path, HELD_OUT)


def _rows(path: Path, kind: RowKind) -> list[dict[str, Any]]:
    rows = read_rows(path, kind.fault)
    for number, reason in rows.bad:
        if not reason.endswith(UNFINISHED):
            raise UserError(f"{path}:{number}: {reason}; mend or delete the row, or train anew")
    return rows.good


# Single files


def read_data(folder: Path) -> dict[str, Any]:
    """Of a feature folder: `samples`, `tokens`, `supervised` tokens, and the samples' `lengths`.

    What an index of an earlier version has not is left out.

    Raises:
        UserError: the index is missing or damaged.
    """
    path = folder / "index.json"
    index = read_object(path)
    totals = index.get("totals")
    if not isinstance(totals, dict) or not is_count(totals.get("supervised")):
        raise UserError(f"{path}: no number of supervised tokens; run eagle3fn extract again")
    names = ("samples", "tokens", "supervised")
    data = {name: totals[name] for name in names if is_count(totals.get(name))}
    if "schema" in index:
        _, samples = read_index(path)
        data["lengths"] = length_counts(samples.lengths)
    return data


def length_counts(lengths: np.ndarray) -> list[dict[str, int]]:
    """How many samples have `from` to `to` tokens, in `_BUCKETS` ranges of one width at most."""
    width = max(1, math.ceil(int(lengths.max()) / _BUCKETS))
    counts = np.bincount((lengths - 1).clip(0) // width)
    found = []
    for number, count in enumerate(counts.tolist()):
        start = number * width
        found.append({"from": start + 1, "to": start + width, "samples": count})
    return found


def read_settings(path: Path) -> dict[str, Any]:
    """A run's `config.toml` as a report has it.

    `changed` has what differs from the defaults, `section.key` to the two values; the sizes of the
    two vocabularies are `draft_vocab_size` and `vocab_size`.

    Raises:
        UserError: it is no TOML.
    """
    tree = read_toml(path)
    changed = {}
    for section, kind in _SECTIONS.items():
        values = tree.get(section)
        if not isinstance(values, dict):
            continue
        for each in fields(kind):
            value = values.get(each.name)
            if value is None or each.default is MISSING:
                continue
            default = list(each.default) if isinstance(each.default, tuple) else each.default
            if value != default:
                changed[f"{section}.{each.name}"] = {"value": value, "default": default}
    draft = tree.get("draft")
    sizes = draft if isinstance(draft, dict) else {}
    found = {name: sizes[name] for name in _VOCABULARIES if is_count(sizes.get(name))}
    return {"changed": changed, **found}


def read_planned(path: Path) -> int | None:
    """The steps that a run is to make, as its `horizon.json` has them; None if it has not."""
    steps = read_object(path).get("steps")
    return steps if is_count(steps) and steps else None


def read_stages(path: Path) -> dict[str, Any]:
    """The seconds of each stage and of all of them."""
    stages = read_object(path)
    if not all(map(is_amount, stages.values())):
        raise UserError(f"{path}: must hold the seconds of each stage; mend it or delete it")
    return {"stage_seconds": stages, "wall_s": sum(stages.values())}

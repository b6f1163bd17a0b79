"""The files that a report gathers, read and checked: a damaged one is named, and its row."""

import math
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from eagle3fn.base.draft_config import DraftConfig
from eagle3fn.base.errors import UserError
from eagle3fn.base.kinds import (
    Check,
    is_amount,
    is_count,
    is_flag,
    is_rates,
    is_text,
    or_none,
)
from eagle3fn.base.places import check_out_file
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
from eagle3fn.use.rounds import is_examples

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


def read_stages(path: Path) -> dict[str, Any]:
    """The seconds of each stage and of all of them."""
    stages = read_object(path)
    if not all(map(is_amount, stages.values())):
        raise UserError(f"{path}: must hold the seconds of each stage; mend it or delete it")
    return {"stage_seconds": stages, "wall_s": sum(stages.values())}


_GROUP: dict[str, Check] = {
    "prompts": is_count,
    "tokens": is_count,
    "verifications": or_none(is_count),
    "accepted_length": or_none(is_amount),
}
"""What a report reads of the answers of one group."""


def is_groups(value: Any) -> bool:
    """Numbers of groups of prompts, by name."""
    return isinstance(value, dict) and all(map(_is_group, value.values()))


def _is_group(value: Any) -> bool:
    if not isinstance(value, dict) or not _GROUP.keys() <= value.keys():
        return False
    return all(good(value[name]) for name, good in _GROUP.items())


def is_costs(value: Any) -> bool:
    """What `use.speed.measure_speed` gives of costs: `verify_seconds` has one entry more."""
    if not isinstance(value, dict):
        return False
    lists = [value.get("verify_seconds"), value.get("predicted_seconds_per_token")]
    if not all(map(is_rates, lists)) or not all(map(all, lists)):
        return False
    singles = ("context", "first_draft_seconds", "next_draft_seconds")
    numbers = all(is_amount(value.get(name)) for name in singles)
    return numbers and len(lists[0]) == len(lists[1]) + 1


_EVALUATION: dict[str, Check] = {
    "draft_length": is_count,
    "accepted_length": or_none(is_amount),
    "acceptance_by_position": or_none(is_rates),
    "prompts": or_none(is_text),
    "lossless": or_none(is_flag),
    "lossless_note": is_text,
    "tasks": is_count,
    "speedup": is_amount,
    "tokens_per_s": is_amount,
    "plain_tokens_per_s": is_amount,
    "speed_dtype": or_none(is_text),
    "speed_tasks": is_count,
    "speed_draft_length": is_count,
    "speed_accepted_length": is_amount,
    "break_even_accepted_length": is_amount,
    "untrained_accepted_length": is_amount,
    "timed_tokens": is_count,
    "differing_tokens": is_count,
    "repeated_8gram_share": is_amount,
    "threads": is_count,
    "wall_s": is_amount,
    "device": is_text,
    "engine": is_text,
    "engine_version": is_text,
    "engine_accepted_length": or_none(is_amount),
    "by_category": is_groups,
    "by_prompt_length": is_groups,
    "costs": is_costs,
    "examples": is_examples,
}
"""What a report reads of an evaluation, where it is there."""

_TOGETHER = {
    "speedup": ("tokens_per_s", "plain_tokens_per_s", "speed_tasks"),
    "lossless": ("tasks",),
    "break_even_accepted_length": ("speed_accepted_length", "speed_draft_length"),
    "differing_tokens": ("timed_tokens",),
    "engine": ("engine_version",),
}
"""What must be there with another value."""


def check_out_evaluation(path: str | Path) -> None:
    """Refuse a place for an evaluation: a file that holds something else.

    Raises:
        UserError: as `check_out_file`; or what is there is no older evaluation.
    """
    check_out_file(path)
    if not os.path.lexists(path) or not os.path.getsize(path):
        return
    found = {}
    with suppress(UserError):
        found = read_object(path)
    if not {"draft_length", "accepted_length"} <= found.keys():
        raise UserError(f"{path}: is there and no older evaluation; name another file")


def read_evaluation(path: Path) -> dict[str, Any]:
    """The evaluation, here or in an engine, that `eagle3fn evaluate` wrote.

    Raises:
        UserError: missing, or one of its values is, or is of another kind; it names the value.
    """
    found = read_object(path)
    needed = ["draft_length", "accepted_length", "acceptance_by_position"]
    for name, others in _TOGETHER.items():
        needed += others if name in found else ()
    if found.get("lossless", True) is None:
        needed.append("lossless_note")

    for name in needed:
        if name not in found:
            raise UserError(f"{path}: {name} is missing; run eagle3fn evaluate again")
    for name, good in _EVALUATION.items():
        if name in found and not good(found[name]):
            raise UserError(
                f"{path}: {name} is no value that evaluate writes; run eagle3fn evaluate again"
            )
    if found["acceptance_by_position"] is None and "engine" not in found:
        raise UserError(f"{path}: acceptance_by_position is missing; run eagle3fn evaluate again")
    return found

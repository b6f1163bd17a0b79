"""Checkpoints: one folder a step, whole or not at all, read back to the same bits."""

import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from eagle3fn.base.config import Config, to_dict
from eagle3fn.base.errors import UserError
from eagle3fn.base.files import read_json, whole_folder, write_json
from eagle3fn.base.tree import like, named_leaves
from eagle3fn.base.types import TrainState

SCHEMA = 1
_NAME = re.compile(r"step-(\d{8})")


class Resumed(NamedTuple):
    """A checkpoint's state and the small values saved beside it."""

    state: TrainState
    extra: dict[str, Any]


def save_checkpoint(folder: str | Path, state: TrainState, config: Config, extra: dict[str, Any], keep: int) -> Path:
    """Write `folder/step-NNNNNNNN/` and delete all but the `keep` newest.

    `extra` is what else a resumed run needs: the data's fingerprint, the best value so far.
    """
    step = int(state.step)
    path = Path(folder) / f"step-{step:08d}"
    with whole_folder(path) as temporary:
        leaves = {name: leaf.detach().contiguous().clone() for name, leaf in named_leaves(state).items()}
        save_file(leaves, temporary / "state.safetensors")
        write_json(temporary / "meta.json", {"schema": SCHEMA, "step": step, "config": to_dict(config), "extra": extra})
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return path


def checkpoints(folder: str | Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = (path for path in Path(folder).glob("step-*") if _NAME.fullmatch(path.name))
    return sorted(path for path in found if (path / "meta.json").exists())


def load_checkpoint(path: str | Path, template: TrainState, config: Config, data: str) -> Resumed:
    """Read a checkpoint into `template`'s structure.

    Raises:
        UserError: unreadable, of another schema, configuration or data, or with leaves of another shape or dtype.
    """
    path = Path(path)
    meta = read_json(path / "meta.json")
    if meta.get("schema") != SCHEMA:
        raise UserError(f"{path}: schema {meta.get('schema')!r}, this version reads {SCHEMA}; start a new run")
    _same_config(meta["config"], to_dict(config), path)
    if meta["extra"].get("data") != data:
        raise UserError(f"{path}: written for other features or another vocabulary map; train into another folder")
    try:
        leaves = load_file(path / "state.safetensors")
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path}/state.safetensors: damaged ({error}); delete {path} to resume from an older one"
        ) from None
    for name, leaf in named_leaves(template).items():
        found = leaves.get(name, torch.empty(0))
        if found.shape != leaf.shape or found.dtype != leaf.dtype:
            raise UserError(
                f"{path}/state.safetensors: {name} is {found.dtype} {tuple(found.shape)}, this run has "
                f"{leaf.dtype} {tuple(leaf.shape)}; train into another folder"
            )
        leaves[name] = found.to(leaf.device)
    return Resumed(like(template, leaves), meta["extra"])


def _same_config(old: dict, new: dict, path: Path, prefix: str = "") -> None:
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            _same_config(a, b, path, f"{prefix}{key}.")
        elif a != b and [a] != [list(b) if isinstance(b, tuple) else b]:
            raise UserError(
                f"{path}: a checkpoint of another configuration: {prefix}{key} was {a!r}, is {b!r}; "
                "train into another folder, or set it back"
            )

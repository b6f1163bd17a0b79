"""Checkpoints: one folder a step, whole or not at all, read back to the same bits on any number of
ranks.

`step-NNNNNNNN/` holds the state as `torch.distributed.checkpoint` writes it (a file a rank), the
draft's parameters once more as `draft.safetensors`, and `meta.json`. All ranks write into one
temporary folder, which rank 0 renames when every file is on the disk.
"""

import base64
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from eagle3fn.base.config import Config, to_dict
from eagle3fn.base.errors import UserError
from eagle3fn.base.files import publish_folder, sha256, write_json
from eagle3fn.base.launch import World
from eagle3fn.base.named import in_one_line
from eagle3fn.base.places import check_out_folder, check_own_folder, other_than
from eagle3fn.base.temporary import clear_in
from eagle3fn.base.tree import like, named_leaves
from eagle3fn.base.types import TrainState
from eagle3fn.train.changes import Change, changes_since, refuse_in_place
from eagle3fn.train.checkpoint_meta import (
    META,
    SCHEMA,
    digest_of,
    older,
    random_state,
    read_meta,
)
from eagle3fn.train.finite import finite
from eagle3fn.train.shard import full_params, local
from eagle3fn.train.stored_state import METADATA, check_leaves, read_leaves, read_metadata

DRAFT = "draft.safetensors"

_NAME = "step-" + "[0-9]" * 8  # of a checkpoint's folder
_STORED = re.compile(r"__\d+_\d+\.distcp")  # what torch writes of a rank's leaves


class Resumed(NamedTuple):
    """A checkpoint's state, the small values saved with it, and what has changed since."""

    state: TrainState
    extra: dict[str, Any]
    rng: torch.Tensor  # of torch's default generator on rank 0, uint8
    changes: list[Change]


def save_checkpoint(
    folder: str | Path,
    state: TrainState,
    config: Config,
    data: dict[str, str],
    extra: dict[str, Any],
    keep: int,
    world: World = World(),  # noqa: B008
    shift: int = 0,
    earlier: Mapping[str, int] = {},
) -> Path:
    """Write `folder/step-NNNNNNNN/` and delete all but the `keep` newest; every rank calls it.

    `data` are the hashes of what the run reads, `extra` is what else a resumed run needs, such as
    the best value. `shift` is `Run.shift`: the cursor counts the samples of the run's own data.
    `earlier` is `Run.earlier`.

    Raises:
        UserError: not written, such as for want of room; on every rank. The older checkpoints are
            as they were.
    """
    step = int(state.step)
    path = Path(folder) / f"step-{step:08d}"
    temporary = path.with_name(f".{path.name}.tmp")
    remedy = f"the checkpoints before it are whole; make room or mend {folder}, then call again"
    together = partial(_together, world, f"{path}: not written", remedy)
    try:
        # One temporary folder, in which every rank writes its file of the state, and hashes it.
        with together():
            if world.main:
                _remove(temporary)
            world.barrier()
            writer = FileSystemWriter(temporary)
            save(_tensors(state), storage_writer=writer, no_dist=world.size == 1)
            own = {file.name: sha256(file) for file in temporary.glob(f"__{world.rank}_*")}

        # All ranks gather the parameters; rank 0 writes the rest, and makes the folder a checkpoint
        # by renaming it.
        params = full_params(state.params)
        written = world.every(own)
        with together():
            if world.main:
                whole = {name: leaf.detach().cpu().contiguous() for name, leaf in params.items()}
                save_file(whole, temporary / DRAFT)
                files = {name: sha256(temporary / name) for name in (DRAFT, METADATA)}
                for part in written:
                    files |= part
                random = bytes(torch.get_rng_state().tolist())
                samples = (step + shift) * config.data.global_batch
                meta = {
                    "schema": SCHEMA,
                    "cursor": {"step": step, "samples": samples, "seed": config.train.seed},
                    "config": to_dict(config),
                    "data": data,
                    "earlier": dict(earlier),
                    "extra": extra,
                    "world": world.size,
                    "threads": torch.get_num_threads(),
                    "torch": torch.__version__,
                    "rng": base64.b64encode(random).decode(),
                    "files": files,
                }
                write_json(temporary / META, meta | {"digest": digest_of(meta)})
                check_out_folder(path, _foreign)
                publish_folder(temporary, path)
                for old in checkpoints(folder)[:-keep]:
                    if _foreign(old) is None:
                        _remove(old.rename(old.with_name(f".{old.name}.tmp")))
    finally:
        if world.main:
            shutil.rmtree(temporary, ignore_errors=True)
    return path


def _tensors(state: TrainState) -> dict[str, Any]:
    return {name: leaf.detach() for name, leaf in named_leaves(state).items()}


@contextmanager
def _together(world: World, what: str, remedy: str) -> Iterator[None]:
    """All ranks leave this block together: a file error on one is raised on all, as a UserError."""
    reason = ""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield
    except CheckpointException as error:  # of any rank; raised on all of them
        number, (found, _) = min(error.failures.items())
        reason = f"rank {number}: {in_one_line(found)}"
    except (OSError, SafetensorError, ValueError) as error:
        reason = f"rank {world.rank}: {error}"

    for found in world.every(reason):
        if found:
            raise UserError(f"{what} ({found}); {remedy}")


def checkpoints(folder: str | Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(meta.parent for meta in Path(folder).glob(f"{_NAME}/{META}"))


def newest_checkpoint(folder: str | Path) -> tuple[Path | None, list[Path]]:
    """The newest complete checkpoint, and the folders after it that are none; rank 0 alone calls.

    What killed saves left is deleted.

    Raises:
        UserError: there are checkpoints, and none is complete; one that is not complete, in whose
            place another will be written, holds something else; `folder` is no folder.
    """
    folder = Path(folder)
    check_own_folder(folder)
    clear_in(folder)
    for left in folder.glob(f".{_NAME}.tmp"):
        _remove(left)

    newest = max(checkpoints(folder), default=None)
    incomplete = [
        path for path in sorted(folder.glob(_NAME)) if newest is None or path.name > newest.name
    ]
    if incomplete and newest is None:
        raise UserError(
            f"{incomplete[-1]}: no {META} in it, and no other checkpoint is complete, so the run "
            f"cannot go on; delete {folder} to begin it again, or train into another folder"
        )
    for path in incomplete:
        check_own_folder(path)
        check_out_folder(path, _foreign)
    return newest, incomplete


def _foreign(folder: Path) -> str | None:
    """The name of something in a folder that no checkpoint has, if there is one."""
    stored = {name for name in os.listdir(folder) if _STORED.fullmatch(name)}
    return other_than(folder, stored | {DRAFT, META, METADATA})


def _remove(path: Path) -> None:
    """Delete a folder, or a link or file in its place."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path)


_ANOTHER = (
    "set the optimizer back, or begin a new run from an exported draft with "
    "--set train.init=RUN/draft"
)


def _of_another(path: Path, changes: list[Change]) -> str:
    """That a checkpoint's state is another optimizer's, with what of it has changed."""
    said = [change.line() for change in changes if change.name.startswith("optimizer.")]
    since = f", before {'; '.join(said)}" if said else ""
    return f"{path}: holds the state of another optimizer{since}"


def load_checkpoint(
    path: str | Path,
    into: TrainState,
    config: Config,
    data: dict[str, str],
    world: World = World(),  # noqa: B008
    refuse: Callable[[Path, list[Change]], None] = refuse_in_place,
) -> Resumed:
    """Read a checkpoint into the leaves of `into`, shaped and placed as these, whatever ranks it
    was written on.

    `refuse` raises for what may not have changed since: `refuse_in_place` for a run that goes on as
    it began, `changes.refuse_elsewhere` for one that goes on in a new folder.

    Raises:
        UserError: unreadable, of another schema, of a configuration, data, recipe or number of
            threads that `refuse` refuses, of an optimizer that keeps another state, or damaged; on
            every rank.
    """
    path = Path(path)
    meta = read_meta(path)

    # Refuse what would not go on to the same bits.
    changes = changes_since(meta, config, data)
    refuse(path, changes)

    # Compare hashes; each rank takes its share of the files.
    with _together(world, f"{path}: damaged", older(path)):
        for name in sorted(meta["files"].keys() | {METADATA})[world.rank :: world.size]:
            if not (path / name).is_file():
                raise OSError(f"{name} is no file")
            if sha256(path / name) != meta["files"].get(name):
                raise OSError(f"the bytes of {name} have changed")

    # Whole so far: other leaves than the run's are those of another optimizer.
    leaves = _tensors(into)
    with _together(world, f"{path}: not readable", older(path)):
        metadata = read_metadata(path, meta["files"])
    with _together(world, _of_another(path, changes), _ANOTHER):
        check_leaves(metadata, leaves)
    with _together(world, f"{path}: not readable", older(path)):
        read_leaves(path, leaves, metadata, no_dist=world.size == 1)

    # What was saved is finite, and of the step that is named.
    with _together(world, f"{path}: damaged", older(path)):
        floats = {name: leaf for name, leaf in leaves.items() if leaf.is_floating_point()}
        for name, good in zip(floats, finite(local(list(floats.values()))).tolist(), strict=True):
            if not good:
                raise ValueError(f"{name} holds NaN or infinity")
        if int(leaves["step"]) != meta["cursor"]["step"]:
            raise ValueError(f"the state's step is {int(leaves['step'])}, not {META}'s")
    return Resumed(like(into, leaves), meta["extra"], random_state(meta["rng"]), changes)

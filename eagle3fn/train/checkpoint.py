"""Checkpoints: one folder a step, whole or not at all, read back to the same bits on any number of
ranks.

`step-NNNNNNNN/` holds the state as `torch.distributed.checkpoint` writes it (a file a rank), the
draft's parameters once more as `draft.safetensors`, and `meta.json`. All ranks write into one
temporary folder, which rank 0 renames when every file is on the disk.
"""

import base64
import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from eagle3fn.base.config import Config, to_dict
from eagle3fn.base.errors import UserError
from eagle3fn.base.files import publish_folder, sha256, write_json
from eagle3fn.base.tree import like, named_leaves
from eagle3fn.base.types import TrainState
from eagle3fn.train.launch import World
from eagle3fn.train.shard import full_params

SCHEMA = 2
DRAFT = "draft.safetensors"
META = "meta.json"

# Settings that do not touch the bits: a resumed run may change them.
MAY_CHANGE = {"train.checkpoint_every", "train.keep_last", "train.on_nonfinite", "data.prefetch"}
# Settings of older checkpoints: what they are named now, and those that now always have this value.
RENAMED = {"optimizer.horizon": "schedule_steps"}
GONE = {"data.mask_alignment": "serving", "data.order": "shuffled"}

_NAME = re.compile(r"step-(\d{8})")
_ELSEWHERE = "train into another folder"
_OLDER = "delete {} to resume from an older one"


class Resumed(NamedTuple):
    """A checkpoint's state and the small values saved with it."""

    state: TrainState
    extra: dict[str, Any]
    rng: torch.Tensor  # of torch's default generator on rank 0, uint8


def save_checkpoint(
    folder: str | Path,
    state: TrainState,
    config: Config,
    data: dict[str, str],
    extra: dict[str, Any],
    keep: int,
    world: World = World(),  # noqa: B008
) -> Path:
    """Write `folder/step-NNNNNNNN/` and delete all but the `keep` newest; every rank calls it.

    `data` are the hashes of what the run reads, `extra` is what else a resumed run needs, such as
    the best value.

    Raises:
        UserError: not written, such as for want of room; on every rank. The older checkpoints are
            as they were.
    """
    path = Path(folder) / f"step-{int(state.step):08d}"
    temporary = path.with_name(f".{path.name}.tmp")
    remedy = f"the checkpoints before it are whole; make room or mend {folder}, then call again"
    try:
        # One temporary folder, in which every rank writes its file of the state.
        with _together(world, f"{path}: not written", remedy):
            if world.main:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
        with _distributed(f"{path}: not written", remedy):
            state_dict_saver.save(
                _tensors(state), storage_writer=FileSystemWriter(temporary), no_dist=world.size == 1
            )

        # All ranks gather the parameters, and hash what they wrote.
        params = full_params(state.params)
        own = {file.name: sha256(file) for file in temporary.glob(f"__{world.rank}_*")}
        hashes = world.every(own)

        # Rank 0 writes the rest, and makes the folder a checkpoint by renaming it.
        with _together(world, f"{path}: not written", remedy):
            if world.main:
                whole = {name: leaf.detach().cpu().contiguous() for name, leaf in params.items()}
                save_file(whole, temporary / DRAFT)
                files = {name: sha256(temporary / name) for name in (DRAFT, ".metadata")}
                for part in hashes:
                    files |= part
                meta = _meta(state, config, data, extra, files, world)
                write_json(temporary / META, meta | {"digest": digest_of(meta)})
                publish_folder(temporary, path)
                for old in checkpoints(folder)[:-keep]:
                    shutil.rmtree(old)
    finally:
        if world.main:
            shutil.rmtree(temporary, ignore_errors=True)
    return path


def _tensors(state: TrainState) -> dict[str, Any]:
    return {name: leaf.detach() for name, leaf in named_leaves(state).items()}


def _meta(
    state: TrainState,
    config: Config,
    data: dict[str, str],
    extra: Any,
    files: dict[str, str],
    world: World,
) -> dict[str, Any]:
    step = int(state.step)
    return {
        "schema": SCHEMA,
        "cursor": {
            "step": step,
            "samples": step * config.data.global_batch,
            "seed": config.train.seed,
        },
        "config": to_dict(config),
        "data": data,
        "extra": extra,
        "world": world.size,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "rng": base64.b64encode(bytes(torch.get_rng_state().tolist())).decode(),
        "files": files,
    }


@contextmanager
def _together(world: World, what: str, remedy: str) -> Iterator[None]:
    """All ranks leave this block together: a file error on one is raised on all, as a UserError."""
    failed = None
    try:
        yield
    except (OSError, SafetensorError) as error:
        failed = str(error)

    for number, reason in enumerate(world.every(failed)):
        if reason is not None:
            raise UserError(f"{what} (rank {number}: {reason}); {remedy}")


@contextmanager
def _distributed(what: str, remedy: str) -> Iterator[None]:
    """Turn the failure of any rank, which `torch.distributed.checkpoint` raises on all of them,
    into a UserError.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield
    except CheckpointException as error:
        number, (reason, _) = min(error.failures.items())
        raise UserError(f"{what} (rank {number}: {reason}); {remedy}") from None


def checkpoints(folder: str | Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = (path for path in Path(folder).glob("step-*") if _NAME.fullmatch(path.name))
    return sorted(path for path in found if (path / META).exists())


def remove_unfinished(folder: str | Path) -> None:
    """Delete what killed saves left; rank 0 alone."""
    for left in [*Path(folder).glob(".step-*.tmp"), *Path(folder).glob(".step-*.old")]:
        shutil.rmtree(left)


def load_checkpoint(
    path: str | Path,
    into: TrainState,
    config: Config,
    data: dict[str, str],
    world: World = World(),  # noqa: B008
) -> Resumed:
    """Read a checkpoint into the leaves of `into`, shaped and placed as these, whatever ranks it
    was written on.

    Raises:
        UserError: unreadable, of another schema, configuration, data or recipe, of other threads
            under `reduce = "tree"`, or damaged; on every rank.
    """
    path = Path(path)
    meta = _read_meta(path)

    # Refuse what would not go on to the same bits.
    _same_config(_renamed(meta["config"]), to_dict(config), path)
    for name in sorted(data.keys() | meta["data"].keys()):
        if data.get(name) != meta["data"].get(name):
            raise UserError(f"{path}: written for {_other(name, meta, data)}; {_ELSEWHERE}")
    if config.train.reduce == "tree" and meta["threads"] != torch.get_num_threads():
        raise UserError(
            f"{path}: written by ranks of {meta['threads']} threads, these have "
            f"{torch.get_num_threads()}: under train.reduce = 'tree' the bits would differ; set "
            f"OMP_NUM_THREADS={meta['threads']}, or {_ELSEWHERE}"
        )
    _check_files(path, meta["files"], world)

    leaves = _tensors(into)
    with _distributed(f"{path}: not readable", _OLDER.format(path)):
        state_dict_loader.load(
            leaves, storage_reader=FileSystemReader(path), no_dist=world.size == 1
        )
    rng = torch.tensor(list(base64.b64decode(meta["rng"])), dtype=torch.uint8)
    return Resumed(like(into, leaves), meta["extra"], rng)


def _other(name: str, meta: dict[str, Any], data: dict[str, str]) -> str:
    """What differs: a recipe by its names, data by theirs alone, as their values are hashes."""
    if name != "recipe":
        return f"other {name}"
    was, now = meta["data"].get(name, "none"), data.get(name, "none")
    return f"another recipe ({was}, now {now})"


def _renamed(config: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's settings under today's names, without those that now always have the value
    they had. One that is newer than the checkpoint had its default.
    """
    renamed = {section: dict(values) for section, values in config.items()}
    for name, now in RENAMED.items():
        section, key = name.split(".")
        if key in renamed.get(section, {}):
            renamed[section][now] = renamed[section].pop(key)
    for name, value in GONE.items():
        section, key = name.split(".")
        if renamed.get(section, {}).get(key) == value:
            del renamed[section][key]

    for section, kind in get_type_hints(Config).items():
        for field in fields(kind):
            if field.default is not MISSING and field.default is not None:
                renamed[section].setdefault(field.name, field.default)
    return renamed


def read_leaves(path: str | Path) -> dict[str, torch.Tensor]:
    """All leaves of a checkpoint under their names, whole, in this process alone.

    Nothing is compared.
    """
    reader = FileSystemReader(path)
    leaves: dict[str, Any] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    with _distributed(f"{path}: not readable", "name a checkpoint's folder"):
        state_dict_loader.load(leaves, storage_reader=reader, no_dist=True)
    return leaves


def digest_of(meta: dict[str, Any]) -> str:
    """Hash of the contents of `meta.json`, without this hash itself."""
    rest = {name: value for name, value in meta.items() if name != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _read_meta(path: Path) -> dict[str, Any]:
    try:
        meta = json.loads((path / META).read_bytes())
        schema = meta["schema"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: damaged ({META}: {error}); {_OLDER.format(path)}") from None
    if schema != SCHEMA:
        raise UserError(
            f"{path}: a checkpoint of schema {schema!r}, this version reads {SCHEMA}; finish the "
            "run with the version "
            f"that began it, or {_ELSEWHERE}"
        )
    if meta.get("digest") != digest_of(meta):
        raise UserError(
            f"{path}: damaged (the bytes of {META} have changed); {_OLDER.format(path)}"
        )
    return meta


def _check_files(path: Path, files: dict[str, str], world: World) -> None:
    """Compare hashes; each rank takes its share of the files."""
    with _together(world, f"{path}: damaged", _OLDER.format(path)):
        for name in sorted(files)[world.rank :: world.size]:
            if sha256(path / name) != files[name]:
                raise OSError(f"the bytes of {name} have changed")


def _same_config(old: dict, new: dict, path: Path, prefix: str = "") -> None:
    for key in sorted(old.keys() | new.keys()):
        was = old.get(key)
        now = new.get(key)
        if isinstance(was, dict) and isinstance(now, dict):
            _same_config(was, now, path, f"{prefix}{key}.")
            continue

        # JSON has lists for tuples.
        if isinstance(now, tuple):
            now = list(now)
        if was != now and prefix + key in GONE:
            raise UserError(
                f"{path}: a checkpoint of another configuration: {prefix}{key} was {was!r}, a "
                f"setting that is gone; {_ELSEWHERE}"
            )
        if was != now and prefix + key not in MAY_CHANGE:
            raise UserError(
                f"{path}: a checkpoint of another configuration: {prefix}{key} was {was!r}, is "
                f"{now!r}; {_ELSEWHERE}, or set it back"
            )

"""A checkpoint of a tiny state, and changes of its files under matching hashes."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

import eagle3fn as e3
from eagle3fn.base.files import sha256
from eagle3fn.base.types import TrainState
from eagle3fn.train.checkpoint import digest_of, load_checkpoint, save_checkpoint
from tests.factories import make_batch, make_config, make_frozen

DATA = {"features": "a", "vocabulary map": "b"}


class Saved(NamedTuple):
    """A configuration, a state after one step, and its checkpoint."""

    config: e3.Config
    state: TrainState
    path: Path


def make_saved(folder: Path, state: TrainState | None = None) -> Saved:
    """Save the state after one step, or the one given, into `folder`."""
    config = make_config("bfloat16", train={"reduce": "tree"})
    if state is None:
        fns = e3.bind(config, make_frozen(config))
        state, _ = fns.step(fns.init_state(fns.init(0)), make_batch(1, (6, 4)))
    torch.manual_seed(5)
    path = save_checkpoint(folder, state, config, DATA, {"best": 1.5}, keep=2)
    return Saved(config, state, path)


def other_state(config: e3.Config) -> TrainState:
    """A state of the same shapes and other values, to read into."""
    return e3.init_state(e3.init_params(config.draft, 1, torch.bfloat16, "cpu"), config=config)


def load(saved: Saved) -> TrainState:
    """Read the checkpoint."""
    into = other_state(saved.config)
    return load_checkpoint(saved.path, into, saved.config, DATA).state


def rewrite_meta(path: Path, **values: Any) -> None:
    """Change what `meta.json` holds, its digest with it."""
    write_meta(path, read_meta(path) | values)


def read_meta(path: Path) -> dict[str, Any]:
    """What `meta.json` holds."""
    return json.loads((path / "meta.json").read_text())


def write_meta(path: Path, meta: dict[str, Any]) -> None:
    """Write `meta.json` with a matching digest."""
    (path / "meta.json").write_text(json.dumps(meta | {"digest": digest_of(meta)}))


def rewrite_file(path: Path, name: str, content: bytes) -> None:
    """Change a file of the checkpoint, and its hash with it."""
    (path / name).write_bytes(content)
    rewrite_meta(path, files=read_meta(path)["files"] | {name: sha256(path / name)})


def rewrite_metadata(path: Path, change: Callable[[Any], Any]) -> None:
    """Change what torch keeps in `.metadata`, and its hash with it."""
    metadata = pickle.loads((path / ".metadata").read_bytes())
    changed = change(metadata)
    rewrite_file(path, ".metadata", pickle.dumps(metadata if changed is None else changed))

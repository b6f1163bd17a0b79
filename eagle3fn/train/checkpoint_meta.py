"""`meta.json` of a checkpoint: read and checked, its hash and every type."""

import base64
import binascii
from pathlib import Path
from typing import Any

import torch

from eagle3fn.base.errors import UserError, printable
from eagle3fn.base.files import json_sha256
from eagle3fn.base.read import read_object

SCHEMA = 2
META = "meta.json"

# What a resume reads, and of which type.
_TYPES = {
    "cursor": dict,
    "config": dict,
    "data": dict,
    "extra": dict,
    "files": dict,
    "rng": str,
    "threads": int,
    "world": int,
}


def digest_of(meta: dict[str, Any]) -> str:
    """Hash of the contents of `meta.json`, without this hash itself."""
    return json_sha256({name: value for name, value in meta.items() if name != "digest"})


def older(path: Path) -> str:
    """The remedy for a damaged checkpoint."""
    return f"delete {path} to resume from an older one"


def read_meta(path: Path) -> dict[str, Any]:
    """A checkpoint's `meta.json`.

    Raises:
        UserError: missing, damaged, of another schema or with a value of a wrong type.
    """
    try:
        meta = read_object(path / META)
        _check_type("schema", meta.get("schema"), int)
    except ValueError as error:
        raise _damaged(path, error) from None

    if meta["schema"] != SCHEMA:
        raise UserError(
            f"{path}: a checkpoint of schema {meta['schema']}, this version reads {SCHEMA}; finish "
            "the run with the version that began it, or train into another folder"
        )
    if meta.get("digest") != digest_of(meta):
        raise _damaged(path, "its bytes have changed")
    try:
        _check(meta)
    except ValueError as error:
        raise _damaged(path, error) from None
    return meta


def _damaged(path: Path, reason: Any) -> UserError:
    return UserError(f"{path}: damaged ({META}: {reason}); {older(path)}")


def random_state(text: str) -> torch.Tensor:
    """The state of torch's generator, `(N,)` uint8, that `meta.json` holds in base64.

    Raises:
        ValueError: it is none.
    """
    try:
        state = torch.tensor(list(base64.b64decode(text, validate=True)), dtype=torch.uint8)
        torch.Generator().set_state(state)
    except (binascii.Error, RuntimeError, TypeError, ValueError):
        raise ValueError("rng is no state of torch's generator") from None
    return state


def _check(meta: dict[str, Any]) -> None:
    """Refuse a value that is not of its type, and files that lie elsewhere.

    Raises:
        ValueError: names the first one.
    """
    for name, kind in _TYPES.items():
        _check_type(name, meta.get(name), kind)
    for name in ("step", "samples"):
        _check_type(f"cursor.{name}", meta["cursor"].get(name), int)
    for section, values in meta["config"].items():
        _check_type(f"config.{section}", values, dict)
    for name, value in meta["data"].items():
        _check_type(f"data.{name}", value, str)
    held_out = meta["config"].get("data", {}).get("held_out", 0)
    _check_type("config.data.held_out", held_out, int)
    earlier = meta.get("earlier", {})
    _check_type("earlier", earlier, dict)
    for name, value in earlier.items():
        _check_type(f"earlier.{name}", value, int)
    for name, value in meta["files"].items():
        _check_type(f"files.{name}", value, str)
        if name in (".", "..") or not set(name).isdisjoint("/\\\0"):
            raise ValueError(f"files has {printable(name)}, which is no name in the folder")
    random_state(meta["rng"])


def _check_type(name: str, value: Any, kind: type) -> None:
    """Refuse a value of another type; `True` is no number, and no number is below 0."""
    if type(value) is not kind or (kind is int and not 0 <= value < 2**63):
        what = "whole number from 0 on" if kind is int else kind.__name__
        raise ValueError(f"{printable(name)} is {printable(repr(value))}, must be a {what}")

"""What a command made, in a form that two calls on the same files share."""

import hashlib
import io
import json
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from tests.fuzz.tasks import Task

_VOLATILE = {
    # Seconds, and what is chosen or made by them.
    "seconds",
    "speedup",
    "tokens_per_s",
    "plain_tokens_per_s",
    "costs",
    "break_even_accepted_length",
    "speed_draft_length",
    "speed_accepted_length",
    "train_tokens_per_s",
    # The machine's.
    "date",
    "machine",
    "versions",
    # What `hashes` of other files are.
    "digest",
}
_MANY = 1 << 20  # values of a tensor, none of the world's has so many
_LEFT_OUT = (
    *(".lock", "checkpoints", "finished", ".png", "horizon.json", "rejects.jsonl"),
    "target-files.json",  # hashes by absolute paths
    ".moved",  # of `texts.mutate_entry`
)


Result = dict[str, str]
"""Digests by the files' names; of what is printed, by `stdout`."""


def result_of(task: Task, folder: Path, printed: str) -> Result:
    """What a call of `task` in `folder` made: files, or what it printed if it writes none."""
    found = {}
    if not task.writes:
        found["stdout"] = hashlib.sha256(printed.encode()).hexdigest()[:16]
    for name in task.writes:
        top = folder / name
        paths = sorted(top.rglob("*")) if top.is_dir() else [top]
        for path in paths:
            inner = path.relative_to(top)
            if path.is_file() and not any(left in str(inner) for left in _LEFT_OUT):
                found[str(inner) if top.is_dir() else top.name] = _digest(path, folder)
    return found


def _digest(path: Path, folder: Path) -> str:
    """Of a file in a case's folder: of its values where some of it differs from call to call."""
    if path.stat().st_size > 1 << 28:
        return f"{path.stat().st_size} bytes"
    data = path.read_bytes()
    with suppress(ValueError, RecursionError, RuntimeError, AttributeError):
        data = _values(path, data)  # if it can be read, else its bytes
    data = data.replace(str(folder).encode(), b"FOLDER")  # such as the path of the target
    return hashlib.sha256(data).hexdigest()[:16]


def _values(path: Path, data: bytes) -> bytes:
    if path.suffix == ".json":
        data = json.dumps(_stable(json.loads(data)), sort_keys=True).encode()
    elif path.suffix == ".jsonl":
        rows = [_row(line) for line in data.splitlines()]
        data = json.dumps(rows, sort_keys=True).encode()
    elif path.suffix in (".ckpt", ".pt"):
        tree = torch.load(io.BytesIO(data), weights_only=True)
        parts = []
        for name, value in tree.items():
            large = value.numel() > _MANY  # such as one value, expanded
            parts.append((name, value.dtype, value.shape, None if large else value.tolist()))
        data = repr(parts).encode()
    return data


def _row(line: bytes) -> Any:
    try:
        return _stable(json.loads(line))
    except (ValueError, RecursionError):
        return line.decode(errors="backslashreplace")


def _stable(tree: Any) -> Any:
    """A JSON value without what differs from call to call."""
    if isinstance(tree, dict):
        return {key: _stable(value) for key, value in tree.items() if key not in _VOLATILE}
    if isinstance(tree, list):
        return [_stable(value) for value in tree]
    return tree


def unfinite(folder: Path, writes: tuple[str, ...], given: Collection[str] = ()) -> str:
    """The first tensor below `writes` that holds NaN or infinity, by file and name; or "".

    Files of the paths `given` are not results.
    """
    for name in writes:
        top = folder / name
        for path in [top, *sorted(top.rglob("*"))]:
            inner = str(path.relative_to(folder))
            left_out = inner in given or any(left in inner for left in _LEFT_OUT)
            if path.suffix != ".safetensors" or not path.is_file() or left_out:
                continue
            bad = _first_unfinite(path)
            if bad:
                return f"{inner}: {bad:.60}"
    return ""


def _first_unfinite(path: Path) -> str:
    """The first tensor of a file; "" if all are finite, or the file cannot be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                value = file.get_tensor(name)
                if value.is_floating_point() and not torch.isfinite(value.float()).all():
                    return name
    except (SafetensorError, OSError, ValueError):
        return ""
    return ""

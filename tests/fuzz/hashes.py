"""Makes the hashes of a mutated file match, as somebody does who may write the whole folder."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from eagle3fn.base.files import sha256
from eagle3fn.data.feature_index import own_hash
from eagle3fn.train.checkpoint import META, digest_of


def match(path: Path) -> bool:
    """Write a mutated file's hash wherever it is kept; whether there is such a place."""
    if not path.is_file() or path.stat().st_size > 1 << 30:
        return False
    if path.parent.name.startswith("step-"):
        return _match_checkpoint(path)
    if path.name == "samples.safetensors":
        return _match_table(path)
    if path.name.endswith(".safetensors"):
        return _match_shard(path)
    return path.name == "index.json" and _edit(path, _match_index)


def _match_checkpoint(path: Path) -> bool:
    def change(meta: dict[str, Any]) -> None:
        if path.name != META:
            meta["files"][path.name] = sha256(path)
        meta["digest"] = digest_of(meta)

    return _edit(path.parent / META, change)


def _match_shard(path: Path) -> bool:
    entry = {"bytes": path.stat().st_size, "sha256": sha256(path)}

    def change(index: dict[str, Any]) -> None:
        for shard in index["shards"]:
            if shard["file"] == path.name:
                shard.update(entry)
        _match_index(index)

    matched = _edit(path.with_suffix(".json"), lambda sidecar: sidecar.update(entry))
    return _edit(path.parent / "index.json", change) and matched


def _match_table(path: Path) -> bool:
    def change(index: dict[str, Any]) -> None:
        index["table"].update(bytes=path.stat().st_size, sha256=sha256(path))
        _match_index(index)

    return _edit(path.parent / "index.json", change)


def _match_index(index: dict[str, Any]) -> None:
    index["sha256"] = own_hash(index)


def _edit(path: Path, change: Callable[[Any], None]) -> bool:
    """Change a JSON file, if it can still be read."""
    try:
        tree = json.loads(path.read_bytes())
        change(tree)
        text = json.dumps(tree, indent=2)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return False
    path.write_text(text, errors="surrogatepass")
    return True

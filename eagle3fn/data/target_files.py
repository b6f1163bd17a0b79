"""One digest of a target's files: whole weights, tokenizer, chat template, stop tokens.

Two targets of one configuration have different digests where any byte of these files differs. A
hash of gigabytes is kept with the file's size, times and inode, so that it is not computed again.
"""

import os
from pathlib import Path
from typing import Any

from eagle3fn.base.errors import UserError
from eagle3fn.base.files import json_sha256, sha256, write_json
from eagle3fn.base.read import CONFIG_LIMIT, read_json
from eagle3fn.data.stored_config import stored_file
from eagle3fn.data.target import weights_digest
from eagle3fn.data.target_source import weights_folder
from eagle3fn.data.weights import weight_files

KEPT = "target-files.json"
"""Where a feature folder keeps the hashes of its target's files."""

# Beside the weights. config.json has a digest of its own, in which harmless keys do not count.
_NAMES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def target_files(path_or_id: str | Path) -> dict[str, Path]:
    """The files that make a target what it is, by name.

    Raises:
        UserError: no such target, no safetensors, or a damaged index.
    """
    path = Path(path_or_id)
    if path.suffix == ".gguf":
        return {path.name: path}

    found = {}
    for name in _NAMES:
        file = stored_file(path_or_id, name)
        if file is not None:
            found[name] = file
    folder = weights_folder(path_or_id)
    for file in sorted(folder.glob("additional_chat_templates/*.jinja")):
        found[f"{file.parent.name}/{file.name}"] = file
    for name in sorted(set(weight_files(folder).values())):
        found[name] = folder / name
    return found


def target_digest(path_or_id: str | Path, keep: str | Path | None = None) -> str:
    """Hex digest of the names and bytes of a target's files.

    Args:
        path_or_id: the target's folder, GGUF file or id.
        keep: a JSON file that keeps the hash of each file for the next call.

    Raises:
        UserError: as `target_files`; a file is not readable.
    """
    kept = _read_kept(keep)
    hashes = {}
    entries = {}
    for name, file in target_files(path_or_id).items():
        try:
            stamp = _stamp(file)
            entry = kept.get(str(file.absolute()))
            if not isinstance(entry, dict) or entry.get("stamp") != stamp:
                entry = {"stamp": stamp, "sha256": sha256(file)}
        except OSError as error:
            raise UserError(
                f"{file}: not readable ({error.strerror}); fetch the target's files again"
            ) from None
        hashes[name] = entry["sha256"]
        entries[str(file.absolute())] = entry

    if keep is not None and any(kept.get(name) != entry for name, entry in entries.items()):
        write_json(keep, entries)
    return json_sha256(hashes)


def loaded_digest(model: Any, keep: str | Path | None = None) -> str:
    """Hex digest of a model's weights, and of the files that it was loaded from, if there are any.

    `keep`: as in `target_digest`.
    """
    name = str(model.config.name_or_path)
    return json_sha256([weights_digest(model), target_digest(name, keep) if name else None])


def _stamp(file: Path) -> list[int]:
    """What changes when a file does."""
    found = os.stat(file)
    return [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def _read_kept(keep: str | Path | None) -> dict[str, Any]:
    """Hashes by file; none where they cannot be read, as they can be computed again."""
    if keep is None or not os.path.lexists(keep):
        return {}
    try:
        tree = read_json(keep, CONFIG_LIMIT)
    except UserError:
        return {}
    valid = isinstance(tree, dict) and all(
        isinstance(entry, dict) and isinstance(entry.get("sha256"), str) for entry in tree.values()
    )
    return tree if valid else {}

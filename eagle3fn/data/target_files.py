"""One digest of a target's files: whole weights, tokenizer, chat template, stop tokens.

Two targets of one configuration have different digests where any byte of these files differs. A
hash of gigabytes is kept with the file's size, times and inode, so that it is not computed again.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from eagle3fn.base.errors import UserError
from eagle3fn.base.files import json_sha256, sha256, write_json
from eagle3fn.base.places import check_out_file
from eagle3fn.base.read import CONFIG_LIMIT, read_json
from eagle3fn.base.stamps import Stamps, stamp_of
from eagle3fn.data.features import FeatureSet
from eagle3fn.data.stored_config import stored_file
from eagle3fn.data.target import weights_digest
from eagle3fn.data.target_source import model_config_hash, weights_folder
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


class TargetDigests(NamedTuple):
    """Hex digests of names and bytes."""

    files: str  # of all files that make a target what it is
    weights: str  # of its weights alone


def target_files(path_or_id: str | Path) -> dict[str, Path]:
    """The files that make a target what it is, by name, but those of its weights.

    Raises:
        UserError: no such target.
    """
    if Path(path_or_id).suffix == ".gguf":
        return {}
    found = {}
    for name in _NAMES:
        file = stored_file(path_or_id, name)
        if file is not None:
            found[name] = file
    for file in sorted(weights_folder(path_or_id).glob("additional_chat_templates/*.jinja")):
        found[f"{file.parent.name}/{file.name}"] = file
    return found


def weights_of(path_or_id: str | Path) -> dict[str, Path]:
    """The files of a target's weights, by name.

    Raises:
        UserError: no such target, no safetensors, or a damaged index.
    """
    path = Path(path_or_id)
    if path.suffix == ".gguf":
        return {path.name: path}
    folder = weights_folder(path_or_id)
    return {name: folder / name for name in sorted(set(weight_files(folder).values()))}


def target_digests(
    path_or_id: str | Path, keep: str | Path | None = None, write: bool = True
) -> TargetDigests:
    """Digests of a target's files.

    Args:
        path_or_id: the target's folder, GGUF file or id.
        keep: a JSON file that keeps the hash of each file for the next call.
        write: whether `keep` is written; else it is read alone.

    Raises:
        UserError: as `weights_of`; a file is not readable.
    """
    kept = _read_kept(keep)
    entries: dict[str, Any] = {}

    def hashes(files: Mapping[str, Path]) -> dict[str, str]:
        found = {}
        for name, file in files.items():
            entry = _hashed(file, kept.get(str(file.absolute())))
            entries[str(file.absolute())] = entry
            found[name] = entry["sha256"]
        return found

    weights = json_sha256(hashes(weights_of(path_or_id)))
    others = hashes(target_files(path_or_id))
    if keep is not None and write and any(kept.get(file) != entries[file] for file in entries):
        write_json(keep, entries)
    return TargetDigests(json_sha256([weights, others]), weights)


def _hashed(file: Path, kept: Any) -> dict[str, Any]:
    """What changes when a file does, and its hash; the kept one, if nothing has changed.

    That is more than `base.stamps` has: a hash is believed for as long as the folder is there.
    """
    try:
        found = os.stat(file)
    except OSError as error:
        raise _unreadable(file, error) from None
    stamp = [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]
    if isinstance(kept, dict) and kept.get("stamp") == stamp:
        return kept
    return {"stamp": stamp, "sha256": sha256(file)}


def _unreadable(file: Path, error: OSError) -> UserError:
    return UserError(f"{file}: not readable ({error.strerror}); fetch the target's files again")


def target_stamps(path_or_id: str | Path) -> Stamps:
    """Stamps of all files of a target, config.json among them.

    Raises:
        UserError: as `weights_of`; a file is not readable.
    """
    files = {**target_files(path_or_id), **weights_of(path_or_id)}
    config = None if Path(path_or_id).suffix == ".gguf" else stored_file(path_or_id, "config.json")
    if config is not None:
        files["config.json"] = config
    stamps = {}
    for name, file in files.items():
        try:
            stamps[name] = stamp_of(file)
        except OSError as error:
            raise _unreadable(file, error) from None
    return stamps


def check_unchanged(path_or_id: str | Path, stamps: Stamps) -> None:
    """Refuse a target whose files are others than when `target_stamps` gave `stamps`.

    Raises:
        UserError: they are.
    """
    if target_stamps(path_or_id) != stamps:
        raise UserError(
            f"{path_or_id}: the target's files changed while they were read; wait until they are "
            "written, and call again"
        )


def check_weights_of(features: FeatureSet, path_or_id: str | Path) -> None:
    """Refuse features that were made with other weights than a target has now.

    Hashes that the feature folder keeps are used. Folders of earlier versions have no digest of the
    weights, and pass.

    Raises:
        UserError: another digest; or as `target_digests`.
    """
    made_with = features.index.get("target", {}).get("weights")
    if made_with is None:
        return
    if made_with != target_digests(path_or_id, features.folder / KEPT, write=False).weights:
        raise UserError(
            f"{features.folder / 'index.json'}: made with other weights than {path_or_id} has "
            "now; name the target that they were made with, or run eagle3fn extract again into "
            "another folder"
        )


def loaded_digest(model: Any, keep: str | Path | None = None) -> str:
    """Hex digest of a model's weights and configuration, and of its files, if there are any.

    `keep`: as in `target_digests`.
    """
    name = str(model.config.name_or_path)
    files = target_digests(name, keep).files if name else None
    return json_sha256([weights_digest(model), model_config_hash(model), files])


def check_kept(keep: str | Path) -> None:
    """Refuse a place for hashes that holds something else.

    Raises:
        UserError: as `check_out_file`; or what is there are no hashes.
    """
    check_out_file(keep)
    if os.path.lexists(keep) and not _read_kept(keep):
        raise UserError(
            f"{keep}: is there, and does not hold hashes of a target's files, which would replace "
            "it; move it, or name another file"
        )


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

"""Where a target's files are, what its configuration says, and digests of it.

transformers is imported here inside functions, never when the file is loaded.
"""

from pathlib import Path
from typing import Any

from eagle3fn.base.draft_keys import refuse_vision
from eagle3fn.base.errors import UserError
from eagle3fn.base.files import json_sha256
from eagle3fn.data.stored_config import VOLATILE, check_name, stored_config
from eagle3fn.data.teacher_check import architecture, check_architecture

_REMEDY = "fetch the target's files again or choose another target"
_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers")


# Its files


def source_of(path_or_id: str | Path) -> tuple[str, dict[str, str]]:
    """What transformers loads from: a folder or id, and for a GGUF file the option that names it.

    The option is empty for whatever is no GGUF file.

    Raises:
        UserError: the GGUF file or the folder is missing, or the folder has no config.json.
    """
    path = Path(path_or_id)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(
                f"{path}: no such file; name a GGUF file, a model folder or a Hugging Face id"
            )
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir() and not (path / "config.json").is_file():
        raise UserError(
            f"{path}: no config.json there; name a folder that holds a Hugging Face model, or an id"
        )
    check_name(path_or_id)
    return str(path_or_id), {}


def weights_folder(path_or_id: str | Path) -> Path:
    """The folder of the safetensors files; those of an id are downloaded, or taken from the cache.

    Raises:
        UserError: not reachable.
    """
    if Path(path_or_id).is_dir():
        return Path(path_or_id)
    check_name(path_or_id)
    from huggingface_hub import snapshot_download

    # Some repositories hold the same weights once more, in folders or under other names.
    patterns = ["config.json", "*.safetensors", "*.safetensors.index.json"]
    others = ["*/*", "consolidated*"]
    try:
        return Path(
            snapshot_download(str(path_or_id), allow_patterns=patterns, ignore_patterns=others)
        )
    except (OSError, ValueError) as error:
        raise not_loadable(path_or_id, error) from None


def not_loadable(path_or_id: str | Path, error: BaseException) -> UserError:
    """The refusal of a target that transformers refuses."""
    if "trust_remote_code" in str(error):
        return UserError(
            f"{path_or_id}: brings code of its own, which is never run; choose a target of a type "
            "that transformers has"
        )

    # The first line of the message, and the second where the first only announces it.
    lines = str(error).strip().splitlines() or [type(error).__name__]
    count = 2 if lines[0].endswith(":") else 1
    reason = " ".join(line.strip() for line in lines[:count])[:300]
    return UserError(
        f"{path_or_id}: not loadable as a target ({reason}); "
        "name a folder with config.json, tokenizer and safetensors, a GGUF file, "
        "or a Hugging Face id that is reachable or in the cache"
    )


def no_fit(path_or_id: str | Path, what: str) -> UserError:
    """The refusal of a target whose files do not fit each other; `what` says how."""
    return UserError(f"{path_or_id}: {what}; {_REMEDY}")


# Its configuration


def target_config(path_or_id: str | Path) -> dict[str, Any]:
    """The target's configuration as a dict, with the library's defaults.

    Raises:
        UserError: not loadable, a vision-language model, or one without the sizes that are read.
    """
    return loaded_config(path_or_id).to_dict()


def loaded_config(path_or_id: str | Path) -> Any:
    """The target's configuration as transformers' object.

    Raises:
        UserError: as `target_config`.
    """
    from eagle3fn.data.target_loading import load_config

    config = load_config(path_or_id)
    tree = config.to_dict()
    where = config_file(path_or_id)
    refuse_vision(tree, where)
    for key in _SIZES:
        if type(tree.get(key)) is not int:
            raise UserError(
                f"{where}: model_type {config.model_type!r}: no {key} in its configuration; "
                "such targets are not supported, choose another"
            )
    return config


def config_file(path_or_id: str | Path) -> str:
    """The file of a target's configuration, for errors; an id or a GGUF file by itself."""
    path = Path(path_or_id)
    return str(path / "config.json" if path.is_dir() else path_or_id)


def check_supported(path_or_id: str | Path) -> None:
    """Refuse a target whose logits are more than `last_hidden @ head.T`, by its architecture alone.

    Its weights are not read.

    Raises:
        UserError: as `target_config`; names the model type and how far the logits are off.
    """
    config = loaded_config(path_or_id)
    where = config_file(path_or_id)
    check_architecture(architecture(config, where), where)


def known_hidden_size(path_or_id: str | Path) -> int | None:
    """The target's hidden size, Ht; None where a folder holds the tokenizer alone."""
    return _known(path_or_id, "hidden_size")


def known_positions(path_or_id: str | Path) -> int | None:
    """The target's limit of tokens; None where its files do not say it."""
    return _known(path_or_id, "max_position_embeddings")


def _known(path_or_id: str | Path, key: str) -> int | None:
    """A size in the target's files, of its text part too; None if it is not there."""
    tree = stored_config(path_or_id)
    text = tree.get("text_config")
    size = tree.get(key, text.get(key) if isinstance(text, dict) else None)
    return size if isinstance(size, int) else None


# Digests of it


def config_hash(path_or_id: str | Path) -> str:
    """Hex digest of what the target's config.json, or its GGUF file, says.

    Without its path, dtype and library version. The library's defaults are not in it, so it stays
    the same when transformers is upgraded.

    Raises:
        UserError: damaged, or there is none.
    """
    tree = stored_config(path_or_id)
    if not tree:
        raise UserError(f"{path_or_id}: no config.json; {_REMEDY}")
    return json_sha256(tree)


def config_hashes(path_or_id: str | Path) -> tuple[str, str]:
    """`config_hash`, and the kind of digest that earlier versions wrote.

    Features and maps of either belong to the target. The earlier kind is of the configuration with
    the defaults of the library that is installed.

    Raises:
        UserError: as `target_config` and `config_hash`.
    """
    return config_hash(path_or_id), _loaded_hash(target_config(path_or_id))


def model_config_hash(model: Any) -> str:
    """`config_hash` of the files that a model was loaded from.

    Of its configuration as loaded, where it comes from no files.
    """
    name = str(model.config.name_or_path)
    try:
        tree = stored_config(name) if name else {}
    except UserError:
        tree = {}
    return json_sha256(tree) if tree else _loaded_hash(model.config.to_dict())


def _loaded_hash(tree: dict[str, Any]) -> str:
    stable = {key: value for key, value in tree.items() if key not in VOLATILE}
    return json_sha256(stable, default=str)

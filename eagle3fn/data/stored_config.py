"""What a target's own files say of its configuration, without the library's defaults.

transformers is imported here inside functions, never when the file is loaded.
"""

import os
import struct
from pathlib import Path
from typing import IO, Any

from eagle3fn.base.errors import UserError
from eagle3fn.base.read import CONFIG_LIMIT, open_regular, read_json

_REMEDY = "fetch the target's files again"
# Keys that two copies of one target may differ in.
VOLATILE = (
    "_commit_hash",
    "_name_or_path",
    "name_or_path",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "use_cache",
)


def stored_config(path_or_id: str | Path) -> dict[str, Any]:
    """What config.json says, or a GGUF file of its model; empty if there is neither.

    Without `VOLATILE`, at any depth.

    Raises:
        UserError: damaged, or not an id.
    """
    if Path(path_or_id).suffix == ".gguf":
        return gguf_config(Path(path_or_id))
    return _stable(stored_json(path_or_id, "config.json"))


def _stable(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _stable(value) for key, value in tree.items() if key not in VOLATILE}
    if isinstance(tree, list):
        return [_stable(value) for value in tree]
    return tree


def stored_json(path_or_id: str | Path, name: str) -> dict[str, Any]:
    """A JSON object of a folder or an id; empty if there is no such file.

    Raises:
        UserError: damaged, or not an id.
    """
    file = stored_file(path_or_id, name)
    if file is None:
        return {}
    tree = read_json(file, CONFIG_LIMIT, nan=True)
    if not isinstance(tree, dict):
        raise UserError(f"{file}: not a JSON object; {_REMEDY}")
    return tree


def stored_file(path_or_id: str | Path, name: str) -> Path | None:
    """A file of a folder or an id; None if there is no such file.

    Raises:
        UserError: not an id.
    """
    path = Path(path_or_id)
    if not path.is_dir():
        found = _cached(str(path_or_id), name)
        return None if found is None else Path(found)
    return path / name if os.path.lexists(path / name) else None


def check_name(path_or_id: str | Path) -> None:
    """Refuse a name that is no folder here and can be no Hugging Face id, before the hub is asked.

    An id is `NAME` or `OWNER/NAME`. What begins as a path does, has more slashes, or lies in a
    folder that is here is a path with a typing error.

    Raises:
        UserError: there is no such folder.
    """
    name = str(path_or_id)
    path = Path(path_or_id)
    in_a_folder = "/" in name and path.parent.is_dir()
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or in_a_folder
    if is_path and not path.is_dir():
        raise UserError(
            f"{name}: no such folder; name a model folder, a GGUF file or a Hugging Face id"
        )


def _cached(name: str, file: str) -> str | None:
    """A file of a Hugging Face id, downloaded or from the cache."""
    check_name(name)
    from transformers.utils.hub import cached_file

    # Without a connection the cache may lack a file that the id does not have at all.
    silent: dict[str, Any] = {
        "_raise_exceptions_for_missing_entries": False,
        "_raise_exceptions_for_connection_errors": False,
    }
    try:
        return cached_file(name, file, **silent)
    except (OSError, ValueError) as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{name}: no folder, and not reachable as a Hugging Face id ({line[:200]}); "
            "name a folder, a GGUF file or an id"
        ) from None


# GGUF: a header of typed keys and values before the tensors, as the page gguf.md of
# https://github.com/ggml-org/ggml describes it.

GGUF_DAMAGED = (OSError, ValueError, KeyError, TypeError, struct.error, RecursionError)
"""What reading a damaged header raises."""

_NUMBERS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_TEXT, _LIST = 8, 9
_LONGEST_LIST = 4096  # longer ones are the tokenizer's


def gguf_config(path: Path) -> dict[str, Any]:
    """What a GGUF file says of its model: the keys of its architecture, sizes and stop token.

    `vocab_size` is the number of the tokenizer's tokens.

    Raises:
        UserError: missing or damaged.
    """
    try:
        with open_regular(path) as file:
            if file.read(4) != b"GGUF" or _number(file, "<I") < 2:
                raise ValueError("not a GGUF file of version 2 or later")
            _number(file, "<Q")  # tensors
            values = dict(_pair(file) for _ in range(_number(file, "<Q")))
    except GGUF_DAMAGED as error:
        raise UserError(f"{path}: missing or damaged ({error}); {_REMEDY}") from None

    kind = values.get("general.architecture")
    found = {key: value for key, value in values.items() if key.startswith(f"{kind}.")}
    found["architecture"] = kind
    tokens = values.get("tokenizer.ggml.tokens", [])
    found["vocab_size"] = tokens if isinstance(tokens, int) else len(tokens)
    found["eos_token_id"] = values.get("tokenizer.ggml.eos_token_id")
    return found


def _number(file: IO[bytes], form: str) -> Any:
    return struct.unpack(form, file.read(struct.calcsize(form)))[0]


def _string(file: IO[bytes]) -> str:
    length = _number(file, "<Q")
    if length > os.fstat(file.fileno()).st_size:
        raise ValueError("it ends in its header")
    data = file.read(length)
    if len(data) < length:
        raise ValueError("it ends in its header")
    return data.decode("utf-8", "replace")


def _pair(file: IO[bytes]) -> tuple[str, Any]:
    key = _string(file)
    return key, _value(file, _number(file, "<I"))


def _value(file: IO[bytes], kind: int) -> Any:
    """A value; of a long list, its length."""
    if kind == _TEXT:
        return _string(file)
    if kind != _LIST:
        return _number(file, _NUMBERS[kind])

    inner = _number(file, "<I")
    count = _number(file, "<Q")
    values = [_value(file, inner) for _ in range(count)]
    return values if count <= _LONGEST_LIST else count

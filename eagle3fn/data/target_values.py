"""What a target's JSON files may say: values that the library would hang, fail or abort on."""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from eagle3fn.base.errors import UserError, printable
from eagle3fn.base.read import LIMIT, open_regular, read_object
from eagle3fn.data.stored_config import gguf_config, stored_file, stored_json

_REMEDY = "fetch the target's files again, or mend it"
_LARGEST = 2**63 - 1  # a whole number that the library can hand to torch

_SIZES = {
    "num_hidden_layers": 4096,
    "hidden_size": 2**20,
    "intermediate_size": 2**24,
    "num_attention_heads": 2**16,
    "num_key_value_heads": 2**16,
    "head_dim": 2**16,
    "vocab_size": 2**24,
    "max_position_embeddings": 2**40,
}
"""The largest value of each size, where it is a whole number; the smallest is 1.

Far above those in use: a model is built, without weights, before anything else is found wrong.
"""
_BASES = ("rope_theta", "rope_local_base_freq")
_EPSILONS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon")
_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "num_experts_per_tok")
_MOST_EXPERTS = 2**16

_PREFIX = re.compile(rb'"continuing_subword_prefix"\s*:\s*"[^"]')
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


def check_config(path_or_id: str | Path) -> None:
    """Refuse a config.json whose model has code of its own, no possible number, or an adapter.

    Raises:
        UserError: names the file and the value.
    """
    adapter = stored_file(path_or_id, "adapter_config.json")
    if adapter is not None:
        raise UserError(
            f"{adapter}: an adapter lies next to the weights, which are read without it; merge it "
            "into them (peft: merge_and_unload) and name the merged folder, or take it out"
        )
    where, tree = _object(path_or_id, "config.json")
    kind = tree.get("model_type")
    if "auto_map" in tree and not _is_known(kind):
        raise UserError(
            f"{where}: model_type {printable(repr(kind))} brings code of its own (auto_map), which "
            "is never run; choose a target of a type that transformers has"
        )
    for name, value in _values(tree):
        if type(value) is int and abs(value) > _LARGEST:
            raise UserError(f"{where}: {name} = {value:.3g}: larger than any size; {_REMEDY}")
        _check_number(where, name, value)
    for part in ("", "text_config"):
        sizes = tree.get(part) if part else tree
        _check_sizes(sizes if isinstance(sizes, dict) else {}, where)
    if tree.get("is_encoder_decoder"):
        raise UserError(
            f"{where}: model_type {printable(repr(kind))} is an encoder with a decoder; such "
            "targets are not supported, choose a causal language model"
        )
    _check_tokens(tree, where)


def _check_number(where: str, name: str, value: Any) -> None:
    """Refuse a base of RoPE or an epsilon that gives no numbers, at whatever depth it is."""
    last = name.rpartition(".")[2]
    if type(value) not in (int, float):
        return
    if last in _BASES and not 0 < value < math.inf:
        raise UserError(f"{where}: {name} = {value}: must be a number above 0; {_REMEDY}")
    if last in _EPSILONS and not 0 <= value <= 1:
        raise UserError(f"{where}: {name} = {value}: must be in [0, 1]; {_REMEDY}")


def _is_known(kind: Any) -> bool:
    from transformers import CONFIG_MAPPING

    return isinstance(kind, str) and kind in CONFIG_MAPPING


def _check_sizes(tree: dict[str, Any], where: str) -> None:
    bounds = {name: (1, largest) for name, largest in _SIZES.items()}
    bounds |= dict.fromkeys(_COUNTS, (0, _MOST_EXPERTS))
    for name, (least, largest) in bounds.items():
        value = tree.get(name)
        if type(value) is int and not least <= value <= largest:
            raise UserError(
                f"{where}: {name} = {value:.6g}: must be in [{least}, {largest}]; {_REMEDY}"
            )


def check_generation(path_or_id: str | Path) -> None:
    """Refuse a generation_config.json whose tokens are no ids.

    Raises:
        UserError: names the file and the value.
    """
    where, tree = _object(path_or_id, "generation_config.json")
    _check_tokens(tree, where)


def _check_tokens(tree: dict[str, Any], where: str) -> None:
    """Each must be an id, -1 for none, or a list of ids, or null."""
    for name in _TOKENS:
        value = tree.get(name)
        many = value if name == "eos_token_id" and isinstance(value, list) else [value]
        for one in many:
            if one is not None and not (type(one) is int and -1 <= one < 2**31):
                raise UserError(
                    f"{where}: {name} = {printable(repr(value))}: must be a token id"
                    f"{', or a list of them' if name == 'eos_token_id' else ''}; {_REMEDY}"
                )


def check_tokenizer(path_or_id: str | Path) -> None:
    """Refuse a tokenizer.json that the library cannot read without aborting the process.

    Raises:
        UserError: names the file and the value.
    """
    file = stored_file(path_or_id, "tokenizer.json")
    if file is None:
        return
    with open_regular(file) as opened:
        if not _PREFIX.search(opened.read(LIMIT)):
            return

    # The library cuts the prefix off the second part of each merge, whatever that part is.
    model = read_object(file, nan=True).get("model")
    model = model if isinstance(model, dict) else {}
    prefix, merges = model.get("continuing_subword_prefix"), model.get("merges")
    if not isinstance(prefix, str):
        return
    for merge in merges if isinstance(merges, list) else []:
        parts = merge.split(" ") if isinstance(merge, str) else merge
        second = parts[1] if isinstance(parts, list) and len(parts) == 2 else ""
        if not (isinstance(second, str) and second.startswith(prefix)):
            raise UserError(
                f"{file}: model.continuing_subword_prefix = {printable(repr(prefix))}: the merge "
                f"{printable(repr(merge))} has no such part; {_REMEDY}"
            )


# Stop tokens


def stored_stops(path_or_id: str | Path) -> set[int]:
    """The stop tokens of generation_config.json, or of config.json where it names none.

    Raises:
        UserError: damaged, not an id, or tokens that are no ids.
    """
    if Path(path_or_id).suffix == ".gguf":
        return token_ids(gguf_config(Path(path_or_id)).get("eos_token_id"))

    check_generation(path_or_id)
    found = token_ids(stored_json(path_or_id, "generation_config.json").get("eos_token_id"))
    if found:
        return found
    tree = stored_json(path_or_id, "config.json")
    text = tree.get("text_config")
    inner = text if isinstance(text, dict) else {}
    for part in (tree, inner):
        _check_tokens(part, str(stored_file(path_or_id, "config.json")))
    return token_ids(tree.get("eos_token_id", inner.get("eos_token_id")))


def token_ids(value: Any) -> set[int]:
    """`eos_token_id` as a set: of one id, of a list of them, or of none."""
    values = value if isinstance(value, (list, tuple)) else [value]
    return {one for one in values if type(one) is int and one >= 0}


# Reading


def _object(path_or_id: str | Path, name: str) -> tuple[str, dict[str, Any]]:
    """A JSON object of a folder or id, and its file; empty if there is no such file."""
    file = stored_file(path_or_id, name)
    return (name, {}) if file is None else (str(file), stored_json(path_or_id, name))


def _values(tree: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """All values of a JSON tree that hold no others, with their names."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _values(value, f"{name}.{printable(key)}" if name else printable(key))
    elif isinstance(tree, list):
        for value in tree:
            yield from _values(value, name)
    else:
        yield name, tree

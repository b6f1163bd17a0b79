"""EAGLE-3 drafts of other trainers, read into ours: by origin, as names and keys differ.

| origin | known by |
|---|---|
| speculators | `speculators_model_type` in config.json |
| eagle (SafeAILab) | `draft_vocab_size`, and `architectures` without "Eagle3" |
| hf | "Eagle3" in `architectures`: published for vLLM or SGLang, SpecForge's and our own exports |
| specforge | said with `--from`: its files look as those of hf |

What is read is the very same function: where taps or draft tokens are not in ascending order, the
projection's columns or the head's rows move with them.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eagle3fn.base.draft_keys import draft_config_from_keys, is_qwen3, listed_taps, taps_keys
from eagle3fn.base.errors import UserError, printable, shown
from eagle3fn.base.read import CONFIG_LIMIT, read_object
from eagle3fn.base.rope_settings import rope_of, scaling_of, theta_of
from eagle3fn.base.switches import read_switches
from eagle3fn.model.table import FC, HEAD, TAPS_NORM, tap_norm
from eagle3fn.train.drafts import (
    Draft,
    check_finite,
    config_of_draft,
    make_draft,
    own_name,
)
from eagle3fn.train.weight_files import read_weights

ORIGINS = ("specforge", "eagle", "speculators", "hf")
_PREFIX = "model."  # some files have it before the names
_OF_THE_TARGET = ("verifier_lm_head.weight", "verifier_norm.weight")  # as speculators keeps them
_LATER_NORM = re.compile(r"(layers\.[1-9]\d*)\.hidden_norm\.weight")  # SGLang's name
_EAGLE_BASE = 10_000.0


class Imported(NamedTuple):
    """A draft of another trainer."""

    draft: Draft  # in the file's widest dtype
    origin: str
    dtype: torch.dtype
    changes: list[str]  # what was put into another order, as sentences


def read_foreign(folder: str | Path, origin: str | None = None) -> Imported:
    """Read a draft's folder, whoever wrote it.

    `origin` is one of `ORIGINS`, None: known by its keys.

    Raises:
        UserError: not an EAGLE-3 draft of these layouts, a switch that is not built is on, or a
            tensor that is missing, unknown or of the wrong shape; it names file and remedy.
    """
    folder = Path(folder)
    path = config_of_draft(folder)
    tree = read_object(path, CONFIG_LIMIT)
    found = _origin_of(tree, path)
    if origin and (origin == "speculators") != (found == "speculators"):
        raise UserError(f"{path}: looks as one of {found}, not of {origin}; leave --from out")
    said = origin or found

    tree = _flat(tree, path)
    tensors, file = read_weights(folder)
    tensors = _own_names(tensors, file)
    check_finite(tensors, file)
    tree = _with_biases_as_read(tree, tensors)
    tree = read_switches(tree, str(path), origin or ("" if found == "hf" else found))
    _check_rope(tree, path, said)

    # One dtype, in which every value of the file is kept.
    floats = [value.dtype for value in tensors.values() if value.is_floating_point()]
    if not floats:
        raise UserError(f"{file}: holds no weights; name a draft's folder")
    dtype = floats[0]
    for other in floats[1:]:
        dtype = torch.promote_types(dtype, other)
    tensors = {
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in tensors.items()
    }

    # Taps and draft tokens in ascending order.
    changes: list[str] = []
    tree = _sort_taps(tree, tensors, path, changes)
    _sort_tokens(tensors, changes)
    config = draft_config_from_keys(tree, str(path))
    return Imported(make_draft(config, tensors, file, dtype), said, dtype, changes)


def _origin_of(tree: dict[str, Any], path: Path) -> str:
    """Whose layout a configuration has."""
    kind = tree.get("speculators_model_type")
    if kind is not None:
        if kind != "eagle3":
            raise UserError(
                f"{path}: speculators_model_type = {shown(kind)}: another algorithm; "
                "name an eagle3 one"
            )
        return "speculators"
    names = tree.get("architectures") or []
    if not isinstance(names, list):
        raise UserError(
            f"{path}: architectures = {shown(names)}: must be a list; mend a copy of it"
        )
    if any("Eagle3" in str(name) for name in names):
        return "hf"
    if "draft_vocab_size" in tree:
        return "eagle"
    raise UserError(
        f"{path}: architectures = {shown(names)} and no draft_vocab_size: not an EAGLE-3 draft; "
        "name a folder of SpecForge, EAGLE, speculators, or one published for vLLM or SGLang"
    )


def _flat(tree: dict[str, Any], path: Path) -> dict[str, Any]:
    """The keys as an export has them; speculators keeps those of the layer apart."""
    layer = tree.get("transformer_layer_config")
    if (layer is not None or "speculators_model_type" in tree) and not isinstance(layer, dict):
        raise UserError(
            f"{path}: transformer_layer_config = {shown(layer)}: must be an object; mend it"
        )
    own = {key: value for key, value in tree.items() if value is not None}
    flat = {**(layer or {}), **own} if isinstance(layer, dict) else own

    # Qwen3's layer is Llama's with norms of queries and keys.
    kind = (layer or flat).get("model_type", "llama")
    if kind not in ("llama", "eagle", "qwen3"):
        raise UserError(
            f"{path}: model_type = {shown(kind)}: its layer is another one, llama's and qwen3's "
            "are built; choose a draft with one of these"
        )
    qk_norm = is_qwen3(tree) if layer is None else kind == "qwen3"
    return flat | {"qk_norm": qk_norm, "architectures": ["LlamaForCausalLMEagle3"]}


def _own_names(tensors: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
    """Tensors by our names; copies of the target's are left out."""
    named = {}
    for name, value in tensors.items():
        short = own_name(name.removeprefix(_PREFIX))
        short = _LATER_NORM.sub(r"\1.input_layernorm.weight", short)
        if short in named:
            raise UserError(
                f"{file}: holds {printable(short)} under two names, {printable(name)} is one; "
                "remove one"
            )
        if short not in _OF_THE_TARGET:
            named[short] = value
    return named


def _with_biases_as_read(tree: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The configuration with a switch of biases off where all of them are zero, which change
    nothing. Where some of attention's are not, one that is missing is zero: Qwen3's after it.
    """
    for key, part in (("attention_bias", ".self_attn."), ("mlp_bias", ".mlp.")):
        biases = [name for name in tensors if part in name and name.endswith(".bias")]
        if not biases:
            continue
        if not any(bool(tensors[name].any()) for name in biases):
            for name in biases:
                del tensors[name]
            tree = tree | {key: False}
        elif key == "attention_bias":
            for name in [name for name in tensors if name.endswith(".o_proj.weight")]:
                bias = name.removesuffix("weight") + "bias"
                tensors.setdefault(bias, tensors[name].new_zeros(len(tensors[name])))
    return tree


def _check_rope(tree: dict[str, Any], path: Path, origin: str) -> None:
    """Refuse a rotation that is not computed here."""
    try:
        scaling = scaling_of(tree) or {}
        base = theta_of(tree)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if not isinstance(scaling, dict):
        raise UserError(
            f"{path}: rope_scaling = {shown(scaling)}: must be an object; mend a copy of it"
        )
    for where in (tree, rope_of(tree), scaling):
        part = where.get("partial_rotary_factor")
        if part not in (None, 1, 1.0):
            raise UserError(
                f"{path}: partial_rotary_factor = {shown(part)}: a part of each head is rotated, "
                "here all of it is; choose a draft without it, and for an older export of "
                "eagle3fn's own, which was trained with all, take the key out of its config.json"
            )
    if origin == "eagle" and scaling and base != _EAGLE_BASE:
        raise UserError(
            f"{path}: rope_theta = {shown(base)} with rope_scaling: EAGLE then rotates by base "
            f"{_EAGLE_BASE:g} whatever is written; write that into a copy of the file"
        )


def _sort_taps(
    tree: dict[str, Any], tensors: dict[str, Tensor], path: Path, changes: list[str]
) -> dict[str, Any]:
    """Taps in ascending order: the projection's blocks of columns and the norms move with them."""
    try:
        taps = listed_taps(tree)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if taps is None or list(taps) == sorted(taps) or len(set(taps)) < len(taps):
        return tree  # none, in order, or refused by the configuration

    order = sorted(range(len(taps)), key=lambda i: taps[i])
    for name in (FC, TAPS_NORM):
        if name in tensors:
            blocks = tensors[name].chunk(len(taps), dim=-1)
            tensors[name] = torch.cat([blocks[i] for i in order], dim=-1)
    norms = [tap_norm(tap) for tap in range(len(taps))]
    if all(name in tensors for name in norms):
        moved = [tensors[norms[i]] for i in order]
        tensors.update(zip(norms, moved, strict=True))
    changes.append(f"taps {list(taps)} are sorted, and the columns of {FC} with them")
    return tree | taps_keys(tuple(sorted(taps)))


def _sort_tokens(tensors: dict[str, Tensor], changes: list[str]) -> None:
    """Draft tokens in the order of their ids: the head's rows are permuted with them."""
    d2t = tensors.get("d2t")
    head = tensors.get(HEAD)
    if d2t is None or head is None or d2t.ndim != 1 or head.shape[:1] != d2t.shape:
        return
    place = torch.arange(len(d2t))
    ids = d2t.long() + place
    order = ids.argsort()
    if torch.equal(order, place) or len(ids.unique()) < len(ids):
        return
    tensors[HEAD] = head[order]
    tensors["d2t"] = ids[order] - place
    changes.append(f"draft tokens are sorted by their ids, and the rows of {HEAD} with them")

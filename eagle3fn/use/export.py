"""A trained draft as the folder that serving engines load."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from eagle3fn.base.draft_config import DraftConfig
from eagle3fn.base.draft_json import draft_config_from_json
from eagle3fn.base.draft_keys import draft_config_to_json, taps_keys
from eagle3fn.base.errors import UserError
from eagle3fn.base.files import whole_folder
from eagle3fn.base.places import anything, check_out_folder, other_than
from eagle3fn.base.read import read_object
from eagle3fn.base.types import Frozen, Params
from eagle3fn.model import table
from eagle3fn.model.table import EMBED, check_params
from eagle3fn.train.drafts import (
    CONFIG,
    LAYER,
    LAYER_BY_NUMBER,
    WEIGHTS,
    Draft,
    check_finite,
    load_draft,
)
from eagle3fn.use.engine_limits import EAGLE, Engine, check_representable, lacking
from eagle3fn.use.layouts import speculators_keys
from eagle3fn.use.model_card import CARD, Facts, card, is_ours

__all__ = [
    "CONFIG",
    "WEIGHTS",
    "Draft",
    "check_out_draft",
    "export",
    "export_for",
    "foreign_in",
    "load_draft",
]


def check_out_draft(folder: str | Path) -> None:
    """Refuse a place for a draft before work: one that holds anything but an export of ours.

    Raises:
        UserError: names what is there.
    """
    check_out_folder(folder, foreign_in)


def foreign_in(folder: Path) -> str | None:
    """The name of something in a folder that is no part of a draft exported here, if there is one.

    A draft is known by its model card, or by a configuration that is, key by key, what is written
    here: the first versions wrote no card.
    """
    other = other_than(folder, (CONFIG, WEIGHTS, CARD))
    if other is None and not is_ours(folder) and not _is_written_here(folder / CONFIG):
        other = anything(folder)
    return other


def _is_written_here(path: Path) -> bool:
    """Whether a configuration is the one that is written for the draft which it describes.

    The taps are not compared: the first versions left default ones out.
    """
    try:
        tree = read_object(path)
        config = replace(draft_config_from_json(path), aux_layers=(0, 1, 2))
    except UserError:
        return False
    written = draft_config_to_json(config, 3, str(tree.get("dtype")))
    taps = taps_keys((0, 1, 2)).keys()
    without = [{key: keys[key] for key in keys.keys() - taps} for keys in (tree, written)]
    return without[0] == without[1]


def export(
    params: Params,
    frozen: Frozen,
    config: DraftConfig,
    folder: str | Path,
    target_layers: int,
    dtype: torch.dtype,
    any_rope: bool = False,
    facts: Facts = Facts(),  # noqa: B008
) -> None:
    """Write `config.json`, `model.safetensors` and a model card into `folder`, whole or not at all.

    Args:
        params: the draft's tensors under their exported names.
        frozen: its `embed_tokens` (if any) and vocabulary map are written, the head is not.
        config: the draft's shape.
        folder: replaced if it is an older export.
        target_layers: the target's number of decoder layers, which the default taps depend on.
        dtype: of the floating-point tensors written.
        any_rope: also write RoPE variants that the EAGLE repository's loader rejects, for engines
            that support them.
        facts: what the card says of target and training.

    Raises:
        UserError: parameters that are not this configuration's, a RoPE variant that not every
            engine loads, or a folder that holds something else.
    """
    check_params(params, config, "export")
    _check_rope(config, any_rope)
    check_out_draft(folder)
    tree = draft_config_to_json(config, target_layers, str(dtype).removeprefix("torch."))

    tensors = _tensors(params, frozen, config, dtype)
    text = card(tree, facts, lacking(config, target_layers))
    _write(Path(folder), tree, tensors, text)


def export_for(
    draft: Draft,
    engine: Engine,
    folder: str | Path,
    target_layers: int,
    dtype: torch.dtype,
    target: str = "",
    architectures: tuple[str, ...] = (),
    facts: Facts = Facts(),  # noqa: B008
) -> None:
    """Write a draft as one engine reads it, whole or not at all.

    Args:
        draft: as `load_draft` returns it.
        engine: a row of `use.engine_limits.ENGINES`.
        folder: replaced if it is an older export.
        target_layers: the target's number of decoder layers.
        dtype: of the floating-point tensors written.
        target: the target's folder or hub id, as it is served; for engines whose layout names it.
        architectures: the target's, for the same.
        facts: what the card says of target and training.

    Raises:
        UserError: what the engine cannot represent, or a folder that holds something else.
    """
    check_representable(draft.config, target_layers, engine)
    check_out_draft(folder)
    tree = draft_config_to_json(draft.config, target_layers, str(dtype).removeprefix("torch."))
    frozen = Frozen(draft.embed_tokens, torch.empty(0), *draft.vocab)
    tensors = _tensors(draft.params, frozen, draft.config, dtype)

    # What differs from an export: names and keys of speculators' layout, EAGLE's form of scaling.
    if engine.by_number:
        tree |= speculators_keys(tree, target, list(architectures))
        tensors = {_by_number(name): value for name, value in tensors.items()}
    if engine.later_norm:
        for layer in table.layers(draft.config)[1:]:
            name = layer.input_norm.replace("input_layernorm", engine.later_norm)
            tensors[name] = tensors.pop(layer.input_norm)
    if engine is EAGLE and tree["rope_scaling"]:
        scaling = tree["rope_scaling"]
        tree["rope_scaling"] = {
            "type": draft.config.rope_type,
            "factor": float(scaling["factor"]),
        }
    text = card(tree, facts, lacking(draft.config, target_layers))
    _write(Path(folder), tree, tensors, text)


def _by_number(name: str) -> str:
    if name.startswith(LAYER):
        return LAYER_BY_NUMBER + name.removeprefix(LAYER)
    return name


def _tensors(
    params: Params, frozen: Frozen, config: DraftConfig, dtype: torch.dtype
) -> dict[str, Tensor]:
    """What is written, by name, on the CPU."""
    tensors = {name: value.to(dtype) for name, value in params.items()}
    if frozen.embed_tokens is not None and EMBED not in tensors:
        tensors[EMBED] = frozen.embed_tokens.to(dtype)

    # A full vocabulary needs no map.
    if config.draft_vocab_size != config.vocab_size:
        tensors["d2t"] = frozen.d2t.to(torch.int64)
        tensors["t2d"] = frozen.t2d.to(torch.bool)

    # safetensors refuses tensors that share memory or are not contiguous, so each is copied.
    copies = {}
    for name, value in tensors.items():
        copies[name] = value.detach().to("cpu").clone(memory_format=torch.contiguous_format)
    check_finite(copies, "export")
    return copies


def _write(folder: Path, tree: dict[str, Any], tensors: dict[str, Tensor], text: str) -> None:
    with whole_folder(folder, foreign_in) as temporary:
        save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
        (temporary / CONFIG).write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
        (temporary / CARD).write_text(text, encoding="utf-8")


def _check_rope(config: DraftConfig, any_rope: bool) -> None:
    if config.rope_type not in EAGLE.ropes and not any_rope:
        raise UserError(
            f"draft.rope_scaling type {config.rope_type!r}: the EAGLE repository's loader accepts "
            f"only {', '.join(EAGLE.ropes)}; "
            f"export with any_rope=True for engines that support {config.rope_type}"
        )

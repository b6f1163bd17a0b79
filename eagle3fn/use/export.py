"""A trained draft as the folder that serving engines load."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from eagle3fn.base.draft_config import DraftConfig, draft_config_to_json
from eagle3fn.base.errors import UserError
from eagle3fn.base.files import whole_folder
from eagle3fn.base.types import Frozen, Params
from eagle3fn.model.table import EMBED, check_params
from eagle3fn.train.drafts import (
    CONFIG,
    LAYER,
    LAYER_BY_NUMBER,
    WEIGHTS,
    Draft,
    load_draft,
)
from eagle3fn.use.engine_limits import EAGLE, Engine, check_representable
from eagle3fn.use.layouts import speculators_keys
from eagle3fn.use.model_card import CARD, Facts, card

__all__ = ["CONFIG", "WEIGHTS", "Draft", "export", "export_for", "load_draft"]


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
    _check_folder(Path(folder))
    tree = draft_config_to_json(config, target_layers, str(dtype).removeprefix("torch."))

    tensors = _tensors(params, frozen, config, dtype)
    _write(Path(folder), tree, tensors, card(tree, facts))


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
    _check_folder(Path(folder))
    tree = draft_config_to_json(draft.config, target_layers, str(dtype).removeprefix("torch."))
    frozen = Frozen(draft.embed_tokens, torch.empty(0), *draft.vocab)
    tensors = _tensors(draft.params, frozen, draft.config, dtype)

    # What differs from an export: names and keys of speculators' layout, EAGLE's form of scaling.
    if engine.by_number:
        tree |= speculators_keys(tree, target, list(architectures))
        tensors = {_by_number(name): value for name, value in tensors.items()}
    if engine is EAGLE and tree["rope_scaling"]:
        scaling = tree["rope_scaling"]
        tree["rope_scaling"] = {
            "type": draft.config.rope_type,
            "factor": float(scaling["factor"]),
        }
    _write(Path(folder), tree, tensors, card(tree, facts))


def _by_number(name: str) -> str:
    if name.startswith(LAYER):
        return LAYER_BY_NUMBER + name.removeprefix(LAYER)
    return name


def _tensors(
    params: Params, frozen: Frozen, config: DraftConfig, dtype: torch.dtype
) -> dict[str, Tensor]:
    """What is written, by name, on the CPU."""
    tensors = {name: value.to(dtype) for name, value in params.items()}
    if frozen.embed_tokens is not None:
        tensors[EMBED] = frozen.embed_tokens.to(dtype)

    # A full vocabulary needs no map.
    if config.draft_vocab_size != config.vocab_size:
        tensors["d2t"] = frozen.d2t.to(torch.int64)
        tensors["t2d"] = frozen.t2d.to(torch.bool)

    # safetensors refuses tensors that share memory or are not contiguous, so each is copied.
    copies = {}
    for name, value in tensors.items():
        copies[name] = value.detach().to("cpu").clone(memory_format=torch.contiguous_format)
    return copies


def _write(folder: Path, tree: dict[str, Any], tensors: dict[str, Tensor], text: str) -> None:
    with whole_folder(folder) as temporary:
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


def _check_folder(folder: Path) -> None:
    """Refuse to replace anything but an older export."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; name a folder")
    files = {file.name for file in folder.iterdir()} if folder.is_dir() else set()
    others = sorted(files - {CONFIG, WEIGHTS, CARD})
    if others or (files and not _is_export(folder / CONFIG)):
        named = f" ({others[0]})" if others else ""
        raise UserError(
            f"{folder}: holds files that are not an exported draft{named}; name a new folder"
        )


def _is_export(config: Path) -> bool:
    """Whether a configuration is a draft's: a target's folder has files of the same names."""
    try:
        tree = json.loads(config.read_text(encoding="utf-8"))
        return any("Eagle3" in str(name) for name in tree["architectures"])
    except (OSError, ValueError, KeyError, TypeError):
        return False

"""A trained draft as the directory that serving engines load, and back."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from eagle3fn.base.draft_config import DraftConfig, aux_layers, draft_config_from_json
from eagle3fn.base.errors import UserError
from eagle3fn.base.files import read_json, whole_folder
from eagle3fn.base.types import Frozen, Params, VocabMap
from eagle3fn.data.vocab import check_map
from eagle3fn.model.table import EMBED, check_params, shapes

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
_LAYER_IDS = "eagle_aux_hidden_state_layer_ids"
_EVERYWHERE = ("default", "linear", "dynamic")


class Draft(NamedTuple):
    """A draft ready to speak. `embed_tokens` None: its own is among `params`, or the target's is taken."""

    config: DraftConfig
    params: Params
    vocab: VocabMap
    embed_tokens: Tensor | None  # (V, H)


def export(
    params: Params,
    frozen: Frozen,
    config: DraftConfig,
    folder: str | Path,
    target_layers: int,
    dtype: torch.dtype,
    any_rope: bool = False,
) -> None:
    """Write `config.json` and `model.safetensors` into `folder`, whole or not at all.

    Args:
        params: the draft's tensors under their exported names.
        frozen: its `embed_tokens` (if any) and vocabulary map are shipped, the target's head is not.
        config: the draft's shape.
        folder: replaced if it is an older export.
        target_layers: the target's number of decoder layers, which says what the default taps are.
        dtype: of the floating-point tensors written.
        any_rope: also write RoPE variants that the EAGLE repository's loader rejects, for engines that know them.

    Raises:
        UserError: parameters that are not this configuration's, a RoPE variant not every engine loads, or a folder
            that holds something else.
    """
    check_params(params, config, "export")
    _check_rope(config, any_rope)
    _check_folder(Path(folder))
    tree = _config_json(config, target_layers, dtype)
    tensors = {name: value.to(dtype) for name, value in params.items()}
    if frozen.embed_tokens is not None:
        tensors[EMBED] = frozen.embed_tokens.to(dtype)
    if config.draft_vocab_size != config.vocab_size:
        tensors |= {"d2t": frozen.d2t.to(torch.int64), "t2d": frozen.t2d.to(torch.bool)}
    plain = {
        name: value.detach().to("cpu").clone(memory_format=torch.contiguous_format)
        for name, value in tensors.items()
    }
    with whole_folder(folder) as temporary:
        save_file(plain, temporary / WEIGHTS, metadata={"format": "pt"})
        (temporary / CONFIG).write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
        for file in temporary.iterdir():
            file.chmod(0o644)


def _check_rope(config: DraftConfig, any_rope: bool) -> None:
    if config.rope_type not in _EVERYWHERE and not any_rope:
        raise UserError(
            f"draft.rope_scaling type {config.rope_type!r}: the EAGLE repository's loader knows only "
            f"{', '.join(_EVERYWHERE)}; export with any_rope=True for engines that know {config.rope_type}"
        )


def _check_folder(folder: Path) -> None:
    if folder.is_dir() and any(folder.iterdir()) and not (folder / CONFIG).is_file():
        raise UserError(f"{folder}: holds files that are not an exported draft; name a new folder")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; name a folder")


def _config_json(config: DraftConfig, target_layers: int, dtype: torch.dtype) -> dict[str, Any]:
    scaling = config.rope_scaling if config.rope_type != "default" else None
    kind = str(dtype).removeprefix("torch.")
    tree: dict[str, Any] = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "draft_vocab_size": config.draft_vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta}
        | (scaling or {})
        | {"rope_type": config.rope_type, "rope_theta": config.rope_theta},
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "initializer_range": config.initializer_range,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "dtype": kind,
        "torch_dtype": kind,
    }
    if config.target_hidden_size != config.hidden_size:
        tree["target_hidden_size"] = config.target_hidden_size
    layers = aux_layers(config, target_layers)
    if layers != _default_layers(config, target_layers):
        tree["eagle_config"] = {_LAYER_IDS: list(layers), "use_aux_hidden_state": True}
        tree[_LAYER_IDS] = [layer + 1 for layer in layers]
    return tree


def _default_layers(config: DraftConfig, target_layers: int) -> tuple[int, int, int] | None:
    """What engines tap unless told otherwise; None where the target is too shallow for that."""
    try:
        return aux_layers(replace(config, aux_layers=None), target_layers)
    except UserError:
        return None


def load_draft(folder: str | Path, dtype: torch.dtype, device: str = "cpu") -> Draft:
    """Read an exported directory: `(config, params, vocabulary map, embed_tokens or None)`.

    Raises:
        UserError: a file is missing or damaged, a tensor is missing, unknown or of the wrong shape; it names the file.
    """
    folder = Path(folder)
    config = _read_config(folder / CONFIG)
    file = folder / WEIGHTS
    try:
        tensors = load_file(file)
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; name a folder written by export") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: damaged or not a file ({error}); export it anew") from None
    vocab = _read_map({name: tensors.pop(name, None) for name in ("t2d", "d2t")}, config, file)
    embed = None if EMBED in shapes(config) else tensors.pop(EMBED, None)
    params = {name: tensors.pop(name) for name in shapes(config) if name in tensors} | tensors
    if embed is not None and tuple(embed.shape) != (config.vocab_size, config.hidden_size):
        raise UserError(
            f"{file}: {EMBED} has shape {tuple(embed.shape)}, {CONFIG} says {(config.vocab_size, config.hidden_size)}"
        )
    check_params(params, config, str(file))
    moved = {name: value.to(device, dtype) for name, value in params.items()}
    vocab = VocabMap(vocab.t2d.to(device), vocab.d2t.to(device))
    return Draft(config, moved, vocab, None if embed is None else embed.to(device, dtype))


def _read_config(file: Path) -> DraftConfig:
    try:
        config, tree = draft_config_from_json(file), read_json(file)
    except OSError as error:
        raise UserError(
            f"{file}: not readable ({error}); name a folder written by export"
        ) from None
    inputs = _layer_ids(tree, file)
    if inputs is None:
        return config
    outputs = tuple(layer - 1 for layer in inputs)
    if config.aux_layers not in (None, outputs):
        raise UserError(
            f"{file}: {_LAYER_IDS} = {inputs} must be one above eagle_config's "
            f"{list(config.aux_layers or ())}; mend the one that is wrong"
        )
    return replace(config, aux_layers=outputs)


def _layer_ids(tree: dict[str, Any], file: Path) -> list[int] | None:
    ids = tree.get(_LAYER_IDS)
    if ids is not None and not (
        isinstance(ids, list) and all(type(one) is int for one in ids) and len(ids) == 3
    ):
        raise UserError(f"{file}: {_LAYER_IDS} = {ids}: must be a list of three integers; mend it")
    return ids


def _read_map(found: dict[str, Tensor | None], config: DraftConfig, file: Path) -> VocabMap:
    v, d = config.vocab_size, config.draft_vocab_size
    t2d, d2t = found["t2d"], found["d2t"]
    if d2t is None and d != v:
        raise UserError(
            f"{file}: d2t is missing, and the draft vocabulary ({d}) is not the target's ({v})"
        )
    offset = torch.zeros(v, dtype=torch.int64) if d2t is None else d2t.to(torch.int64)
    if offset.ndim != 1:
        raise UserError(
            f"{file}: d2t has shape {tuple(offset.shape)}, {CONFIG} says {(d,)}; export it anew"
        )
    ids = offset + torch.arange(len(offset))
    if t2d is None:
        t2d = torch.zeros(v, dtype=torch.bool)
        t2d[ids.clamp(0, v - 1)] = True
    vocab = VocabMap(t2d.to(torch.bool), offset)
    check_map(vocab, v, d, str(file))
    return vocab

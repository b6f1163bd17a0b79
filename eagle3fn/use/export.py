"""A trained draft as the folder that serving engines load, written and read back."""

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
_ROPE_EVERYWHERE = ("default", "linear", "dynamic")  # what the EAGLE repository's loader accepts


class Draft(NamedTuple):
    """A draft ready for decoding.

    `embed_tokens` is None where the draft trains its own, which is among `params`, and where the
    target's is to be used.
    """

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
        frozen: its `embed_tokens` (if any) and vocabulary map are written, the head is not.
        config: the draft's shape.
        folder: replaced if it is an older export.
        target_layers: the target's number of decoder layers, which the default taps depend on.
        dtype: of the floating-point tensors written.
        any_rope: also write RoPE variants that the EAGLE repository's loader rejects, for engines
            that support them.

    Raises:
        UserError: parameters that are not this configuration's, a RoPE variant that not every
            engine loads, or a folder that holds something else.
    """
    check_params(params, config, "export")
    _check_rope(config, any_rope)
    _check_folder(Path(folder))
    tree = _config_json(config, target_layers, dtype)

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

    with whole_folder(folder) as temporary:
        save_file(copies, temporary / WEIGHTS, metadata={"format": "pt"})
        (temporary / CONFIG).write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
        for file in temporary.iterdir():
            file.chmod(0o644)


def _check_rope(config: DraftConfig, any_rope: bool) -> None:
    if config.rope_type not in _ROPE_EVERYWHERE and not any_rope:
        raise UserError(
            f"draft.rope_scaling type {config.rope_type!r}: the EAGLE repository's loader accepts "
            f"only {', '.join(_ROPE_EVERYWHERE)}; "
            f"export with any_rope=True for engines that support {config.rope_type}"
        )


def _check_folder(folder: Path) -> None:
    if folder.is_dir() and any(folder.iterdir()) and not (folder / CONFIG).is_file():
        raise UserError(f"{folder}: holds files that are not an exported draft; name a new folder")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; name a folder")


def _config_json(config: DraftConfig, target_layers: int, dtype: torch.dtype) -> dict[str, Any]:
    """The content of `config.json`: a Llama configuration of one layer with EAGLE-3's keys."""
    # RoPE under the newer key and the two older ones; scaling holds the variant's own values.
    scaling = config.rope_scaling if config.rope_type != "default" else None
    rope: dict[str, Any] = {"rope_type": config.rope_type, "rope_theta": config.rope_theta}
    for key, value in (scaling or {}).items():
        rope.setdefault(key, value)

    dtype_name = str(dtype).removeprefix("torch.")
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
        "rope_parameters": rope,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "initializer_range": config.initializer_range,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "dtype": dtype_name,
        "torch_dtype": dtype_name,
    }
    if config.target_hidden_size != config.hidden_size:
        tree["target_hidden_size"] = config.target_hidden_size

    # Engines differ in where they read the taps: under eagle_config as indices of layers whose
    # outputs are taken, at the top as indices of layers whose inputs are taken, one higher.
    layers = aux_layers(config, target_layers)
    if layers != _default_layers(config, target_layers):
        tree["eagle_config"] = {_LAYER_IDS: list(layers), "use_aux_hidden_state": True}
        tree[_LAYER_IDS] = [layer + 1 for layer in layers]
    return tree


def _default_layers(config: DraftConfig, target_layers: int) -> tuple[int, int, int] | None:
    """The layers that engines tap by default; None where the target is too shallow for these."""
    try:
        return aux_layers(replace(config, aux_layers=None), target_layers)
    except UserError:
        return None


def load_draft(folder: str | Path, dtype: torch.dtype, device: str = "cpu") -> Draft:
    """Read an exported folder; floating-point tensors come in `dtype` on `device`.

    Raises:
        UserError: a file is missing or damaged, a tensor is missing, unknown or of the wrong shape;
            it names the file.
    """
    folder = Path(folder)
    config = _read_config(folder / CONFIG)
    file = folder / WEIGHTS
    tensors = _read_tensors(file)

    # Take the map and the shipped embedding out; a draft that trains its own has it as parameter.
    vocab = _vocab_map(tensors.pop("t2d", None), tensors.pop("d2t", None), config, file)
    embed = None
    if EMBED not in shapes(config):
        embed = tensors.pop(EMBED, None)
    embed_shape = (config.vocab_size, config.hidden_size)
    if embed is not None and tuple(embed.shape) != embed_shape:
        raise UserError(
            f"{file}: {EMBED} has shape {tuple(embed.shape)}, {CONFIG} gives {embed_shape}"
        )

    # The parameters, in the table's order. Tensors left over are unknown, and refused by name.
    params = {}
    for name in shapes(config):
        if name in tensors:
            params[name] = tensors.pop(name)
    params.update(tensors)
    check_params(params, config, str(file))

    return Draft(
        config=config,
        params={name: value.to(device, dtype) for name, value in params.items()},
        vocab=VocabMap(vocab.t2d.to(device), vocab.d2t.to(device)),
        embed_tokens=None if embed is None else embed.to(device, dtype),
    )


def _read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; name a folder written by export") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: damaged or not a file ({error}); export it anew") from None


def _read_config(file: Path) -> DraftConfig:
    try:
        config = draft_config_from_json(file)
        tree = read_json(file)
    except OSError as error:
        raise UserError(
            f"{file}: not readable ({error}); name a folder written by export"
        ) from None

    # Taps at the top are indices of layers whose inputs are taken: one above the outputs'.
    inputs = _input_layers(tree, file)
    if inputs is None:
        return config
    outputs = tuple(layer - 1 for layer in inputs)
    if config.aux_layers not in (None, outputs):
        raise UserError(
            f"{file}: {_LAYER_IDS} = {inputs} must be one above eagle_config's "
            f"{list(config.aux_layers or ())}; mend the one that is wrong"
        )
    return replace(config, aux_layers=outputs)


def _input_layers(tree: dict[str, Any], file: Path) -> list[int] | None:
    found = tree.get(_LAYER_IDS)
    if found is None:
        return None
    integers = isinstance(found, list) and all(type(layer) is int for layer in found)
    if not integers or len(found) != 3:
        raise UserError(
            f"{file}: {_LAYER_IDS} = {found}: must be a list of three integers; mend it"
        )
    return found


def _vocab_map(t2d: Tensor | None, d2t: Tensor | None, config: DraftConfig, file: Path) -> VocabMap:
    """The checked vocabulary map; what the file leaves out is filled in."""
    vocab_size = config.vocab_size
    draft_size = config.draft_vocab_size

    # No offsets: the draft has the target's whole vocabulary.
    if d2t is None:
        if draft_size != vocab_size:
            raise UserError(
                f"{file}: d2t is missing, and the draft vocabulary ({draft_size}) "
                f"is not the target's ({vocab_size})"
            )
        d2t = torch.zeros(vocab_size, dtype=torch.int64)
    d2t = d2t.to(torch.int64)
    if d2t.ndim != 1:
        raise UserError(
            f"{file}: d2t has shape {tuple(d2t.shape)}, {CONFIG} gives {(draft_size,)}; "
            "export it anew"
        )

    # No set: it is that of the ids in d2t. Ids out of range are clamped here and refused below.
    if t2d is None:
        ids = d2t + torch.arange(len(d2t))
        t2d = torch.zeros(vocab_size, dtype=torch.bool)
        t2d[ids.clamp(0, vocab_size - 1)] = True

    vocab = VocabMap(t2d.to(torch.bool), d2t)
    check_map(vocab, vocab_size, draft_size, str(file))
    return vocab

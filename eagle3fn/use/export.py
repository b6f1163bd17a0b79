"""A trained draft as the folder that serving engines load, written and read back."""

import json
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from eagle3fn.base.draft_config import (
    DraftConfig,
    draft_config_from_json,
    draft_config_to_json,
)
from eagle3fn.base.errors import UserError
from eagle3fn.base.files import whole_folder
from eagle3fn.base.types import Frozen, Params, VocabMap
from eagle3fn.data.vocab import check_map
from eagle3fn.model.table import EMBED, check_params, shapes

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
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
    tree = draft_config_to_json(config, target_layers, str(dtype).removeprefix("torch."))

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


def load_draft(folder: str | Path, dtype: torch.dtype, device: str = "cpu") -> Draft:
    """Read an exported folder; floating-point tensors come in `dtype` on `device`.

    Raises:
        UserError: a file is missing or damaged, a tensor is missing, unknown or of the wrong shape;
            it names the file.
    """
    folder = Path(folder)
    config = draft_config_from_json(folder / CONFIG)
    file = folder / WEIGHTS
    tensors = _read_tensors(file)

    # Take the map and the shipped embedding out; a draft that trains its own has it as parameter.
    vocab = _vocab_map(tensors.pop("t2d", None), tensors.pop("d2t", None), config, file)
    embed = None if config.own_embedding else tensors.pop(EMBED, None)
    embed_shape = (config.vocab_size, config.hidden_size)
    if embed is not None and tuple(embed.shape) != embed_shape:
        raise UserError(
            f"{file}: {EMBED} has shape {tuple(embed.shape)}, {CONFIG} gives {embed_shape}"
        )

    # The parameters, in the table's order. Tensors left over are unknown, and refused by name.
    known = {name: tensors[name] for name in shapes(config) if name in tensors}
    params = known | tensors
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

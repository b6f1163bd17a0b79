"""A draft's folder read back."""

import os
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from eagle3fn.base.draft_config import DraftConfig
from eagle3fn.base.draft_json import draft_config_from_json
from eagle3fn.base.errors import UserError, printable, shown
from eagle3fn.base.read import open_regular, read_object
from eagle3fn.base.temporary import clear
from eagle3fn.base.types import Params, VocabMap
from eagle3fn.data.vocab import check_map
from eagle3fn.model.table import EMBED, check_params, shapes

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
LAYER = "midlayer."  # the prefix of the layer's weights
LAYER_BY_NUMBER = "layers.0."  # the same in speculators' layout
_IN_A_RUN = ("draft", "train/draft")  # where a run's folder, or the one above it, has its draft


class Draft(NamedTuple):
    """A draft ready for decoding.

    `embed_tokens` is None where the draft trains its own, which is among `params`, and where the
    target's is to be used.
    """

    config: DraftConfig
    params: Params
    vocab: VocabMap
    embed_tokens: Tensor | None  # (V, H)


def config_of_draft(folder: str | Path) -> Path:
    """The `config.json` of a draft's folder.

    Raises:
        UserError: the folder has none, but is a run's, whose draft lies below it; names that.
    """
    path = Path(folder) / CONFIG
    for name in _IN_A_RUN:
        draft = Path(folder) / name
        if not os.path.lexists(path) and (draft / CONFIG).is_file():
            raise UserError(f"{path}: no such file; {folder} is a run's folder: name its {draft}")
    return path


def load_draft(folder: str | Path, dtype: torch.dtype, device: str = "cpu") -> Draft:
    """Read an exported folder; floating-point tensors come in `dtype` on `device`.

    Raises:
        UserError: a file is missing or damaged, a tensor is missing, unknown, of the wrong shape or
            not finite, or a switch that is not built is on; it names the file.
    """
    folder = Path(folder)
    clear(folder)  # a kill while it was replaced: the one before comes back
    config = draft_config_from_json(config_of_draft(folder))
    file = folder / WEIGHTS
    return make_draft(config, _read_tensors(file), file, dtype, device)


def make_draft(
    config: DraftConfig,
    tensors: dict[str, Tensor],
    file: Path,
    dtype: torch.dtype,
    device: str = "cpu",
) -> Draft:
    """A draft of a file's tensors, checked.

    Args:
        config: the draft's shape.
        tensors: by the names of an export, or of speculators' layout.
        file: names them in errors.
        dtype: of the floating-point tensors.
        device: where all of them go.

    Raises:
        UserError: a tensor is missing, unknown, of the wrong shape or not finite.
    """
    check_finite(tensors, file)
    tensors = {own_name(name): value for name, value in tensors.items()}

    # Take the map and the shipped embedding out; a draft that trains its own has it as parameter.
    t2d = tensors.pop("t2d", None)
    d2t = tensors.pop("d2t", None)
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
    vocab = _vocab_map(t2d, d2t, config, file)

    return Draft(
        config=config,
        params={name: value.to(device, dtype) for name, value in params.items()},
        vocab=VocabMap(vocab.t2d.to(device), vocab.d2t.to(device)),
        embed_tokens=None if embed is None else embed.to(device, dtype),
    )


def check_finite(tensors: dict[str, Tensor], file: str | Path) -> None:
    """Refuse weights that are no numbers to compute with.

    Raises:
        UserError: names the tensor.
    """
    for name, value in tensors.items():
        if value.is_complex() or value.is_quantized or value.layout != torch.strided:
            raise UserError(f"{file}: {printable(name)} is no dense tensor of real numbers")
        if not value.is_floating_point():
            continue
        if name in ("d2t", "t2d"):
            raise UserError(f"{file}: {name} is {value.dtype}; must be whole numbers, or booleans")
        if value.dtype.itemsize < 2:
            raise UserError(
                f"{file}: {printable(name)} is {str(value.dtype).removeprefix('torch.')}, of "
                "quantised weights; choose a draft in bfloat16 or float32"
            )
        _check_values(name, value, file)


def check_files_finite(folder: str | Path) -> None:
    """Refuse a draft's folder whose safetensors hold NaN or infinity, in whatever layout they are.

    Raises:
        UserError: names file and tensor; a file is damaged.
    """
    for file in sorted(Path(folder).glob("*.safetensors")):
        for name, value in _read_tensors(file).items():
            if value.is_floating_point() and value.dtype.itemsize >= 2:
                _check_values(name, value, file)


def _check_values(name: str, value: Tensor, file: str | Path) -> None:
    if not value.isfinite().all():
        raise UserError(
            f"{file}: {printable(name)} holds NaN or infinity; fetch or train the draft again"
        )


def own_name(name: str) -> str:
    """A tensor's name in an export, from that or from speculators' layout."""
    if name.startswith(LAYER_BY_NUMBER):
        return LAYER + name.removeprefix(LAYER_BY_NUMBER)
    return name


def _read_tensors(file: Path) -> dict[str, Tensor]:
    open_regular(file).close()
    try:
        return load_file(file)
    except (SafetensorError, OSError, ValueError, TypeError, LookupError, RuntimeError) as error:
        raise UserError(f"{file}: damaged ({printable(error, 200)}); export it anew") from None


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


def stored_dtype(folder: str | Path) -> torch.dtype:
    """The dtype of an exported draft's weights, as its configuration says.

    Raises:
        UserError: it says none.
    """
    path = config_of_draft(folder)
    tree = read_object(path)
    name = tree.get("dtype") or tree.get("torch_dtype")
    dtype = getattr(torch, str(name), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2:
        raise UserError(
            f"{path}: dtype = {shown(name)}: must be one of torch's that a draft computes in, "
            "such as bfloat16"
        )
    return dtype

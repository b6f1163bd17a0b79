"""SpecForge's files: features, one `torch.save` dict a sample in `.ckpt` or `.ckpt.gz`, and vocabulary maps."""

import gzip
import io
import pickle
import struct
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eagle3fn.base.errors import UserError
from eagle3fn.base.types import Sample
from eagle3fn.data import vocab
from eagle3fn.data.features import READER_REMEDY as _REMEDY
from eagle3fn.data.features import Reader

ENDINGS = (".ckpt", ".ckpt.gz")
# What torch.load and its unpickler raise on files that torch.save did not write, text among them.
DAMAGED = (
    *(
        OSError,
        EOFError,
        RuntimeError,
        ValueError,
        LookupError,
        AttributeError,
        TypeError,
        AssertionError,
    ),
    *(ArithmeticError, struct.error, zlib.error, pickle.UnpicklingError),
)


def find_ckpts(folder: str | Path) -> list[Path]:
    """Every feature file under `folder`, at any depth, sorted by path as text: SpecForge's order."""
    found = (
        path for path in Path(folder).rglob("*") if path.name.endswith(ENDINGS) and path.is_file()
    )
    return sorted(found, key=str)


def read_ckpt(path: Path) -> Sample:
    """A file's tensors under our names: `loss_mask` is `token_mask`, `hidden_state` is `last_hidden`, and so on.

    Raises:
        UserError: missing, damaged, not tensors alone, or a field is missing or has a wrong number of axes.
    """
    tree = _load(path)
    ids, mask = _tokens(tree, path)
    return Sample(
        ids, mask, _rows(tree, "aux_hidden_state", path), _rows(tree, "hidden_state", path)
    )


def read_ckpt_tokens(path: Path) -> tuple[Tensor, Tensor]:
    """`input_ids` and `loss_mask` of a file, each `(S,)` int64; an uncompressed file's features are not read."""
    return _tokens(_load(path), path)


def _load(path: Path) -> dict[str, Any]:
    try:
        if path.name.endswith(".gz"):
            data = io.BytesIO(gzip.decompress(path.read_bytes()))
            tree = torch.load(data, map_location="cpu", weights_only=True)
        else:
            tree = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; restore it or open the folder anew") from None
    except DAMAGED as error:
        raise UserError(
            f"{path}: damaged or not a dict of tensors ({reason(error)}); {_REMEDY}"
        ) from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: holds a {type(tree).__name__}, not a dict of tensors; {_REMEDY}")
    return tree


def reason(error: Exception) -> str:
    """One line of an error of `DAMAGED`; what the unpickler says, torch's advice on `weights_only` too, is left out."""
    line = (str(error).splitlines() or [type(error).__name__])[0][:200]
    plain = isinstance(error, (OSError, EOFError, RuntimeError, ValueError, zlib.error))
    return line if plain and "weights_only" not in line else "not tensors stored by torch.save"


def _is_zip(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == b"PK"


def _field(tree: dict[str, Any], key: str, path: Path) -> Tensor:
    if not isinstance(tree.get(key), Tensor):
        raise UserError(f"{path}: no tensor {key}; {_REMEDY}")
    return tree[key]


def _tokens(tree: dict[str, Any], path: Path) -> tuple[Tensor, Tensor]:
    return _field(tree, "input_ids", path).flatten().long(), _field(
        tree, "loss_mask", path
    ).flatten().long()


def _rows(tree: dict[str, Any], key: str, path: Path) -> Tensor:
    value = _field(tree, key, path)
    if value.ndim == 3 and value.shape[0] == 1:
        return value[0]
    if value.ndim != 2:
        raise UserError(
            f"{path}: {key} has shape {tuple(value.shape)}: must be (1, S, size); {_REMEDY}"
        )
    return value


READER = Reader(
    files=" or ".join(ENDINGS), find=find_ckpts, sample=read_ckpt, tokens=read_ckpt_tokens
)
"""Opens SpecForge's folders: `open_features(folder, reader=READER)`."""


def read_map(path: Path) -> vocab.StoredMap:
    """The tensors of a vocabulary map: SpecForge's `torch.save` of `{"d2t", "t2d"}`, or one of ours.

    Raises:
        UserError: missing or damaged.
    """
    try:
        with open(path, "rb") as file:
            if file.read(9)[8:] == b"{":
                return vocab.read_map(path)
        tree = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {vocab.REMEDY}") from None
    except DAMAGED as error:
        raise UserError(
            f"{path}: damaged or not a vocabulary map ({reason(error)}); {vocab.REMEDY}"
        ) from None
    return vocab.StoredMap(tree if isinstance(tree, dict) else {}, provenance={})

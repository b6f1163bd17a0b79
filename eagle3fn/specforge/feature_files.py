"""SpecForge's files, read and written: features and vocabulary maps.

Features are one file a sample, `.ckpt` or `.ckpt.gz`, a dict stored by `torch.save`.
"""

import gzip
import io
import os
import zlib
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from eagle3fn.base.errors import UserError
from eagle3fn.base.files import whole_file
from eagle3fn.base.read import open_regular
from eagle3fn.base.stored_tensors import DAMAGED, load_tensors, tensor_fault
from eagle3fn.base.temporary import UNFINISHED
from eagle3fn.base.types import Sample, VocabMap
from eagle3fn.data import vocab
from eagle3fn.data.features import READER_REMEDY as _REMEDY
from eagle3fn.data.features import Reader

ENDINGS = (".ckpt", ".ckpt.gz")
_MOST_PACKED = 64  # bytes out of one, of a file that gzip made of features
_SMALL = 2**26  # bytes that any file may hold
_READABLE = (OSError, EOFError, RuntimeError, ValueError, zlib.error)  # whose text helps a reader


# Features


def find_ckpts(folder: str | Path) -> list[Path]:
    """Every feature file in `folder`, at any depth, sorted by path as text: SpecForge's order.

    Raises:
        UserError: a link to nothing, folder, pipe or device among them.
    """
    found = []
    for path in Path(folder).rglob("*"):
        if not path.name.endswith(ENDINGS) or path.parent.name.endswith(UNFINISHED):
            continue
        if not path.is_file():
            kind = "no regular file"
            if path.is_dir():
                kind = "a folder"
            elif path.is_symlink():
                kind = "a link to nothing"
            raise UserError(f"{path}: is {kind}; delete it or restore the file")
        found.append(path)
    return sorted(found, key=str)


def read_ckpt(path: Path) -> Sample:
    """A file's tensors under our names.

    `loss_mask` is `token_mask`, `aux_hidden_state` is `aux_hidden`, `hidden_state` is
    `last_hidden`.

    Raises:
        UserError: missing, damaged, not tensors alone, or a field is missing or has a wrong number
            of axes.
    """
    tree = _load(path)
    return Sample(
        input_ids=_tokens(tree, "input_ids", path),
        token_mask=_tokens(tree, "loss_mask", path),
        aux_hidden=_hidden(tree, "aux_hidden_state", path),
        last_hidden=_hidden(tree, "hidden_state", path),
    )


def read_ckpt_tokens(path: Path) -> tuple[Tensor, Tensor]:
    """`input_ids` and `loss_mask` of a file, each `(S,)` int64.

    An uncompressed file's features are not read.

    Raises:
        UserError: as `read_ckpt`, of these two fields.
    """
    tree = _load(path)
    return _tokens(tree, "input_ids", path), _tokens(tree, "loss_mask", path)


def _load(path: Path) -> dict[str, Any]:
    try:
        with open_regular(path) as file:
            if path.name.endswith(".gz"):
                tree = load_tensors(io.BytesIO(_unpacked(file)))
            else:
                tree = load_tensors(file, str(path))
    except UserError as error:
        raise UserError(f"{error}; restore it or open the folder anew") from None
    except DAMAGED as error:
        raise UserError(
            f"{path}: damaged or not a dict of tensors ({_reason(error)}); {_REMEDY}"
        ) from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: holds a {type(tree).__name__}, not a dict of tensors; {_REMEDY}")
    return tree


def _unpacked(file: IO[bytes]) -> bytes:
    """The content of a gzip file; refused where it is much larger than features can be."""
    most = _SMALL + _MOST_PACKED * os.fstat(file.fileno()).st_size
    with gzip.open(file) as unpacked:
        data = unpacked.read(most + 1)
    if len(data) > most:
        raise ValueError(f"unpacks to more than {most} bytes")
    return data


def _reason(error: Exception) -> str:
    """An error's first line, where it helps.

    The unpickler's texts are left out, and torch's advice to set `weights_only`, which would run
    the file's code.
    """
    if isinstance(error, _READABLE):
        lines = str(error).splitlines() or [type(error).__name__]
        if "weights_only" not in lines[0]:
            return lines[0][:200]
    return "not tensors stored by torch.save"


def _field(tree: dict[str, Any], key: str, path: Path) -> Tensor:
    if not isinstance(tree.get(key), Tensor):
        raise UserError(f"{path}: no tensor {key}; {_REMEDY}")
    fault = tensor_fault(tree[key])
    if fault:
        raise UserError(f"{path}: {key} {fault}; {_REMEDY}")
    return tree[key].detach()


def _tokens(tree: dict[str, Any], key: str, path: Path) -> Tensor:
    """`(S,)` int64, from `(S,)` or `(1, S)` of whole numbers."""
    value = _field(tree, key, path).flatten()
    if value.is_floating_point() and not torch.equal(value, value.long().to(value.dtype)):
        raise UserError(f"{path}: {key} is {value.dtype} and holds fractions; {_REMEDY}")
    if value.is_floating_point() and key == "input_ids":
        raise UserError(f"{path}: {key} is {value.dtype}: must be of whole numbers; {_REMEDY}")
    return value.long()


def _hidden(tree: dict[str, Any], key: str, path: Path) -> Tensor:
    """`(S, size)`, from that or `(1, S, size)`."""
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


def write_ckpt(path: Path, sample: Sample) -> None:
    """Write a sample as SpecForge's loader of stored features reads it.

    Ids and mask are `(S,)`, the features `(1, S, size)`.
    """
    tree = {
        "input_ids": sample.input_ids,
        "loss_mask": sample.token_mask,
        "aux_hidden_state": sample.aux_hidden[None],
        "hidden_state": sample.last_hidden[None],
    }
    # A tensor that is a part of a larger one would be stored with all of it.
    _save({name: value.clone() for name, value in tree.items()}, path)


def _save(tree: dict[str, Tensor], path: Path) -> None:
    """Write by `torch.save`, whole or not at all, with the same bytes whatever the file's name."""
    with whole_file(path) as temporary, temporary.open("wb") as file:
        torch.save(tree, file)


# Vocabulary maps


def read_map(path: Path) -> vocab.StoredMap:
    """The tensors of a vocabulary map: SpecForge's, a `torch.save` of `{"d2t", "t2d"}`, or ours.

    `load_map(path, …, read=read_map)` checks what they hold.

    Raises:
        UserError: missing or damaged.
    """
    try:
        with open_regular(path) as file:
            # Ours begin with the length of a JSON object, in eight bytes, and the object.
            is_ours = file.read(9)[8:] == b"{"
            file.seek(0)
            # From the open file: torch chooses another format by a path's ending.
            tree = None if is_ours else load_tensors(file)
    except UserError as error:
        raise UserError(f"{error}; {vocab.REMEDY}") from None
    except DAMAGED as error:
        raise UserError(
            f"{path}: damaged or not a vocabulary map ({_reason(error)}); {vocab.REMEDY}"
        ) from None

    if is_ours:
        return vocab.read_map(path)
    tensors = tree if isinstance(tree, dict) else {}
    for name in VocabMap._fields:
        fault = tensor_fault(tensors[name]) if isinstance(tensors.get(name), Tensor) else None
        if fault:
            raise UserError(f"{path}: {name} {fault}; {vocab.REMEDY}")
    return vocab.StoredMap(tensors, provenance={})


def write_map(path: Path, vocab_map: VocabMap) -> None:
    """Write a map as SpecForge and EAGLE read it from their caches: `{"d2t", "t2d"}`."""
    _save({"d2t": vocab_map.d2t.clone(), "t2d": vocab_map.t2d.clone()}, path)

"""The tensors of a model's folder: safetensors or a plain pickle of tensors, whole or in shards.

A pickle is read with `weights_only`: nothing in it is run.
"""

import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from eagle3fn.base.errors import UserError, printable, shown
from eagle3fn.base.read import open_regular, read_json

_SAFE = "model.safetensors"
_PICKLED = "pytorch_model.bin"
_DAMAGED = (
    OSError,
    EOFError,
    RuntimeError,
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
    struct.error,
    zipfile.BadZipFile,
    pickle.UnpicklingError,
    SafetensorError,
)


def read_weights(folder: Path) -> tuple[dict[str, Tensor], Path]:
    """A folder's tensors by their names on the CPU, and the file that lists or holds them.

    Raises:
        UserError: none of the known files is there, one is damaged or missing, or a name is twice.
    """
    for name, read in ((_SAFE, load_file), (_PICKLED, _unpickled)):
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _shards(folder, index, read), index
        file = folder / name
        if file.is_file():
            return _read(file, read), file
    raise UserError(
        f"{folder}: no {_SAFE} and no {_PICKLED} there, nor an index of either; name a draft's "
        "folder"
    )


def _shards(
    folder: Path, index: Path, read: Callable[[Path], dict[str, Tensor]]
) -> dict[str, Tensor]:
    tree = read_json(index)
    names = tree.get("weight_map") if isinstance(tree, dict) else None
    if not isinstance(names, dict) or not all(isinstance(file, str) for file in names.values()):
        raise UserError(f"{index}: has no weight_map; fetch the draft again")

    tensors: dict[str, Tensor] = {}
    for file in sorted(set(names.values())):
        if Path(file).name != file:
            raise UserError(f"{index}: names {shown(file)}: must be a file of its folder")
        tensors |= _read(folder / file, read)
    missing = sorted(names.keys() - tensors.keys())
    if missing:
        raise UserError(f"{index}: {printable(missing[0])} is in no shard; fetch the draft again")
    return tensors


def _read(file: Path, read: Callable[[Path], dict[str, Tensor]]) -> dict[str, Tensor]:
    open_regular(file).close()
    try:
        return read(file)
    except _DAMAGED as error:
        reason = printable((str(error).splitlines() or [type(error).__name__])[0], 200)
        if "weights_only" in reason:
            reason = "it holds more than tensors"  # torch's advice would run the file's code
        raise UserError(
            f"{file}: damaged or not tensors alone ({reason}); fetch the draft again"
        ) from None


def _unpickled(file: Path) -> dict[str, Any]:
    tree = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(tree, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) and value.layout == torch.strided
        for name, value in tree.items()
    ):
        raise ValueError("not a dict of named, dense tensors")
    return tree

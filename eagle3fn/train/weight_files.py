"""The tensors of a model's folder: safetensors or a plain pickle of tensors, whole or in shards.

Of a pickle only plain tensors are read: nothing in it is run.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from eagle3fn.base.errors import UserError, printable, shown
from eagle3fn.base.read import open_regular, read_json
from eagle3fn.base.stored_tensors import DAMAGED, load_tensors, tensor_fault

_SAFE = "model.safetensors"
_PICKLED = "pytorch_model.bin"


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
    except (*DAMAGED, SafetensorError) as error:
        reason = printable((str(error).splitlines() or [type(error).__name__])[0], 200)
        if "weights_only" in reason:
            reason = "it holds more than tensors"  # torch's advice would run the file's code
        raise UserError(
            f"{file}: damaged or not tensors alone ({reason}); fetch the draft again"
        ) from None


def _unpickled(file: Path) -> dict[str, Any]:
    with open_regular(file) as opened:
        tree = load_tensors(opened, str(file))
    if not isinstance(tree, dict) or not all(isinstance(name, str) for name in tree):
        raise ValueError("not a dict of named tensors")
    for name, value in tree.items():
        fault = tensor_fault(value)
        if fault:
            raise ValueError(f"{name} {fault}")
    return tree

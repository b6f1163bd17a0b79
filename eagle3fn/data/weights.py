"""Single tensors out of a target's safetensors files, without building the model.

Every damage is named by its file.
"""

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from eagle3fn.base.errors import UserError, printable, shown
from eagle3fn.base.read import check_regular, read_json

_REMEDY = "fetch the target's files again"
_PROBED_BYTES = 64
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


def weight_files(folder: Path) -> dict[str, str]:
    """Each tensor's file name, by the tensor's key, of the files that transformers loads.

    model.safetensors comes before an index. Without both, all safetensors files are looked at.

    Raises:
        UserError: no safetensors, or a damaged index or file.
    """
    if (folder / _SINGLE).is_file():
        return dict.fromkeys(_keys(folder / _SINGLE), _SINGLE)
    if (folder / _INDEX).is_file():
        return _weight_map(folder / _INDEX)

    files = {}
    names = []
    for path in sorted(folder.glob("*.safetensors")):
        # Mistral's folders hold the same weights once more under its own names.
        if not path.name.startswith("consolidated"):
            names.append(path.name)
            files |= dict.fromkeys(_keys(path), path.name)
    if not names:
        remedy = _REMEDY
        if any(folder.glob("pytorch_model*.bin*")):
            remedy = (
                "pytorch_model.bin is there: load the folder by AutoModelForCausalLM and "
                "AutoTokenizer, and call save_pretrained of both with another folder, which holds "
                "safetensors then"
            )
        raise UserError(f"{folder}: no *.safetensors; {remedy}")
    return files


def _weight_map(index: Path) -> dict[str, str]:
    tree = read_json(index)
    found = tree.get("weight_map") if isinstance(tree, dict) else None
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
        raise UserError(f"{index}: no weight_map of tensor names to file names; {_REMEDY}")
    for name in found.values():
        if not name or not name.isprintable() or name != Path(name).name:
            raise UserError(f"{index}: {shown(name)} is no name of a file next to it; {_REMEDY}")
    return found


def check_floating(folder: Path, files: dict[str, str]) -> None:
    """Refuse weights of a target that is not quantised that are stored as whole numbers.

    Args:
        folder: the target's.
        files: as `weight_files` gives them.

    Raises:
        UserError: names file and tensor; a file missing or damaged.
    """
    for name in sorted(set(files.values())):
        with _open(folder / name) as file:
            for key in file.keys():  # noqa: SIM118
                dtype = file.get_slice(key).get_dtype()
                if key.endswith(".weight") and dtype.startswith(("I", "U", "BOOL")):
                    raise UserError(
                        f"{folder / name}: {printable(key)} is stored as {dtype}, whole numbers, "
                        f"and config.json has no quantization_config; {_REMEDY}"
                    )


def is_finite(value: Tensor) -> bool:
    """Whether a tensor has neither NaN nor infinity; takes no memory. True of quantised ones."""
    if not value.is_floating_point() or value.dtype.itemsize < 2 or not value.numel():
        return True
    return all(bool(bound.isfinite()) for bound in value.aminmax())


def files_digest(folder: Path) -> str:
    """Hex digest of each tensor's name, shape and stored dtype, and of its first 64 bytes.

    It distinguishes training states of one model without reading all the weights.

    Raises:
        UserError: as `weight_files`; a file missing or damaged.
    """
    digest = hashlib.sha256()
    for name in sorted(set(weight_files(folder).values())):
        path = folder / name
        try:
            with path.open("rb") as file:
                (size,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(size))
                header.pop("__metadata__", None)
                for key in sorted(header):
                    begin, end = header[key].pop("data_offsets")
                    file.seek(8 + size + begin)
                    digest.update(json.dumps([key, header[key]], sort_keys=True).encode())
                    digest.update(file.read(min(end - begin, _PROBED_BYTES)))
        except (OSError, ValueError, struct.error, LookupError, MemoryError) as error:
            raise UserError(f"{path}: missing or damaged ({error}); {_REMEDY}") from None
    return digest.hexdigest()


def check_weights(folder: Path) -> None:
    """Open every safetensors file there is, and compare their keys with the index.

    Raises:
        UserError: names the first file that is damaged, or lacks a tensor that the index puts
            there.
    """
    if not any(folder.glob("*.safetensors*")):
        return
    files = weight_files(folder)
    for name in sorted(set(files.values())):
        listed = {key for key, file in files.items() if file == name}
        missing = listed - set(_keys(folder / name))
        if missing:
            raise _no_tensor(folder / name, min(missing))


def _no_tensor(path: Path, key: str) -> UserError:
    return UserError(f"{path}: no tensor {key}, though {_INDEX} names it; {_REMEDY}")


def _keys(path: Path) -> list[str]:
    with _open(path) as file:
        return list(file.keys())


def _open(path: Path) -> Any:
    check_regular(path)
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: missing or damaged ({error}); {_REMEDY}") from None


def find_key(files: dict[str, str], ending: str, folder: Path) -> str:
    """The shortest key that is `ending`, or ends in a dot and `ending`.

    Raises:
        UserError: none is.
    """
    found = [key for key in files if key == ending or key.endswith("." + ending)]
    if not found:
        raise UserError(
            f"{folder}: no tensor named {ending} in the safetensors files, "
            "and none tied to it by tie_word_embeddings; "
            f"{_REMEDY} or choose another target"
        )
    return min(found, key=lambda key: (len(key), key))


def read_tensor(folder: Path, files: dict[str, str], key: str, shape: tuple[int, ...]) -> Tensor:
    """The tensor `key` in its own dtype. `shape` is config.json's.

    Raises:
        UserError: a file missing or damaged or without the tensor, a quantised tensor, another
            shape, NaN or infinity.
    """
    path = folder / files[key]
    with _open(path) as file:
        if key not in file.keys():  # noqa: SIM118
            raise _no_tensor(path, key)
        value = file.get_tensor(key)

    if value.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise UserError(
            f"{path}: {key} is {value.dtype}; take a target whose {key} is not quantised"
        )
    if value.shape != shape:
        raise UserError(
            f"{path}: {key} has shape {tuple(value.shape)}: config.json says {shape}; {_REMEDY}"
        )
    if not is_finite(value):
        raise UserError(f"{path}: {key} holds NaN or infinity; {_REMEDY}")
    return value

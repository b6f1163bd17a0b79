"""What `torch.save` stored, read as tensors alone: no other class of a file is ever made.

A file's pickle is looked through before it is read: it may name the classes of `_CLASSES` alone,
fewer than torch's reader takes. Sizes are checked before memory is taken.
"""

import io
import pickle
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Iterator
from typing import IO, Any

import torch
from torch import Tensor

DAMAGED = (
    OSError,
    EOFError,
    RuntimeError,
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
    AssertionError,
    ArithmeticError,
    struct.error,
    zlib.error,
    zipfile.BadZipFile,
    pickle.UnpicklingError,
)
"""What torch's reader and its unpickler raise on files that `torch.save` did not write."""

_REBUILD = ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter")
_STORAGES = "Float Double Half BFloat16 Long Int Short Char Byte Bool".split()
_CLASSES = frozenset(
    ["collections OrderedDict", "torch.storage UntypedStorage", "torch.storage TypedStorage"]
    + [f"torch._utils {name}" for name in _REBUILD]
    + [f"torch {name}Storage" for name in _STORAGES]
)
_OTHER_NAMES = ("STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4")  # `torch.save` writes none
_PICKLES = 5  # of torch's format before 1.6: three numbers, the object, its storages
_LARGEST_PICKLE = 2**24  # bytes: that of four tensors has a thousand


def load_tensors(file: IO[bytes], path: str | None = None) -> Any:
    """What a file holds.

    Args:
        file: open, at its beginning.
        path: the same file's, to map it into memory in place of reading it.

    Raises:
        ValueError: it names other classes, or is larger than it looks; torch's own errors (see
            `DAMAGED`) where it is damaged.
    """
    is_zip = file.read(2) == b"PK"
    file.seek(0)
    for name in _names(file, is_zip):
        if name not in _CLASSES:
            raise ValueError(f"holds more than tensors: {name.replace(' ', '.')}")
    file.seek(0)
    if path and is_zip:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return torch.load(file, map_location="cpu", weights_only=True)


def _names(file: IO[bytes], is_zip: bool) -> Iterator[str]:
    """What a file's pickles name: modules and what is taken from them."""
    if is_zip:
        with zipfile.ZipFile(file) as archive:
            for entry in archive.infolist():
                if entry.compress_type != zipfile.ZIP_STORED:
                    raise ValueError(
                        f"{entry.filename}: is compressed, which torch.save never does"
                    )
            # Entries that overlap would take more memory than the file has bytes.
            entries = sum(entry.file_size for entry in archive.infolist())
            if entries > file.seek(0, io.SEEK_END):
                raise ValueError("its entries are larger than the file")
            found = [one for one in archive.infolist() if one.filename.endswith("/data.pkl")]
            if len(found) != 1 or found[0].file_size > _LARGEST_PICKLE:
                raise ValueError("no data.pkl of a few tensors in it")
            yield from _named_in(io.BytesIO(archive.read(found[0])))
        return
    begin = io.BytesIO(file.read(_LARGEST_PICKLE))
    for _ in range(_PICKLES):
        yield from _named_in(begin)


def _named_in(pickled: IO[bytes]) -> Iterator[str]:
    for operation, argument, _ in pickletools.genops(pickled):
        if operation.name == "GLOBAL":
            yield str(argument)
        elif operation.name in _OTHER_NAMES:
            yield operation.name


def tensor_fault(value: Any) -> str | None:
    """Why a value is no plain tensor of numbers in memory; None if it is one."""
    if not isinstance(value, Tensor):
        return f"is a {type(value).__name__}, not a tensor"
    for is_so, words in (
        (value.is_meta, "has no values (it is on the device meta)"),
        (value.is_quantized, "is quantised"),
        (value.is_nested, "is nested"),
        (value.layout != torch.strided, "is sparse"),
        (value.is_complex(), "is complex"),
        (value.device.type != "cpu", f"is on {value.device}"),
    ):
        if is_so:
            return words
    if value.is_neg() or value.is_conj():
        return "is a view that negates"
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        return f"has shape {tuple(value.shape)}, more than the file holds"
    return None

"""Reading the files that `torch.distributed.checkpoint` wrote, without running what they hold.

torch unpickles `.metadata`, and entries of it that are no tensors: either would run what a file
names. Here the pickle is read as records (`pickle_records`). They must describe the leaves that are
read, in files of the checkpoint; torch's own objects are made from what was checked. The tensors
are then read as plain tensors (`stored_tensors`), each of the dtype and shape that it must have.
"""

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.filesystem import (
    FileSystemReader,
    _StorageInfo,  # pyright: ignore[reportPrivateUsage]
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.futures import Future

from eagle3fn.base.errors import printable, shown
from eagle3fn.base.read import open_regular
from eagle3fn.base.stored_tensors import load_tensors, tensor_fault
from eagle3fn.train.pickle_records import Named, Pairs, Record, read_records

METADATA = ".metadata"
_MOST_BYTES = 2**25  # of the metadata: about a thousand a leaf and rank
_MOST_AROUND = 2**16  # bytes: what `torch.save` writes around a tensor's values
_TYPES = "torch.distributed.checkpoint.metadata"
_FILES = "torch.distributed.checkpoint.filesystem"


class _Reader(FileSystemReader):
    """torch's reader, given the metadata; tensors are read by us."""

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        super().__init__(folder)
        self._folder = folder
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The metadata that was checked; torch's method would unpickle it."""
        return self._metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy what a plan asks for into the leaves; torch's method would take any tensor."""
        for item in plan.items:
            place = self.storage_data[item.storage_index]
            entry = self._metadata.state_dict_metadata[item.storage_index.fqn]
            assert isinstance(entry, TensorStorageMetadata)
            chunk = _read_chunk(self._folder, item.storage_index, place, entry)
            part = narrow_tensor_by_index(chunk, item.storage_offsets, item.lengths)
            leaf = planner.resolve_tensor(item).detach()
            leaf.copy_(part)
            planner.commit_tensor(item, leaf)
        done: Future[None] = Future()
        done.set_result(None)
        return done


def _read_chunk(
    folder: Path, index: MetadataIndex, place: _StorageInfo, entry: TensorStorageMetadata
) -> Tensor:
    """The tensor of a chunk, which must be what the metadata says; no more memory is taken.

    Raises:
        ValueError: it is something else; or torch's own errors, where it is damaged.
    """
    name = f"{index.fqn} in {place.relative_path}"
    # A rank without rows has an empty chunk, which may have another's place.
    found = (chunk.sizes for chunk in entry.chunks if chunk.offsets == index.offset)
    sizes = max(found, key=torch.Size.numel)
    dtype = entry.properties.dtype
    if place.length > sizes.numel() * dtype.itemsize + _MOST_AROUND:
        raise ValueError(f"{name} has {place.length:,} bytes, too many for {dtype} of {[*sizes]}")
    with open_regular(folder / place.relative_path) as file:
        file.seek(place.offset)
        stored = io.BytesIO(file.read(place.length))

    tensor = load_tensors(stored)
    fault = tensor_fault(tensor)
    if fault:
        raise ValueError(f"{name} {fault}")
    if tensor.dtype != dtype or tensor.shape != sizes:
        found = f"{tensor.dtype} of {[*tensor.shape]}"
        raise ValueError(f"{name} is {found}, must be {dtype} of {[*sizes]}")
    return tensor


def read_leaves(folder: Path, leaves: dict[str, Tensor], metadata: Metadata, no_dist: bool) -> None:
    """Read a stored state into `leaves`, which are whole tensors or DTensors; all ranks call.

    `metadata` is what `read_metadata` returned, of leaves that `check_leaves` found to be these.

    Raises:
        CheckpointException: of torch, what any rank could not read.
    """
    load(leaves, storage_reader=_Reader(folder, metadata), no_dist=no_dist)


def read_metadata(folder: Path, files: Iterable[str]) -> Metadata:
    """The metadata of a stored state; `files` are the names of its files, in `folder`.

    Raises:
        ValueError: it is none, or describes other files.
    """
    path = folder / METADATA
    if path.stat().st_size > _MOST_BYTES:
        raise ValueError(f"{METADATA} has more than {_MOST_BYTES:,} bytes")
    try:
        stored = _fields(read_records(path.read_bytes()), _TYPES, "Metadata")
        entries = _entries(stored.get("state_dict_metadata"))
        places = _places(stored.get("storage_data"), {*files})
        for name, entry in entries.items():
            _check_chunks(name, entry, places)
    except ValueError as error:
        raise ValueError(f"{METADATA}: {error}") from None
    return Metadata(entries, storage_data=places, storage_meta=StorageMeta())  # pyright: ignore


def check_leaves(metadata: Metadata, leaves: dict[str, Tensor]) -> None:
    """Refuse a stored state whose leaves have other names, shapes or dtypes than these.

    Raises:
        ValueError: names the first leaf that differs.
    """
    entries = metadata.state_dict_metadata
    for name in entries:
        if name not in leaves:
            raise ValueError(f"{shown(name)} is no leaf of the state")

    for name, leaf in leaves.items():
        entry = entries.get(name)
        if not isinstance(entry, TensorStorageMetadata):
            raise ValueError(f"{name} is missing")
        if entry.size != leaf.shape or entry.properties.dtype != leaf.dtype:
            raise ValueError(
                f"{name} is {entry.properties.dtype} of shape {tuple(entry.size)}, must be "
                f"{leaf.dtype} of shape {tuple(leaf.shape)}"
            )


def _entries(found: Any) -> dict[str, TensorStorageMetadata]:
    """The stored leaves."""
    entries = {}
    for key, value in _pairs(found, "state_dict_metadata"):
        name = _text(key, "a leaf's name")
        entries[name] = _entry(printable(name), value)
    return entries


def _entry(name: str, value: Any) -> TensorStorageMetadata:
    fields = _fields(value, _TYPES, "TensorStorageMetadata")
    properties = fields.get("properties")
    if not isinstance(properties, Record) or properties.kind != Named(_TYPES, "TensorProperties"):
        raise ValueError(f"{name} has no properties")
    if not isinstance(properties.state, tuple) or not properties.state:
        raise ValueError(f"{name} has no properties")

    chunks = fields.get("chunks")
    if not isinstance(chunks, list):
        raise ValueError(f"{name} has no chunks")
    made = []
    for chunk in chunks:
        parts = _fields(chunk, _TYPES, "ChunkStorageMetadata")
        made.append(ChunkStorageMetadata(_size(parts.get("offsets")), _size(parts.get("sizes"))))
    return TensorStorageMetadata(
        TensorProperties(dtype=_dtype(properties.state[0])), _size(fields.get("size")), made
    )


def _places(found: Any, files: set[str]) -> dict[MetadataIndex, _StorageInfo]:
    """Where each chunk's bytes are."""
    places = {}
    for key, value in _pairs(found, "storage_data"):
        index = _fields(key, _TYPES, "MetadataIndex")
        place = _fields(value, _FILES, "_StorageInfo")
        file = _text(place.get("relative_path"), "a file's name")
        if file not in files:
            raise ValueError(f"{shown(file)} is no file of the checkpoint")
        if place.get("transform_descriptors"):
            raise ValueError(f"{file} has transformed tensors")
        name = _text(index.get("fqn"), "a leaf's name")
        where = _StorageInfo(file, _count(place.get("offset")), _count(place.get("length")))
        places[MetadataIndex(name, _size(index.get("offset")))] = where
    return places


def _check_chunks(
    name: str, entry: TensorStorageMetadata, places: dict[MetadataIndex, _StorageInfo]
) -> None:
    """Refuse chunks that are not the leaf's rows, each once, one block after another."""
    said = printable(name)
    row = 0
    for chunk in sorted(entry.chunks, key=lambda chunk: (*chunk.offsets, *chunk.sizes)):
        whole_rows = chunk.sizes[1:] == entry.size[1:] and not any(chunk.offsets[1:])
        if len(chunk.offsets) != len(entry.size) or not whole_rows:
            raise ValueError(f"{said} has a chunk that is not made of rows")
        if MetadataIndex(name, chunk.offsets) not in places:
            raise ValueError(f"{said} has a chunk in no file")
        if entry.size and chunk.offsets[0] != row:
            raise ValueError(f"{said} has not every row once")
        row += chunk.sizes[0] if entry.size else 1
    if row != (entry.size[0] if entry.size else 1):
        raise ValueError(f"{said} has not every row once")


def _fields(value: Any, module: str, kind: str) -> dict[str, Any]:
    """The fields of a record of this class."""
    if not isinstance(value, Record) or value.kind != Named(module, kind) or value.arguments != ():
        raise ValueError(f"a {kind} is missing")
    fields = {}
    for name, field in _pairs(value.state, kind):
        fields[_text(name, f"a field's name of a {kind}")] = field
    return fields


def _pairs(value: Any, name: str) -> list[tuple[Any, Any]]:
    if not isinstance(value, Pairs) or len(value) % 2:
        raise ValueError(f"{name} is no dict")
    return list(zip(value[::2], value[1::2], strict=True))


def _text(value: Any, what: str) -> str:
    """A text. What is none is not shown: it may be of any size and depth."""
    if not isinstance(value, str):
        raise ValueError(f"{what} is no text")
    return value


def _size(value: Any) -> torch.Size:
    is_size = isinstance(value, Record) and value.kind == Named("torch", "Size")
    arguments = value.arguments if is_size else None
    if not isinstance(arguments, tuple) or len(arguments) != 1:
        raise ValueError("a shape is missing")
    if not isinstance(arguments[0], tuple):
        raise ValueError("a shape is no tuple")
    return torch.Size([_count(number) for number in arguments[0]])


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError("a size or place is no whole number from 0 on")
    return value


def _dtype(value: Any) -> torch.dtype:
    dtype = None
    if isinstance(value, Named) and value.module == "torch" and isinstance(value.name, str):
        dtype = getattr(torch, value.name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError("a dtype is missing")
    return dtype

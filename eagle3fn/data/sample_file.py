"""Samples in a file: memory does not grow with their number."""

import os
import struct
import tempfile
import threading
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NamedTuple, overload

import torch

from eagle3fn.base.launch import World
from eagle3fn.base.temporary import UNFINISHED, clear, naming, naming_temporary, side_folder
from eagle3fn.data.samples import Encoded

_HEADER = struct.Struct("<III")  # lengths of the id in bytes, of the tokens, of the mask


class PackedSample(NamedTuple):
    """A sample as bytes, which pass between processes and into a file."""

    highest_id: int
    data: bytes


def pack(sample: Encoded) -> PackedSample:
    """A sample as bytes: three lengths, id, token ids as int32, mask as bytes."""
    name = sample.id.encode("utf-8", "surrogatepass")
    ids = array("i", sample.input_ids.tolist())
    mask = bytes(sample.token_mask.tolist())
    header = _HEADER.pack(len(name), len(ids) * ids.itemsize, len(mask))
    return PackedSample(max(ids), header + name + ids.tobytes() + mask)


class SampleFile(Sequence[Encoded]):
    """Samples in a file; memory has 8 bytes of each. Threads may read at once.

    Args:
        path: the file, made anew; None: a temporary one, which is gone with the process.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self._file: IO[bytes]
        self._file = tempfile.TemporaryFile() if path is None else open(path, "w+b")  # noqa: SIM115
        self._path = None if path is None else Path(path)
        self._places = array("Q")
        self._lock = threading.Lock()
        self.tokens = 0  # of all samples

    @classmethod
    def written(cls, path: str | Path) -> "SampleFile":
        """The samples of a file that another process wrote and flushed."""
        file = cls.__new__(cls)
        file._file = open(path, "rb")  # noqa: SIM115
        file._path = Path(path)
        file._places = array("Q")
        file._lock = threading.Lock()
        file.tokens = 0
        size = os.fstat(file._file.fileno()).st_size
        place = 0
        while place < size:
            file._places.append(place)
            file._file.seek(place)
            lengths = _HEADER.unpack(file._file.read(_HEADER.size))
            place += _HEADER.size + sum(lengths)
            file.tokens += lengths[-1]
        return file

    def append(self, sample: PackedSample) -> None:
        """Add a sample.

        Raises:
            UserError: there is no room for it, or for one before it.
        """
        with self._naming():
            self._places.append(self._file.seek(0, 2))
            self._file.write(sample.data)
        self.tokens += _HEADER.unpack_from(sample.data)[-1]

    def flush(self) -> None:
        """Let other processes see the samples added so far.

        Raises:
            UserError: there is no room for them.
        """
        with self._naming():
            self._file.flush()
            os.fsync(self._file.fileno())

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> Encoded: ...

    @overload
    def __getitem__(self, index: slice) -> list[Encoded]: ...

    def __getitem__(self, index: int | slice) -> Encoded | list[Encoded]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        with self._lock:
            with self._naming():
                self._file.flush()  # the last sample may not be written yet
            self._file.seek(self._places[index])
            lengths = _HEADER.unpack(self._file.read(_HEADER.size))
            name, ids, mask = (self._file.read(length) for length in lengths)
        return Encoded(
            name.decode("utf-8", "surrogatepass"),
            torch.tensor(array("i", ids), dtype=torch.int64),
            torch.tensor(list(mask), dtype=torch.int64),
        )

    def __enter__(self) -> "SampleFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; a temporary one is gone, and so is what there was no room for."""
        with suppress(OSError):
            self._file.close()

    def _naming(self) -> AbstractContextManager[None]:
        """Raise a failure to write as a UserError."""
        return naming_temporary() if self._path is None else naming(self._path)


@contextmanager
def samples_on_ranks(
    world: World, place: str, path: Path, encode: Callable[[Path | None], tuple[SampleFile, Any]]
) -> Iterator[tuple[SampleFile, Any]]:
    """Samples that rank 0 encodes and all ranks read, and a JSON value that it knows of them.

    Args:
        world: the ranks, which wait for rank 0 however long.
        place: where they meet, another one each time.
        path: with several ranks the samples lie in a folder next to it while the block runs, on a
            disk that all see.
        encode: called on rank 0 with the file to write, or with None for a temporary one.

    Raises:
        UserError: as `encode`; a rank is gone.
    """
    if world.size == 1:
        samples, known = encode(None)
        with samples:
            yield samples, known
        return

    if not world.main:
        name, known = world.meet(place, None)[0]
        with SampleFile.written(path.parent / name) as samples:
            yield samples, known
        return

    clear(path)
    with side_folder(path, UNFINISHED) as side:
        file = side / path.name
        samples, known = encode(file)
        with samples:
            samples.flush()
            world.meet(place, [str(file.relative_to(path.parent)), known])
            yield samples, known

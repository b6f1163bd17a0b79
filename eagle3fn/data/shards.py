"""The shards of an extraction: which are there, which a rank makes, and for how long.

Of R ranks, rank r makes the shards n with n mod R = r. What a shard holds depends on its number
alone, so any number of ranks goes on with what any other number has finished.
"""

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from eagle3fn.base.errors import UserError, printable
from eagle3fn.base.files import sha256
from eagle3fn.base.launch import World
from eagle3fn.base.read import read_object
from eagle3fn.base.threads import Kept, read_kept
from eagle3fn.base.types import Sample
from eagle3fn.data.feature_writing import remove_index, shard_name, tokens_digest, write_shard
from eagle3fn.data.sample_file import SampleFile
from eagle3fn.data.samples import Encoded
from eagle3fn.data.sources import FeatureSource
from eagle3fn.data.validate import hidden_fault

_SEEN_S = 60.0  # until a shard of another machine is seen here

Sidecar = dict[str, Any]


def begun_threads(out: str | Path) -> Kept | None:
    """The number of threads that the folder's first shard was made with, if it has one.

    The last bits of the features may depend on it, so an extraction that goes on should keep it.
    """
    for path in sorted(Path(out).glob("shard-*.json")):
        return read_kept(path)
    return None


class Shards(NamedTuple):
    """How the shards of a folder are made, and the samples that they hold."""

    out: Path
    fingerprint: str
    files: str | None  # digest of the target's files
    source: FeatureSource
    stored: torch.dtype
    store: str | None  # of `data.storage.STORES`
    samples: SampleFile
    per_shard: int  # samples

    @property
    def count(self) -> int:
        """The number of all shards."""
        return math.ceil(len(self.samples) / self.per_shard)

    def numbers(self, world: World) -> range:
        """The shards of a rank."""
        return range(world.rank, self.count, world.size)

    def find(self, number: int) -> Sidecar | None:
        """The sidecar of a shard that is there, with these samples and the sidecar's hash."""
        sidecar = self._listed(number)
        path = self.out / shard_name(number)
        if sidecar is None or sidecar.get("sha256") != sha256(path):
            return None
        return sidecar

    def found_by_others(self, number: int) -> Sidecar:
        """The sidecar of a shard that another rank has made or found in this very run.

        Raises:
            UserError: it is not seen here.
        """
        end = time.monotonic() + _SEEN_S
        while (sidecar := self._listed(number)) is None:
            if time.monotonic() > end:
                raise UserError(
                    f"{self.out / shard_name(number)}: finished by another rank and not seen here; "
                    "name a folder that all machines share"
                )
            time.sleep(1)
        return sidecar

    def make(self, number: int) -> Sidecar:
        """Compute the features and write a shard; its sidecar.

        The index goes before: a folder with an index is complete.
        """
        remove_index(self.out)
        group, entries = self._group(number)
        features = self.source.features(group, self.stored)
        for entry, sample in zip(entries, features, strict=True):
            self._check_finite(entry, sample)

        keys = [entry["key"] for entry in entries]
        files = {} if self.files is None else {"target_files": self.files}
        sidecar = {
            "fingerprint": self.fingerprint,
            **files,
            **self.source.sidecar(),
            "samples": entries,
        }
        named = dict(zip(keys, features, strict=True))
        return write_shard(self.out, number, named, sidecar, self.store)

    def _group(self, number: int) -> tuple[Sequence[Encoded], list[dict[str, Any]]]:
        """The samples of a shard, and their entries."""
        start = number * self.per_shard
        group = self.samples[start : start + self.per_shard]
        return group, [entry_of(key, row) for key, row in enumerate(group, start)]

    def _listed(self, number: int) -> Sidecar | None:
        """The sidecar of a shard that has its size and these samples; its bytes are not read."""
        path = self.out / shard_name(number)
        if not path.is_file() or not path.with_suffix(".json").is_file():
            return None
        try:
            sidecar = read_object(path.with_suffix(".json"))
        except UserError:
            return None  # damaged: the shard is made anew
        _, entries = self._group(number)
        expected = {"file": path.name, "bytes": path.stat().st_size, "samples": entries}
        if any(sidecar.get(key) != value for key, value in expected.items()):
            return None
        return sidecar

    def _check_finite(self, entry: dict[str, Any], sample: Sample) -> None:
        """Refuse features that training would refuse, by the layer that they come from."""
        last = sample.last_hidden
        what = hidden_fault(
            sample.aux_hidden,
            last,
            length=entry["length"],
            taps=len(self.source.layers),
            size=last.shape[-1],
            dtype=dtype_name(self.stored),
        )
        if what is None:
            return
        layer = "after its last layer"
        layers = self.source.layers
        states = sample.aux_hidden.chunk(len(layers), -1)
        for number, state in zip(layers, states, strict=True):
            if hidden_fault(state, state, entry["length"], taps=1, size=None, dtype=None):
                layer = f"after layer {number}"
                break
        raise UserError(
            f"sample {printable(repr(entry['id']))}: {what}: the target's state {layer} is no "
            f"number that {dtype_name(self.stored)} holds and training takes, computed in "
            f"{dtype_name(self.source.dtype)}; look at the target's weights, compute it in float32 "
            "(--dtype), or leave the row out"
        )


def entry_of(key: int, row: Encoded) -> dict[str, Any]:
    """A sample's entry in the sidecar and the index.

    By its tokens' digest a shard is made again if another tokenizer gives other tokens.
    """
    return {
        "id": row.id,
        "key": str(key),
        "length": len(row.input_ids),
        "supervised": int(row.token_mask.sum()),
        "tokens": tokens_digest(row.id, row.input_ids, row.token_mask),
    }


def in_time(numbers: Iterable[int], minutes: float | None, first: bool) -> Iterator[int]:
    """The numbers of shards, as long as there is time for one more.

    A shard takes as long as the longest before. Its time ends when the next one is asked for.

    Args:
        numbers: of the shards that are to be made.
        minutes: the time for all; None, without end.
        first: the first one is made in any case.
    """
    end = None if minutes is None else time.monotonic() + 60 * minutes
    longest = 0.0
    for number in numbers:
        before = time.monotonic()
        if not first and end is not None and before + longest >= end:
            return
        first = False
        yield number
        longest = max(longest, time.monotonic() - before)


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype as configurations name it.

    >>> dtype_name(torch.bfloat16)
    'bfloat16'
    """
    return str(dtype).removeprefix("torch.")

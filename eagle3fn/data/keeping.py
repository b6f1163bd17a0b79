"""Features kept as they pass through a training: a feature folder, written on the side.

It has each sample once, as it passes in the first pass over the data, and the held-out ones last,
as training expects them. Its index is written when the training ends, of the shards that are there.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from eagle3fn.base.errors import UserError
from eagle3fn.base.launch import World
from eagle3fn.base.read import read_object
from eagle3fn.base.types import Sample
from eagle3fn.data.feature_size import feature_size
from eagle3fn.data.feature_writing import remove_index, shard_name, write_index, write_shard
from eagle3fn.data.features import FeatureSet
from eagle3fn.data.held import held
from eagle3fn.data.on_demand import OnlineSamples
from eagle3fn.data.samples import Encoded
from eagle3fn.data.shards import entry_of

PER_SHARD = 64
"""Samples of a shard; a kill loses those of one that is not full."""
_LEFT_OUT = ("schema", "totals", "table", "shards", "sha256", "remaining")

Sidecar = dict[str, Any]


class Keeper:
    """Writes the samples that pass on this rank.

    Args:
        folder: of the kept features, held by this run.
        features: the set that is trained on.
        held_out: how many of its last samples are held out.
        world: the ranks; each writes shards of its own.
    """

    def __init__(self, folder: Path, features: FeatureSet, held_out: int, world: World) -> None:
        self.folder = folder
        self.index = {k: v for k, v in features.index.items() if k not in _LEFT_OUT}
        self.trained = len(features.samples) - held_out
        self.all = len(features.samples)
        self.world = world
        self.made_of = {"samples": features.index["table"]["sha256"], "held_out": held_out}
        sidecars = self._sidecars()
        self.kept = {int(entry["key"]) for each in sidecars for entry in each["samples"]}
        self._next = max((each["number"] for each in sidecars), default=-1) // world.size + 1
        self._waiting: dict[bool, list[tuple[int, Sample]]] = {False: [], True: []}
        self._names = features.samples
        self._lock = threading.Lock()  # training and evaluation pass samples

    def __call__(self, numbers: Sequence[int], samples: Sequence[Sample], place: int) -> None:
        """Keep those that are new; `place` says in which pass over the data they come."""
        with self._lock:
            for number, sample in zip(numbers, samples, strict=True):
                is_held = number >= self.trained
                if number in self.kept or (place > self.trained and not is_held):
                    continue
                self.kept.add(number)
                self._waiting[is_held].append((number, sample))
                if len(self._waiting[is_held]) == PER_SHARD:
                    self._write(is_held)

    def flush(self) -> None:
        """Write what waits for a shard to be full."""
        with self._lock:
            for is_held in self._waiting:
                self._write(is_held)

    def finish(self) -> str:
        """Write what is left and, on rank 0, the index; all ranks call. A line on what is there."""
        self.flush()
        self.world.barrier()
        if not self.world.main:
            return ""

        sidecars = sorted(self._sidecars(), key=lambda each: (each["held_out"], each["number"]))
        if not sidecars:
            return f"{self.folder}: no sample has passed, nothing is kept"
        made = sum(len(each["samples"]) for each in sidecars)
        written = write_index(self.folder, {**self.index, "remaining": self.all - made}, sidecars)
        size = written["totals"]["bytes"] / 2**20
        held_out = sum(len(each["samples"]) for each in sidecars if each["held_out"])
        return (
            f"{self.folder}: {made} of {self.all} samples kept, {size:.0f} MiB; to hold out the "
            f"same ones: --set data.held_out={held_out}"
        )

    def _write(self, is_held: bool) -> None:
        """Write a shard of the samples that wait."""
        waiting = self._waiting[is_held]
        if not waiting:
            return
        number = self._next * self.world.size + self.world.rank
        entries = []
        for sample_number, sample in waiting:
            name = self._names[sample_number]["id"]
            entries.append(
                entry_of(sample_number, Encoded(name, sample.input_ids, sample.token_mask))
            )
        sidecar = {
            "fingerprint": self.index["fingerprint"],
            "set": self.made_of,
            "number": number,
            "held_out": is_held,
            "samples": entries,
        }
        named = {str(number): sample for number, sample in waiting}
        write_shard(self.folder, number, named, sidecar)
        self._next += 1
        self._waiting[is_held] = []

    def _sidecars(self) -> list[Sidecar]:
        """Those of the shards that are there whole, of this very set.

        Raises:
            UserError: the folder has others.
        """
        found = []
        for path in sorted(self.folder.glob("shard-*.json")):
            sidecar = read_object(path)
            same = sidecar.get("fingerprint") == self.index["fingerprint"]
            if not same or sidecar.get("set") != self.made_of:
                raise UserError(
                    f"{path}: of other conversations, another target, --limit, data.held_out or "
                    "other settings; name another folder with --keep, or remove this one"
                )
            shard = self.folder / shard_name(sidecar["number"])
            if shard.is_file() and shard.stat().st_size == sidecar["bytes"]:
                found.append(sidecar)
        return found


@contextmanager
def keeping(
    folder: str | Path, features: FeatureSet, held_out: int, world: World
) -> Iterator[Keeper]:
    """Keep features in `folder` while the block runs; all ranks call.

    Args:
        folder: made, or gone on with.
        features: the set that is trained on, on demand.
        held_out: how many of its last samples are held out.
        world: the ranks.

    Raises:
        UserError: another program holds the folder; it holds other features; there is no room.
    """
    samples = features.on_demand
    assert isinstance(samples, OnlineSamples)
    with held(folder, world=world):
        keeper = Keeper(Path(folder), features, held_out, world)
        if world.main:
            _check_room(keeper, features, samples.widths.bytes_per_token)
            remove_index(keeper.folder)
        world.barrier()
        samples.passed = keeper
        yield keeper


def _check_room(keeper: Keeper, features: FeatureSet, token_bytes: int) -> None:
    """Refuse features that the disk has no room for."""
    assert features.lengths is not None
    kept = sorted(keeper.kept)
    size = feature_size(
        keeper.folder,
        samples=len(features.samples),
        tokens=int(features.lengths.sum()),
        found=(len(kept), int(features.lengths[kept].sum())),
        token_bytes=token_bytes,
    )
    size.check_fits(keeper.folder)

"""Features kept as they pass through a training: a feature folder, written on the side.

It has each sample once, as it passes first, and the held-out ones last, as training expects them.
What has passed before a checkpoint is on the disk before it. The index is written when the training
ends, of the shards that are there.
"""

import os
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from eagle3fn.base.errors import UserError, printable
from eagle3fn.base.launch import World
from eagle3fn.base.read import read_object
from eagle3fn.base.types import Sample
from eagle3fn.data.feature_size import feature_size
from eagle3fn.data.feature_writing import (
    STORED,
    remove_index,
    shard_name,
    stored_name,
    write_index,
    write_shard,
)
from eagle3fn.data.features import FeatureSet
from eagle3fn.data.held import held
from eagle3fn.data.on_demand import OnlineSamples
from eagle3fn.data.samples import Encoded
from eagle3fn.data.shards import entry_of

PER_SHARD = 64
"""Samples of a shard, at most: one that is not full is written before a checkpoint."""
_OWN = re.compile(r"index\.json|(samples|shard-\d{5,})\.safetensors|shard-\d{5,}\.json|\..*")
"""Names that a folder of kept features may have; hidden ones are nobody's work."""
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
        self._fresh: list[int] = []  # kept here, and not known to the other ranks
        self._names = features.samples
        self._lock = threading.Lock()  # training and evaluation pass samples

    def passed(self, numbers: Sequence[int], samples: Sequence[Sample]) -> None:
        """Keep those that are new.

        Raises:
            UserError: a shard is full and could not be written.
        """
        with self._lock:
            for number, sample in zip(numbers, samples, strict=True):
                if number in self.kept:
                    continue
                is_held = number >= self.trained
                self.kept.add(number)
                self._fresh.append(number)
                self._waiting[is_held].append((number, sample))
                if len(self._waiting[is_held]) == PER_SHARD:
                    self._write(is_held)

    def flush(self) -> None:
        """Write what waits for a shard to be full."""
        with self._lock:
            for is_held in self._waiting:
                self._write(is_held)

    def settle(self) -> None:
        """`flush` on all ranks, which then know what the others have kept; all call.

        Raises:
            UserError: a shard could not be written, on whichever rank.
        """
        fault: UserError | None = None
        try:
            self.flush()
        except UserError as error:
            fault = error
        with self._lock:
            fresh = self._fresh
            self._fresh = []

        every = self.world.every((fresh, None if fault is None else str(fault)))
        if fault is not None:
            raise fault
        for rank, (numbers, text) in enumerate(every):
            if text is not None:
                raise UserError(f"rank {rank}: {text}")
            with self._lock:
                self.kept.update(numbers)

    def finish(self) -> str:
        """Write what is left and, on rank 0, the index; all ranks call. A line on what is there.

        Raises:
            UserError: as `settle`, or the index could not be written.
        """
        self.settle()
        if not self.world.main:
            return ""

        sidecars = self._each_once(self._sidecars())
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

    def _each_once(self, sidecars: list[Sidecar]) -> list[Sidecar]:
        """Sidecars in the order of the index, the held-out ones last, each sample in one of them.

        Two ranks may have kept a sample that passed twice between two checkpoints.
        """
        listed: set[str] = set()
        found = []
        for each in sorted(sidecars, key=lambda each: (each["held_out"], each["number"])):
            entries = [entry for entry in each["samples"] if entry["key"] not in listed]
            listed |= {entry["key"] for entry in entries}
            if len(entries) == len(each["samples"]):
                found.append(each)
            elif entries:
                found.append(self._with_samples(each, entries))
        return found

    def _with_samples(self, sidecar: Sidecar, entries: list[dict[str, Any]]) -> Sidecar:
        """The sidecar of a shard that is written again, with some of its samples."""
        tensors = load_file(self.folder / sidecar["file"])
        named = {}
        for key in (entry["key"] for entry in entries):
            parts = {field: tensors[stored_name(key, field)] for field in STORED}
            named[key] = Sample(**parts)
        return write_shard(self.folder, sidecar["number"], named, {**sidecar, "samples": entries})

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
        UserError: another program holds the folder; it cannot be made; it holds other features, or
            anything else; there is no room.
    """
    samples = features.on_demand
    assert isinstance(samples, OnlineSamples)
    _check_own(folder)
    with held(folder, world=world):
        keeper = Keeper(Path(folder), features, held_out, world)
        if world.main:
            _check_room(keeper, features, samples.widths.bytes_per_token)
            remove_index(keeper.folder)
        world.barrier()
        samples.keeper = keeper
        yield keeper


def _check_own(folder: str | Path) -> None:
    """Refuse a folder that holds anything but features; hidden files are nobody's work."""
    if not os.path.isdir(folder):
        return
    others = [name for name in os.listdir(folder) if not _OWN.fullmatch(name)]
    if others:
        raise UserError(
            f"{folder}: holds {printable(min(others))}, which is not of a feature folder; name a "
            "new folder with --keep"
        )


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
    size.check_fits(keeper.folder, "leave --keep out")

"""Generators: which samples a step trains on, their batches, and reading ahead in the background."""

import queue
import threading
from collections.abc import Generator, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor

from eagle3fn.base.config import Config
from eagle3fn.base.errors import UserError
from eagle3fn.base.rows import both_rows, step_rows
from eagle3fn.base.types import Batch, Sample
from eagle3fn.data.collate import align_mask, collate
from eagle3fn.data.features import FeatureSet, read_sample, read_tokens

T = TypeVar("T")
_EPOCHS_APART = 1_000_003


def order(n: int, seed: int, epoch: int) -> list[int]:
    """The numbers 0 … n-1 in the order of an epoch: a pure function of its arguments."""
    return list(_order(n, seed, epoch))


@lru_cache(maxsize=4)
def _order(n: int, seed: int, epoch: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed * _EPOCHS_APART + epoch)
    return tuple(torch.randperm(n, generator=generator).tolist())


def sample_indices(n: int, global_batch: int, seed: int, step: int) -> list[int]:
    """The `global_batch` numbers below `n` that `step` trains on: epochs are laid end to end and cut in steps."""
    places = range(step * global_batch, (step + 1) * global_batch)
    return [_order(n, seed, place // n)[place % n] for place in places]


def indices_of(n: int, config: Config, step: int) -> list[int]:
    """The numbers below `n` that `step` trains on, in the order that `data.order` names.

    "shuffled" is `sample_indices`. "legacy", the old tool's sampler, shuffles by the epoch alone, and "stored", its
    dataflow launcher, not at all; in both an epoch leaves out what does not fill a micro-batch.

    Raises:
        UserError: fewer samples than a micro-batch, where none would be left.
    """
    data, places = (
        config.data,
        range(step * config.data.global_batch, (step + 1) * config.data.global_batch),
    )
    if data.order == "shuffled":
        return sample_indices(n, data.global_batch, config.train.seed, step)
    kept = n - n % data.micro_batch
    if not kept:
        raise UserError(
            f"data.micro_batch = {data.micro_batch}: {n} samples fill no batch; extract more or lower it"
        )
    if data.order == "stored":
        return [place % kept for place in places]
    return [_order(n, 0, 1 + place // kept)[place % kept] for place in places]


def batches(
    features: FeatureSet,
    indices: Sequence[int],
    config: Config,
    start: int,
    stop: int,
    rank: int = 0,
    world: int = 1,
) -> Iterator[tuple[Batch, ...]]:
    """The micro-batches of each global batch of the steps `start` … `stop - 1`, with global counts and rows.

    `indices` are the samples trained on. Of `world` ranks, which must divide the micro-batches, `rank` gets its
    contiguous block; of the other ranks' samples it reads the masks alone.

    Raises:
        UserError: `indices` is empty, or a sample is unreadable.
    """
    if not indices:
        raise UserError(
            f"{features.folder}: no samples to train on; extract more or lower data.held_out"
        )
    block = config.data.global_batch // world
    for step in range(start, stop):
        chosen = [indices[place] for place in indices_of(len(indices), config, step)]
        own = chosen[rank * block : (rank + 1) * block]
        others = [
            _mask(features, number, config)
            for number in chosen[: rank * block] + chosen[(rank + 1) * block :]
        ]
        yield micro_batches([read_sample(features, number) for number in own], config, others)


def micro_batches(
    samples: Sequence[Sample], config: Config, others: Sequence[Tensor] = ()
) -> tuple[Batch, ...]:
    """Samples as micro-batches, which carry their rows and the counts of the global batch.

    `others` are the aligned masks `(1, S)` of the global batch's samples that other ranks hold.
    """
    data, k = config.data, config.objective.ttt_length
    parts = [samples[i : i + data.micro_batch] for i in range(0, len(samples), data.micro_batch)]
    micro = [collate(part, data.mask_alignment, data.max_length) for part in parts]
    n = step_rows([*(batch.row_mask for batch in micro), *others], k)
    return tuple(batch._replace(row_counts=n, **both_rows(batch.row_mask, k)) for batch in micro)


def _mask(features: FeatureSet, number: int, config: Config) -> Tensor:
    """The aligned mask of one sample, `(1, S)`."""
    _, mask = read_tokens(features, number)
    return align_mask(mask[: config.data.max_length], config.data.mask_alignment)[None]


def split(n: int, held_out: int) -> tuple[list[int], list[int]]:
    """The first samples to train on, and the last `held_out` to evaluate on.

    Raises:
        UserError: `held_out` is negative, or none are left to train on.
    """
    if held_out < 0:
        raise UserError(f"data.held_out = {held_out}: must be 0 or more")
    if held_out >= n:
        raise UserError(
            f"data.held_out = {held_out}: must be below the number of samples, {n}; extract more samples"
        )
    return list(range(n - held_out)), list(range(n - held_out, n))


def prefetch(items: Iterable[T], size: int) -> Generator[T, None, None]:
    """The same items, up to `size` of them made ahead in a background thread (0: no thread).

    An exception in the thread is raised here, at its place; closing this generator ends the thread.
    """
    if size == 0:
        yield from items
        return
    waiting: queue.Queue[tuple[str, T | BaseException | None]] = queue.Queue(size)
    closed = threading.Event()
    worker = threading.Thread(
        target=_fill, args=(items, waiting, closed), name="prefetch", daemon=True
    )
    worker.start()
    try:
        while True:
            kind, value = waiting.get()
            if kind == "end":
                return
            if isinstance(value, BaseException) and kind == "error":
                raise value
            yield value  # type: ignore[misc]
    finally:
        closed.set()
        worker.join()


def _fill(items: Iterable[T], waiting: queue.Queue, closed: threading.Event) -> None:
    try:
        for item in items:
            if not _put(waiting, ("item", item), closed):
                break
        else:
            _put(waiting, ("end", None), closed)
    except BaseException as error:
        _put(waiting, ("error", error), closed)
    finally:
        close = getattr(items, "close", None)
        if close:
            close()


def _put(waiting: queue.Queue, entry: tuple[str, object], closed: threading.Event) -> bool:
    """Wait for room; False if the consumer has gone."""
    while not closed.is_set():
        try:
            waiting.put(entry, timeout=0.05)
            return True
        except queue.Full:
            continue
    return False

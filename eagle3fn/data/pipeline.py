"""Generators: which samples a step trains on, their batches, and reading ahead in a thread."""

import hashlib
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor

from eagle3fn.base.config import Config
from eagle3fn.base.errors import UserError
from eagle3fn.base.rows import over_steps, trained_row_counts
from eagle3fn.base.types import Batch, Sample
from eagle3fn.data.collate import AlignMask, align_mask, collate
from eagle3fn.data.features import FeatureSet, read_sample, read_tokens

T = TypeVar("T")
_EPOCHS_APART = 1_000_003


Order = Callable[[int, Config, int], list[int]]
"""As `shuffled`: `(n, config, step)` → the numbers below `n` that the step trains on."""


@lru_cache(maxsize=4)
def epoch_order(n: int, seed: int) -> tuple[int, ...]:
    """The numbers 0 … n-1, shuffled by a generator of `seed`.

    Kept, so that asking for one place is cheap.
    """
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randperm(n, generator=generator).tolist())


def sample_indices(n: int, global_batch: int, seed: int, step: int) -> list[int]:
    """The `global_batch` numbers below `n` that `step` trains on: shuffled epochs laid end to end
    and cut into steps.
    """
    chosen = []
    for place in range(step * global_batch, (step + 1) * global_batch):
        epoch, place_in_epoch = divmod(place, n)
        chosen.append(epoch_order(n, seed * _EPOCHS_APART + epoch)[place_in_epoch])
    return chosen


def shuffled(n: int, config: Config, step: int) -> list[int]:
    """`sample_indices` of the configuration's batch and seed."""
    return sample_indices(n, config.data.global_batch, config.train.seed, step)


def batches(
    features: FeatureSet,
    indices: Sequence[int],
    config: Config,
    start: int,
    stop: int,
    rank: int = 0,
    world: int = 1,
    align_mask: AlignMask = align_mask,
    order: Order = shuffled,
) -> Iterator[tuple[Batch, ...]]:
    """The micro-batches of each global batch of the steps `start` … `stop - 1`, with global counts
    and rows.

    Args:
        features: an opened folder.
        indices: the samples trained on.
        config: `data`, `train.seed` and the unroll length are read.
        start: the first step.
        stop: one past the last.
        rank: of `world` ranks, which must divide the micro-batches; it gets its contiguous block of
            them, and of the other ranks' samples the masks alone are read.
        world: the ranks.
        align_mask: token mask to row mask.
        order: which samples a step trains on.

    Raises:
        UserError: `indices` is empty, or a sample is unreadable.
    """
    if not indices:
        raise UserError(
            f"{features.folder}: no samples to train on; extract more or lower data.held_out"
        )
    block = config.data.global_batch // world
    for step in range(start, stop):
        # The global batch, and which part of it is this rank's.
        chosen = [indices[place] for place in order(len(indices), config, step)]
        own = chosen[rank * block : (rank + 1) * block]
        others = chosen[: rank * block] + chosen[(rank + 1) * block :]

        # The counts are global: the other ranks' masks are read too.
        samples = [read_sample(features, number) for number in own]
        masks = [_row_mask(features, number, config, align_mask) for number in others]
        survives = draw_survival(samples, own, config, step)
        yield micro_batches(samples, config, masks, align_mask, survives)


def micro_batches(
    samples: Sequence[Sample],
    config: Config,
    others: Sequence[Tensor] = (),
    align_mask: AlignMask = align_mask,
    survives: Sequence[Tensor] | None = None,
) -> tuple[Batch, ...]:
    """Samples as micro-batches, which carry the counts of the global batch.

    `others` are the row masks `(1, K, S)` of the global batch's samples that other ranks hold, and
    `survives` is what `draw_survival` returns for these samples.
    """
    size = config.data.micro_batch
    micro = []
    for start in range(0, len(samples), size):
        part = slice(start, start + size)
        lives = None if survives is None else survives[part]
        micro.append(collate(samples[part], config, align_mask, lives))
    counts = trained_row_counts([*(batch.row_mask for batch in micro), *others])
    return tuple(batch._replace(row_counts=counts) for batch in micro)


def draw_survival(
    samples: Sequence[Sample], numbers: Sequence[int], config: Config, step: int
) -> list[Tensor] | None:
    """At how many unroll steps each row of the samples takes part: `(S,)` int64 each, 1 … K.

    A row goes on to the next step with the chance `objective.survival`. Drawn from the seed, the
    training step, the sample's number and the row alone: the same on every rank, in every
    micro-batch, and in a resumed run. None if every row survives.
    """
    rate = config.objective.survival
    if rate == 1:
        return None

    drawn = []
    for sample, number in zip(samples, numbers, strict=True):
        key = f"survival {config.train.seed} {step} {number}".encode()
        seed = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest()) >> 1
        generator = torch.Generator().manual_seed(seed)
        shape = len(sample.input_ids), config.objective.ttt_length - 1
        goes_on = torch.rand(shape, dtype=torch.float64, generator=generator) < rate
        drawn.append(1 + goes_on.long().cumprod(1).sum(1))
    return drawn


def _row_mask(features: FeatureSet, number: int, config: Config, align_mask: AlignMask) -> Tensor:
    """The row mask of one sample, `(1, K, S)`."""
    _, token_mask = read_tokens(features, number)
    row_mask = align_mask(token_mask[: config.data.max_length])
    return over_steps(row_mask, config.objective.ttt_length)[None]


def split(n: int, held_out: int) -> tuple[list[int], list[int]]:
    """The first samples to train on, and the last `held_out` to evaluate on.

    Raises:
        UserError: `held_out` is negative, or none are left to train on.
    """
    if held_out < 0:
        raise UserError(f"data.held_out = {held_out}: must be 0 or more")
    if held_out >= n:
        raise UserError(
            f"data.held_out = {held_out}: must be below the number of samples, {n}; extract more "
            "samples"
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

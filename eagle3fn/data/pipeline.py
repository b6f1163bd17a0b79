"""The training pipeline: the stages of a run's micro-batches, and which samples it holds out.

The stages themselves are in `data.stages`.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from functools import partial

from eagle3fn.base.config import Config
from eagle3fn.base.errors import UserError
from eagle3fn.base.types import Batch
from eagle3fn.data import stages
from eagle3fn.data.collate import AlignMask, align_mask
from eagle3fn.data.features import FeatureSet, length_of
from eagle3fn.data.order import Order, shuffled
from eagle3fn.data.stages import Item, Loaded


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
        config: `data`, `train.seed`, `train.reduce` and the unroll length are read.
        start: the first step.
        stop: one past the last.
        rank: of `world` ranks, which must divide the micro-batches; it gets its contiguous block of
            them, and of the other ranks' samples the masks alone are read.
        world: the ranks.
        align_mask: token mask to row mask.
        order: which sample comes at which place.

    Raises:
        UserError: `indices` is empty, or a sample is unreadable.
    """
    if not indices:
        raise UserError(
            f"{features.folder}: no samples to train on; extract more or lower data.held_out"
        )
    numbers = ordered(indices, config, start, stop, order)
    bins = binned(numbers, partial(length_of, features), config, world)
    loaded = stages.read(stages.shard(bins, rank, world), features)
    return micro_batches(loaded, config, align_mask)


def ordered(
    indices: Sequence[int], config: Config, start: int, stop: int, order: Order = shuffled
) -> Generator[Item[int], None, None]:
    """The sample numbers of the steps `start` … `stop - 1`, one after another."""
    size = config.data.global_batch
    places = stages.places(start * size, stop * size)
    return stages.select(places, indices, partial(order, len(indices), config))


def binned(
    numbers: Iterable[Item[int]], length: Callable[[int], int], config: Config, world: int = 1
) -> Generator[Item[list[list[int]]], None, None]:
    """Each step's numbers as those of its micro-batches: packed, or `data.micro_batch` each.

    `length` gives the tokens of a sample, before it is cut.
    """
    data = config.data
    groups = stages.group(numbers, data.global_batch)
    if not data.pack_tokens:
        return stages.chunk(groups, data.micro_batch)
    return stages.pack(
        groups,
        lambda number: min(length(number), data.max_length),
        tokens=data.pack_tokens,
        ranks=world,
        tree=config.train.reduce == "tree",
    )


def micro_batches(
    loaded: Iterable[Item[Loaded]], config: Config, align_mask: AlignMask = align_mask
) -> Iterator[tuple[Batch, ...]]:
    """The last stage of training, without its places, which are the steps' own."""
    with closing(stages.collate(loaded, config, align_mask)) as items:
        for micro, _ in items:
            yield micro


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

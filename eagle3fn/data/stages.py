"""Stages of the data pipeline: generator functions from items to items, for pipelines of one's own.

    places → shuffle → filter → group → pack or chunk → shard → read → collate → to_device
           → prefetch

An `Item` is a value and a place of the source. **The law of all stages:** the same chain, built
anew on `places(item.place)`, yields exactly what comes after that item. So a stage keeps nothing
that it could not make again from there, and a pipeline is resumed by one number.

Each stage closes what it reads from when it is closed or fails.
"""

import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from functools import partial, wraps
from itertools import islice
from typing import Any, Concatenate, Generic, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from eagle3fn.base.config import Config
from eagle3fn.base.device import to_device as _to_device
from eagle3fn.base.errors import UserError
from eagle3fn.base.rows import over_steps, trained_row_counts
from eagle3fn.base.types import Batch, Sample
from eagle3fn.data import collate as _collate
from eagle3fn.data.bins import fill
from eagle3fn.data.collate import AlignMask, align_mask
from eagle3fn.data.features import FeatureSet, read_sample, read_tokens
from eagle3fn.data.order import shuffled_number
from eagle3fn.data.survival import draw_survival

T = TypeVar("T")
U = TypeVar("U")
P = ParamSpec("P")

_MOST_REJECTED = 1_000_000  # items in a row: an endless source must not be read for ever


class Item(NamedTuple, Generic[T]):
    """A value, and the place of the source at which what comes after it begins."""

    value: T
    place: int


class Share(NamedTuple, Generic[T]):
    """A list of bins, cut into a rank's own and the others'."""

    own: list[T]
    others: list[T]


class Loaded(NamedTuple):
    """A rank's bins of samples, and what it must know of the other ranks'."""

    numbers: list[list[int]]  # of the samples in each bin
    bins: list[list[Sample]]
    others: list[Tensor]  # token masks (S,) of the other ranks' samples


def stage(
    function: Callable[Concatenate[Any, P], Iterator[U]],
) -> Callable[Concatenate[Any, P], Generator[U, None, None]]:
    """Make a stage of a generator function whose first argument is what it reads from.

    When the stage is closed, ends or fails, that is closed too, also if nothing was read.
    """

    @wraps(function)
    def run(items: Any, /, *args: P.args, **kwargs: P.kwargs) -> Generator[U, None, None]:
        return _Running(items, function(items, *args, **kwargs))

    return run


class _Running(Generator[U, None, None]):
    """A stage at work. A generator of its own would not close its source before it begins."""

    def __init__(self, source: Any, made: Iterator[U]) -> None:
        self._source = source
        self._made = made

    def send(self, value: None) -> U:
        try:
            return next(self._made)
        except BaseException:  # its end too
            self.close()
            raise

    def throw(self, error: Any, *_: Any) -> U:
        self.close()
        raise error

    def close(self) -> None:
        for each in (self._made, self._source):
            close = getattr(each, "close", None)
            if close:
                close()


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise UserError(f"stages: {what}")


# Numbers


def places(start: int = 0, stop: int | None = None) -> Generator[Item[int], None, None]:
    """The source: the places `start` … `stop - 1`, without a stop for ever."""
    place = start
    while stop is None or place < stop:
        yield Item(place, place + 1)
        place += 1


@stage
def select(
    items: Iterable[Item[int]], numbers: Sequence[int], order: Callable[[int], int]
) -> Iterator[Item[int]]:
    """For each place the sample number `numbers[order(place)]`.

    Raises:
        UserError: there are no numbers.
    """
    _require(len(numbers) > 0, "no numbers to choose from; name samples")
    for value, place in items:
        yield Item(numbers[order(value)], place)


@stage
def shuffle(items: Iterable[Item[int]], numbers: Sequence[int], seed: int) -> Iterator[Item[int]]:
    """For each place a sample number: all `numbers` shuffled, epoch after epoch anew."""
    return select(items, numbers, partial(shuffled_number, len(numbers), seed))


@stage
def filter(items: Iterable[Item[T]], keep: Callable[[T], bool]) -> Iterator[Item[T]]:
    """The items whose value `keep` accepts.

    Raises:
        UserError: a million in a row are not accepted.
    """
    rejected = 0
    for item in items:
        if keep(item.value):
            rejected = 0
            yield item
            continue
        rejected += 1
        _require(rejected < _MOST_REJECTED, f"filter accepted none of {rejected:,} items in a row")


@stage
def group(items: Iterable[Item[T]], size: int) -> Iterator[Item[list[T]]]:
    """Lists of `size` values, as a global batch is; where the source ends the last may be shorter.

    The place of a list is that of its last value.
    """
    _require(size > 0, f"group of {size}: must be 1 or more")
    source = iter(items)
    while part := list(islice(source, size)):
        yield Item([item.value for item in part], part[-1].place)


# Bins, which become micro-batches


@stage
def chunk(items: Iterable[Item[list[T]]], size: int) -> Iterator[Item[list[list[T]]]]:
    """Each list cut into bins of `size` values, in order."""
    _require(size > 0, f"chunk of {size}: must be 1 or more")
    for values, place in items:
        starts = range(0, len(values), size)
        yield Item([values[start : start + size] for start in starts], place)


@stage
def pack(
    items: Iterable[Item[list[T]]],
    length: Callable[[T], int],
    *,
    tokens: int,
    ranks: int = 1,
    tree: bool = False,
) -> Iterator[Item[list[list[T]]]]:
    """Each list as bins of at most `tokens` tokens and like load, in an order of the lengths alone.

    Args:
        items: lists of sample numbers.
        length: the tokens of a sample.
        tokens: of a bin at most.
        ranks: the number of bins is a multiple of it; bins may be empty.
        tree: it is the same for every number of ranks, empty bins at the end apart (see
            `data.bins.fill`).

    Raises:
        UserError: a sample is longer than a bin.
    """
    _require(ranks > 0, f"pack for {ranks} ranks: must be 1 or more")
    for values, place in items:
        _require(len(values) > 0, "pack of an empty list; filter before group")
        bins = fill([length(value) for value in values], tokens, ranks, tree)
        yield Item([[values[number] for number in each] for each in bins], place)


@stage
def shard(
    items: Iterable[Item[list[T]]], rank: int = 0, world: int = 1
) -> Iterator[Item[Share[T]]]:
    """Of each list the contiguous block of `rank`, and the rest, whose rows are counted too.

    Raises:
        UserError: the ranks don't divide the bins.
    """
    _require(0 <= rank < world, f"shard: rank {rank} must be in [0, {world}), the ranks")
    for bins, place in items:
        block, rest = divmod(len(bins), world)
        if rest:
            raise UserError(
                f"{len(bins)} micro-batches an update: {world} ranks must divide them; group as "
                "many samples as they do, or start other ranks"
            )
        own = slice(rank * block, (rank + 1) * block)
        yield Item(Share(bins[own], bins[: own.start] + bins[own.stop :]), place)


# Samples


@stage
def read(items: Iterable[Item[Share[list[int]]]], features: FeatureSet) -> Iterator[Item[Loaded]]:
    """The samples of a rank's own bins, checked, and the token masks of the others'.

    Raises:
        UserError: as `data.features.read_sample`.
    """
    if features.on_demand:
        return features.on_demand.load(items)
    return _read(items, features)


def _read(items: Iterable[Item[Share[list[int]]]], features: FeatureSet) -> Iterator[Item[Loaded]]:
    """`read` from a folder."""
    for share, place in items:
        bins = [[read_sample(features, number) for number in each] for each in share.own]
        others = [read_tokens(features, number)[1] for each in share.others for number in each]
        yield Item(Loaded(share.own, bins, others), place)


@stage
def collate(
    items: Iterable[Item[Loaded]], config: Config, align_mask: AlignMask = align_mask
) -> Iterator[Item[tuple[Batch, ...]]]:
    """Each bin as a `Batch`, a micro-batch that carries the row counts of the global batch.

    With `data.pack_tokens` a bin is one packed row, else a padded batch. How far rows go
    (`objective.survival`) is drawn for the step that the place is in.

    Args:
        items: loaded bins.
        config: `data`, `objective` and `train.seed` are read.
        align_mask: token mask to row mask.
    """
    made = _packed if config.data.pack_tokens else _collate.collate
    for loaded, place in items:
        step = (place - 1) // config.data.global_batch
        empty = not config.data.pack_tokens and not all(loaded.bins)
        _require(not empty, "collate of a bin without a sample; filter before group")
        micro = []
        for numbers, samples in zip(loaded.numbers, loaded.bins, strict=True):
            survives = draw_survival(samples, numbers, config, step)
            micro.append(made(samples, config, align_mask, survives))

        # The counts are global: the other ranks' rows are counted too.
        masks = [_row_mask(mask, config, align_mask) for mask in loaded.others]
        counts = trained_row_counts([*(batch.row_mask for batch in micro), *masks])
        yield Item(tuple(batch._replace(row_counts=counts) for batch in micro), place)


def _packed(
    samples: Sequence[Sample],
    config: Config,
    align_mask: AlignMask,
    survives: Sequence[Tensor] | None,
) -> Batch:
    """A bin as a packed row; an empty one has the features' widths."""
    draft = config.draft
    width = draft.target_hidden_size
    dtype = getattr(torch, config.train.dtype)
    like = _collate.FeatureKind(draft.taps * width, width, dtype)
    return _collate.collate_packed(samples, config, align_mask, survives, like)


def _row_mask(token_mask: Tensor, config: Config, align_mask: AlignMask) -> Tensor:
    """The row mask of one sample, `(1, K, S)`."""
    row_mask = align_mask(token_mask[: config.data.max_length])
    return over_steps(row_mask, config.objective.ttt_length)[None]


# Items of any kind


@stage
def to_device(items: Iterable[T], device: str) -> Iterator[T]:
    """The same items, every tensor in them on `device`; the host does not wait."""
    for item in items:
        yield _to_device(item, device)


@stage
def prefetch(items: Iterable[T], size: int) -> Iterator[T]:
    """The same items, up to `size` of them made ahead in a background thread (0: no thread).

    An exception in the thread is raised here, at its place; closing this stage ends the thread.
    """
    _require(size >= 0, f"prefetch of {size}: must be 0 or more")
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
                return
        _put(waiting, ("end", None), closed)
    except BaseException as error:
        _put(waiting, ("error", error), closed)


def _put(waiting: queue.Queue, entry: tuple[str, object], closed: threading.Event) -> bool:
    """Wait for room; False if the consumer has gone."""
    while not closed.is_set():
        try:
            waiting.put(entry, timeout=0.05)
            return True
        except queue.Full:
            continue
    return False

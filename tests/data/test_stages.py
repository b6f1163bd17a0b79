"""Laws of the pipeline's stages: resumed anywhere, shared among ranks, packed, closed."""

import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eagle3fn import stages
from eagle3fn.base.config import Config
from eagle3fn.base.errors import UserError
from eagle3fn.base.rows import over_steps, trained_row_counts
from eagle3fn.base.sections import DataConfig, ObjectiveConfig, TrainConfig
from eagle3fn.base.tree import equal
from eagle3fn.data import collate as collating
from eagle3fn.data.bins import fill
from eagle3fn.data.features import FeatureSet, open_features, read_sample
from eagle3fn.data.pipeline import batches
from eagle3fn.data.stages import Item, prefetch
from eagle3fn.data.survival import draw_survival
from tests.factories import make_draft, random_sample, write_folder

SHORT = settings(max_examples=40, deadline=None)
DRAFT = make_draft(
    4, 50, 20, intermediate_size=8, num_attention_heads=1, num_key_value_heads=1, head_dim=4
)
SAMPLES = 7

Chain = Callable[[Iterator[Any]], Iterator[Any]]


class Drawn(NamedTuple):
    """A chain of stages by its arguments; the stages of numbers, and those of lists or none."""

    samples: int
    seed: int
    divisor: int  # the filter drops multiples of it
    size: int
    bins: str  # "", "chunk", "pack", "tree"
    ranks: int
    ahead: int

    def on(self, items: Iterator[Item[int]]) -> Iterator[Item[Any]]:
        """The chain on a source."""
        made: Iterator[Item[Any]] = stages.shuffle(items, range(self.samples), self.seed)
        if self.divisor > 1:
            made = stages.filter(made, lambda number: number % self.divisor != 0)
        made = stages.group(made, self.size)
        if self.bins == "chunk":
            made = stages.chunk(made, 2)
        elif self.bins:
            tree = self.bins == "tree"
            made = stages.pack(made, length, tokens=9, ranks=self.ranks, tree=tree)
        return stages.prefetch(made, self.ahead)


def length(number: int) -> int:
    return 1 + number * 5 % 9


CHAINS = st.builds(
    Drawn,
    samples=st.integers(1, 12),
    seed=st.integers(0, 5),
    divisor=st.integers(1, 3),
    size=st.integers(1, 5),
    bins=st.sampled_from(["", "chunk", "pack", "tree"]),
    ranks=st.sampled_from([1, 2, 4]),
    ahead=st.sampled_from([0, 0, 0, 2]),
)


# Resumed at any place


@given(CHAINS, st.integers(0, 9), st.integers(0, 30))
@SHORT
def test_chain_begun_at_an_items_place_gives_exactly_what_comes_after_it(chain, start, count):
    whole = list(chain.on(stages.places(start, start + count)))
    for number, item in enumerate(whole):
        assert list(chain.on(stages.places(item.place, start + count))) == whole[number + 1 :]


@given(CHAINS)
@SHORT
def test_items_are_a_function_of_the_chains_arguments(chain):
    assert list(chain.on(stages.places(3, 30))) == list(chain.on(stages.places(3, 30)))


def test_place_is_that_of_the_source_and_a_source_goes_on_for_ever():
    source = stages.places(4)
    assert [next(source) for _ in range(3)] == [Item(4, 5), Item(5, 6), Item(6, 7)]
    even = stages.filter(stages.places(0, 8), lambda number: number % 2 == 0)
    assert list(stages.group(even, 3)) == [Item([0, 2, 4], 5), Item([6], 7)]


@given(st.integers(1, 12), st.integers(0, 9))
@SHORT
def test_shuffled_epochs_hold_every_number_once_and_are_unlike(n, seed):
    numbers = [10 * number for number in range(n)]
    found = [item.value for item in stages.shuffle(stages.places(0, 3 * n), numbers, seed)]
    for epoch in range(3):
        assert sorted(found[epoch * n : (epoch + 1) * n]) == numbers
    if n > 8:
        assert found[:n] != found[n : 2 * n]


# Bins


@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=30),
    st.integers(20, 50),
    st.sampled_from([1, 2, 3, 4, 8]),
    st.booleans(),
)
@SHORT
def test_packed_bins_hold_every_sample_once_within_the_budget(lengths, limit, ranks, tree):
    tree = tree and ranks != 3
    bins = fill(lengths, limit, ranks, tree)
    assert sorted(place for each in bins for place in each) == list(range(len(lengths)))
    loads = [sum(lengths[place] for place in each) for each in bins]
    assert max(loads) <= limit
    assert len(bins) % ranks == 0

    # Balanced: moving a sample to the lightest bin would not help.
    filled = len(fill(lengths, limit, 1, tree)) if tree else len(bins)
    for each, load in zip(bins[:filled], loads, strict=False):
        if len(each) > 1:
            assert load - min(lengths[place] for place in each) <= min(loads[:filled])

    # Under the tree the ranks change nothing but the empty bins at the end.
    if tree:
        alone = fill(lengths, limit, 1, tree)
        assert len(alone).bit_count() == 1
        assert bins == alone + [[]] * (len(bins) - len(alone))
        assert len(bins) == max(len(alone), ranks)
    assert len(bins) - ranks < 2 * max(len(lengths), sum(lengths) / limit)


def test_number_of_bins_is_the_smallest_that_fits():
    assert fill([5, 1, 4, 3], 13) == [[0, 1, 2, 3]]
    assert fill([5, 1, 4, 3], 7) == [[0, 1], [2, 3]]
    assert fill([6, 6, 6], 7) == [[0], [1], [2]]
    assert fill([6, 6, 6], 7, tree=True) == [[0], [1], [2], []]
    assert fill([6], 7, ranks=4, tree=True) == [[0], [], [], []]
    with pytest.raises(UserError, match=r"sample of 8 tokens is longer than a packed row, 7; rai"):
        fill([8], 7)


@given(CHAINS, st.sampled_from([1, 2, 4]))
@SHORT
def test_the_ranks_shares_are_the_whole_once_in_order(chain, world):
    chain = chain._replace(ranks=world, bins="pack")
    every = list(chain.on(stages.places(0, 20)))
    shares = [list(stages.shard(chain.on(stages.places(0, 20)), r, world)) for r in range(world)]
    for number, (bins, place) in enumerate(every):
        of_ranks = [share[number] for share in shares]
        assert all(share.place == place for share in of_ranks)
        assert [each for share in of_ranks for each in share.value.own] == bins
        for share in of_ranks:
            own_and_others = [*share.value.own, *share.value.others]
            assert sorted(map(sorted, own_and_others)) == sorted(map(sorted, bins))


def test_ranks_that_do_not_divide_the_bins_are_refused():
    with pytest.raises(UserError, match=r"3 micro-batches an update: 2 ranks must divide them"):
        list(stages.shard([Item([[1], [2], [3]], 1)], 0, 2))


# Samples


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> FeatureSet:
    samples = [random_sample(5 + i, i) for i in range(SAMPLES)]
    return open_features(write_folder(Path(tmp_path_factory.mktemp("stages")), samples))


def settings_of(survival: float = 1.0, **data: int) -> Config:
    data = {"max_length": 6, "global_batch": 4, "micro_batch": 2} | data
    objective = ObjectiveConfig(ttt_length=3, survival=survival)
    return Config(DRAFT, objective, data=DataConfig(**data), train=TrainConfig(seed=3))


def by_hand(folder: FeatureSet, config: Config, step: int, rank: int, world: int) -> list[Any]:
    """A step's micro-batches without a stage: numbers, samples, draws and counts in a loop."""
    stream = []
    for epoch in range(9):
        generator = torch.Generator().manual_seed(3 * 1_000_003 + epoch)
        stream += torch.randperm(SAMPLES, generator=generator).tolist()
    chosen = stream[step * 4 : step * 4 + 4]

    micro = []
    for first in range(0, 4, 2):
        numbers = chosen[first : first + 2]
        samples = [read_sample(folder, number) for number in numbers]
        survives = draw_survival(samples, numbers, config, step)
        micro.append(collating.collate(samples, config, survives=survives))
    masks = []
    for number in chosen:
        mask = collating.align_mask(read_sample(folder, number).token_mask[:6])
        masks.append(over_steps(mask, 3)[None])
    counts = trained_row_counts(masks)
    share = 2 // world
    return [one._replace(row_counts=counts) for one in micro[rank * share : (rank + 1) * share]]


@pytest.mark.parametrize(("rank", "world"), [(0, 1), (0, 2), (1, 2)])
@pytest.mark.parametrize("survival", [1.0, 0.5])
def test_pipeline_has_the_batches_of_a_plain_loop(folder, survival, rank, world):
    config = settings_of(survival)
    found = batches(folder, range(SAMPLES), config, 2, 6, rank, world)
    for step, micro in enumerate(found, 2):
        assert equal(list(micro), by_hand(folder, config, step, rank, world))
    assert step == 5


def training(folder: FeatureSet, source: Iterator[Item[int]], keep: Any) -> Iterator[Item[Any]]:
    """A whole chain with a filter, as a user would write it."""
    config = settings_of(survival=0.5)
    chosen = stages.filter(stages.shuffle(source, range(SAMPLES), 3), keep)
    bins = stages.chunk(stages.group(chosen, 4), 2)
    loaded = stages.read(stages.shard(bins), folder)
    made = stages.to_device(stages.collate(loaded, config), "cpu")
    return stages.prefetch(made, 2)


def test_whole_chain_is_resumed_at_every_place(folder):
    keep = partial(int.__ne__, 2)
    whole = list(training(folder, stages.places(0, 30), keep))
    assert len(whole) == 7
    for number, item in enumerate(whole):
        rest = list(training(folder, stages.places(item.place, 30), keep))
        assert [one.place for one in rest] == [one.place for one in whole[number + 1 :]]
        assert equal([one.value for one in rest], [one.value for one in whole[number + 1 :]])


# Closed, and failing


class Source:
    """Places that count how often they were closed."""

    def __init__(self) -> None:
        self.closed = 0

    def items(self, fails_at: int = -1) -> Iterator[Item[int]]:
        try:
            for item in stages.places():
                if item.value == fails_at:
                    raise OSError("disk")
                yield item
        finally:
            self.closed += 1


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


@given(CHAINS, st.integers(1, 6))
@SHORT
def test_closing_after_any_item_closes_the_source_and_its_thread(chain, taken):
    source = Source()
    chain = chain._replace(samples=12)  # a filter leaves some
    held = source.items()  # so that it is not closed for want of a reference
    made = chain.on(held)
    for _ in range(taken):
        next(made)
    made.close()  # type: ignore[attr-defined]
    assert source.closed == 1
    assert not threads()


@given(CHAINS, st.integers(0, 20))
@SHORT
def test_what_fails_is_raised_after_the_items_before_it(chain, fails_at):
    source = Source()
    good = list(chain.on(stages.places(0, fails_at)))
    made = chain.on(source.items(fails_at))
    seen = []
    with pytest.raises(OSError, match="disk"):
        for item in made:
            seen.append(item)
    assert seen in (good, good[:-1])  # the last group may not have been whole
    assert source.closed == 1
    assert not threads()


def test_a_stage_that_fails_itself_closes_what_it_reads_from():
    @stages.stage
    def fifth_fails(items: Iterator[Item[int]]) -> Iterator[Item[int]]:
        for item in items:
            if item.value == 4:
                raise ValueError("the fifth")
            yield item

    source = Source()
    held = source.items()
    made = stages.group(fifth_fails(held), 2)
    assert [next(made).value, next(made).value] == [[0, 1], [2, 3]]
    with pytest.raises(ValueError, match="the fifth"):
        next(made)
    assert source.closed == 1


@pytest.mark.parametrize("after", [0, 1, 2])
def test_closing_the_pipeline_ends_its_thread(folder, after):
    """A consumer that leaves, as the loop does at a signal."""
    made = prefetch(batches(folder, range(SAMPLES), settings_of(), 0, 50), 2)
    for _ in range(after):
        next(made)
    made.close()
    assert not threads()


@pytest.mark.parametrize("size", [0, 1, 3])
def test_prefetch_gives_the_same_items_and_raises_in_place(size):
    def items():
        yield from range(5)
        raise OSError("disk")

    assert list(prefetch(iter(range(9)), size)) == list(range(9))
    seen = []
    with pytest.raises(OSError, match=r"disk"):
        for item in prefetch(items(), size):
            seen.append(item)
    assert seen == list(range(5))


def test_prefetch_is_bounded_and_its_thread_ends_when_closed():
    made, closed = [], []

    def items():
        try:
            for item in range(1000):
                made.append(item)
                yield item
        finally:
            closed.append(True)

    stream = prefetch(items(), 2)
    assert next(stream) == 0
    time.sleep(0.2)
    assert 2 <= len(made) <= 4
    stream.close()
    assert closed == [True]
    assert not threads()


def test_prefetch_passes_exceptions_as_items():
    items = [ValueError("an item"), 1]
    assert list(prefetch(iter(items), 1)) == items


@stages.stage
def emptied(items):
    for item in items:
        yield item._replace(value=[])


REFUSED = {
    "group": (lambda items: stages.group(items, 0), "group of 0"),
    "chunk": (lambda items: stages.chunk(stages.group(items, 2), -1), "chunk of -1"),
    "no bins": (
        lambda items: stages.pack(emptied(stages.group(items, 2)), length, tokens=9),
        "pack of an empty list",
    ),
    "no ranks": (
        lambda items: stages.pack(stages.group(items, 2), length, tokens=9, ranks=0),
        "pack for 0 ranks",
    ),
    "no world": (lambda items: stages.shard(stages.group(items, 2), 0, 0), "rank 0 must be in"),
    "rank": (lambda items: stages.shard(stages.group(items, 2), -1, 2), "rank -1 must be in"),
    "prefetch": (lambda items: stages.prefetch(items, -1), "prefetch of -1"),
    "shuffle": (lambda items: stages.shuffle(items, [], 0), "no numbers to choose from"),
    "filter": (lambda items: stages.filter(items, lambda number: False), "accepted none of 1,000"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_lose_samples_or_never_end_is_refused(monkeypatch, name):
    monkeypatch.setattr(stages, "_MOST_REJECTED", 1000)
    made, reason = REFUSED[name]
    source = stages.places()
    with pytest.raises(UserError, match=reason):
        next(made(source))
    with pytest.raises(StopIteration):  # it is closed
        next(source)


def test_a_padded_bin_without_a_sample_is_refused(folder):
    numbers = stages.chunk(stages.group(stages.places(0, SAMPLES), 4), 2)
    loaded = stages.read(stages.shard(numbers), folder)
    empty = (item._replace(value=item.value._replace(bins=[[], []])) for item in loaded)
    config = Config(DRAFT, data=DataConfig(global_batch=4, micro_batch=2))
    with pytest.raises(UserError, match="a bin without a sample; filter before group"):
        next(stages.collate(empty, config))


def test_a_stage_that_is_closed_before_it_begins_closes_what_it_reads_from():
    source = stages.places()
    stages.group(stages.shuffle(source, range(3), 0), 2).close()
    with pytest.raises(StopIteration):
        next(source)

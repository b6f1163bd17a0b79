"""The batches of an online run, on which all ranks agree: their counts, and how they end."""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from eagle3fn.base.errors import UserError
from eagle3fn.base.launch import World
from eagle3fn.base.signals import StopRequested
from eagle3fn.base.types import Batch
from eagle3fn.train import feed as module
from eagle3fn.train.feed import Announced, Feed

WELL = Announced(None, False, None)
GONE = Announced("its source is gone", False, None)
STOPS = Announced(None, True, None)


def two_ranks(other: Announced, said: list[Announced] | None = None) -> World:
    """A world of two ranks, of which this is the first; the other says `other`."""

    class Two(World):
        def every(self, value: Announced) -> list[Announced]:
            if said is not None:
                said.append(value)
            return [value, other]

    return Two(0, 2)


def micro(*counts: int) -> Batch:
    fields = dict.fromkeys(Batch._fields, torch.zeros(1))
    return Batch(**{**fields, "row_counts": torch.tensor(counts)})  # type: ignore[arg-type]


def counts_of(batches: tuple[Batch, ...]) -> list[list[int]]:
    return [batch.row_counts.tolist() for batch in batches if batch.row_counts is not None]


def failing(error: Exception, after: int = 0) -> Iterator[tuple[Batch, ...]]:
    """So many updates, and then none, for this reason."""
    for _ in range(after):
        yield (micro(1),)
    raise error


# Counts


def test_counts_of_ranks_that_know_their_own_are_added_up():
    """Each micro-batch has those of all, at each unroll step."""
    said: list[Announced] = []
    world = two_ranks(Announced(None, False, torch.tensor([4, 5])), said)
    feed = Feed(iter([(micro(1, 2), micro(1, 2))]), world, counted=True)
    assert counts_of(next(feed)) == [[5, 7], [5, 7]]
    assert said[0].counts is not None
    assert said[0].counts.tolist() == [1, 2]


def test_counts_that_are_of_all_ranks_already_stay():
    said: list[Announced] = []
    feed = Feed(iter([(micro(5, 7),)]), two_ranks(WELL, said))
    assert counts_of(next(feed)) == [[5, 7]]
    assert said == [WELL]


def test_one_rank_asks_nobody():
    feed = Feed(iter([(micro(1),), (micro(2),)]), World(), counted=True)
    assert [counts_of(batches) for batches in feed] == [[[1]], [[2]]]


# Ends


def test_a_rank_stops_where_another_has_no_batch():
    feed = Feed(iter([(micro(1),)]), two_ranks(GONE))
    with pytest.raises(UserError, match=r"^rank 1: its source is gone$"):
        next(feed)


@pytest.mark.parametrize("other", [WELL, GONE])
def test_a_rank_without_a_batch_says_so_to_all_and_raises_its_own_fault(other):
    said: list[Announced] = []
    own = UserError("mine is gone")
    with pytest.raises(UserError) as raised:
        next(Feed(failing(own), two_ranks(other, said)))
    assert raised.value is own
    assert said == [Announced("mine is gone", False, None)]


@pytest.mark.parametrize("counted", [False, True])
def test_all_ranks_end_where_one_is_asked_to(counted):
    """No update is made of batches that another rank has not."""
    assert list(Feed(iter([(micro(1),)]), two_ranks(STOPS), counted)) == []


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_rank_that_is_asked_to_end_ends_without_an_error(ranks):
    said: list[Announced] = []
    world = two_ranks(WELL, said) if ranks == 2 else World()
    assert len(list(Feed(failing(StopRequested("stopped"), after=1), world))) == 1
    assert said == [WELL, STOPS][: 2 * (ranks - 1)]


def test_all_ranks_reach_the_end_together():
    said: list[Announced] = []
    assert len(list(Feed(iter([(micro(1),)]), two_ranks(WELL, said)))) == 1
    assert said == [WELL, WELL]


# Time


def test_share_of_the_time_that_updates_waited(monkeypatch):
    """Batches take 3 s, updates 1 s."""
    clock = [100.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    def slow() -> Iterator[tuple[Batch, ...]]:
        for _ in range(2):
            clock[0] += 3
            yield (micro(1),)

    feed = Feed(slow(), World())
    assert feed.share_waited() == 0
    for _ in feed:
        clock[0] += 1
    assert feed.share_waited() == 6 / 8

"""Groups that sources roll out: in order and each once, whatever the sources do.

The sources are functions that fail, wait or answer wrongly by a plan; no model computes.
"""

import re
import threading
import time
from collections import Counter
from contextlib import closing, contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eagle3fn.base.errors import UserError
from eagle3fn.base.types import Sample
from eagle3fn.data import rollout
from eagle3fn.data.on_demand import OnlineSamples, Widths
from eagle3fn.data.rollout import (
    MOST_ATTEMPTS,
    MOST_REOPENED,
    Group,
    Pool,
    Source,
    StopRequested,
    rolled_out,
)
from eagle3fn.data.samples import Encoded
from eagle3fn.data.sources import FeatureSource
from eagle3fn.data.stages import Item, Share
from eagle3fn.engines.process import EngineGone

TAPS = 3
HIDDEN = 4
WIDTHS = Widths(TAPS, HIDDEN, torch.bfloat16)
BYTES = 100  # of a group
PATIENCE_S = 20.0


def row_of(number: int) -> Encoded:
    ids = torch.arange(3 + number % 3) + number
    return Encoded(f"row{number}", ids, torch.ones_like(ids))


def sample_of(row: Encoded) -> Sample:
    """What a right source gives: features that the tokens decide."""
    states = (row.input_ids[:, None] + torch.arange(HIDDEN)).bfloat16()
    return Sample(row.input_ids, row.token_mask, states.repeat(1, TAPS), states)


def groups_of(count: int) -> list[Group]:
    return [Group(number, number + 1, [row_of(number)], BYTES) for number in range(count)]


def ask(source: FeatureSource, group: Group) -> list[Sample]:
    return source.features(group.rows, torch.bfloat16)


class Sources:
    """Sources that do as `act(name, key)` says before they answer, and note what they are asked."""

    def __init__(self, act=lambda name, key: None, wrong=lambda samples: samples):
        self.act = act
        self.wrong = wrong
        self.asked: list[tuple[str, int]] = []
        self.opened = Counter[str]()
        self.closed = Counter[str]()

    def source(self, name: str, identity: str = "one") -> Source:
        @contextmanager
        def opened():
            self.opened[name] += 1
            self.act(name, "open")
            try:
                yield self.record(name, identity)
            finally:
                self.closed[name] += 1

        return Source(name, opened)

    def record(self, name: str, identity: str) -> FeatureSource:
        def features(rows, stored):
            number = int(rows[0].id.removeprefix("row"))
            self.asked.append((name, number))
            self.act(name, number)
            return self.wrong([sample_of(row) for row in rows])

        head = torch.zeros(1, HIDDEN)
        return FeatureSource(
            None, (0, 1, 2), torch.bfloat16, head, {}, {"weights": identity}, features
        )

    def times(self, number: int) -> int:
        """How often a group was asked for."""
        return sum(key == number for _, key in self.asked)


def pool_of(sources: Sources, count: int, **options) -> Pool:
    given = {"least_lease": 0.1, "pause": 0.001, **options}
    return Pool([sources.source(f"s{number}") for number in range(count)], **given)


def gone(*_: object) -> None:
    raise EngineGone("toy: was killed")


def await_that(holds) -> None:
    end = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < end, "it never happens"
        time.sleep(0.005)


def roll(pool: Pool, count: int, buffer: int = 4 * BYTES) -> list[int]:
    """The groups' keys as they come; their samples are the right ones."""
    found = []
    with pool, closing(rolled_out(groups_of(count), pool, ask, buffer)) as rolled:
        for group, samples in rolled:
            assert all(map(torch.equal, samples[0], sample_of(row_of(group.key))))
            found.append(group.key)
    return found


# Sources that end or are slow


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.sampled_from(["right", "gone", "slow"]), min_size=1, max_size=7),
    st.integers(1, 3),
    st.integers(1, 4),
)
def test_groups_come_in_order_and_each_once(plan, count, room):
    """The first answer to each group goes wrong as planned."""
    left = dict(enumerate(plan))

    def act(name, key):
        how = left.pop(key, "right")
        if how == "gone":
            gone()
        if how == "slow":
            time.sleep(0.15 if count > 1 else 0.01)

    sources = Sources(act)
    pool = pool_of(sources, count)
    assert roll(pool, len(plan), room * BYTES) == list(range(len(plan)))
    assert not left
    assert sources.opened == sources.closed
    assert pool.counts.groups == len(plan)


def test_killed_source_is_opened_again_and_its_group_alone_asked_for_once_more():
    left = [2]

    def act(name, key):
        if key in left:
            left.remove(key)
            gone()

    sources = Sources(act)
    said = []
    pool = pool_of(sources, 1, say=said.append)
    assert roll(pool, 5) == [0, 1, 2, 3, 4]
    assert [sources.times(number) for number in range(5)] == [1, 1, 2, 1, 1]
    assert sources.opened["s0"] == 2
    assert (pool.counts.reopened, pool.counts.again, pool.counts.late) == (1, 1, 0)
    assert said == ["s0: toy: was killed; opened again, what it had is asked for once more"]


@pytest.mark.parametrize("slow", [0, 3])
def test_another_source_answers_for_a_slow_one_whose_late_answer_is_dropped(slow):
    """Also where the slow one was asked before any had answered."""
    release = threading.Event()
    waiting = []

    def act(name, key):
        if key == slow and not waiting:
            waiting.append(name)
            release.wait(PATIENCE_S)

    sources = Sources(act)
    pool = pool_of(sources, 2, least_lease=0.05)
    with pool, closing(rolled_out(groups_of(6), pool, ask, 3 * BYTES)) as rolled:
        found = [group.key for group, _ in rolled if group.key != 5 or not release.set()]
        await_that(lambda: pool.counts.late == 1)
    assert found == [0, 1, 2, 3, 4, 5]
    assert sources.times(slow) == 2
    assert pool.counts.again >= 1
    assert pool.counts.groups == 6


def test_group_that_ends_every_source_is_given_up_after_what_came_before_it():
    sources = Sources(lambda name, key: gone() if key == 2 else None)
    pool = pool_of(sources, 3)
    found = []
    with (
        pool,
        closing(rolled_out(groups_of(5), pool, ask, 8 * BYTES)) as rolled,
        pytest.raises(UserError, match=r"'row2' …: asked for 3 times in vain .toy: was killed."),
    ):
        found.extend(group.key for group, _ in rolled)
    assert found in ([], [0], [0, 1])
    assert sources.times(2) == MOST_ATTEMPTS


def test_run_goes_on_with_the_sources_that_are_left_and_ends_with_the_last():
    def dead(names):
        return Sources(lambda name, key: gone() if name in names and key == "open" else None)

    sources = dead(["s1"])
    pool = pool_of(sources, 2, pause=1e-5)
    assert roll(pool, 4) == [0, 1, 2, 3]
    assert {name for name, _ in sources.asked} == {"s0"}

    with pytest.raises(UserError, match="no source is left: toy: was killed"):
        roll(pool_of(dead(["s0", "s1"]), 2, pause=1e-5), 4)


def test_source_that_ends_whenever_it_is_asked_is_given_up():
    sources = Sources(lambda name, key: None if key == "open" else gone())
    tries = 0
    with pool_of(sources, 1, pause=1e-5) as pool:
        (source,) = pool.sources
        while tries < 20 and source.await_open(threading.Event()):
            tries += 1
            with pytest.raises(EngineGone):
                source.ask(ask, groups_of(1)[0])
    assert tries == sources.opened["s0"] == MOST_REOPENED + 1
    assert str(source.given_up) == "toy: was killed"


def test_sources_that_are_not_alike_are_refused():
    sources = Sources()
    pair = [sources.source("a"), sources.source("b", "other")]
    with Pool(pair, pause=0.001) as pool:
        assert pool.first().identity == {"weights": "one"}
        rolled = rolled_out(groups_of(50), pool, lambda *_: time.sleep(0.05) or [], 2 * BYTES)
        with closing(rolled), pytest.raises(UserError, match=r"b: its weights is 'other'.*'one'"):
            list(rolled)


# Room, and the end


def test_no_more_is_asked_for_than_the_buffer_holds():
    taken = [0]
    ahead = []
    sources = Sources(lambda name, key: key != "open" and ahead.append(key + 1 - taken[0]))
    pool = pool_of(sources, 2)
    with pool, closing(rolled_out(groups_of(12), pool, ask, 3 * BYTES + 1)) as rolled:
        for group, _ in rolled:
            # A consumer that takes its time: the sources fill what room there is, and stop.
            await_that(lambda: len(ahead) == min(12, taken[0] + 3))
            time.sleep(0.02)
            assert len(ahead) == min(12, taken[0] + 3)
            taken[0] = group.key + 1
    assert max(ahead) == 3


def test_group_larger_than_the_buffer_is_alone():
    sources = Sources()
    assert roll(pool_of(sources, 2), 4, BYTES // 2) == [0, 1, 2, 3]
    assert [key for _, key in sources.asked] == [0, 1, 2, 3]


def test_closing_early_ends_the_threads_and_the_source_of_groups():
    closed = []

    def endless():
        try:
            yield from groups_of(10_000)
        finally:
            closed.append(True)

    pool = pool_of(Sources(), 2)
    with pool:
        rolled = rolled_out(endless(), pool, ask, 4 * BYTES)
        assert next(rolled)[0].key == 0
        rolled.close()
        assert closed == [True]
        assert not [each for each in threading.enumerate() if each.name in ("s0", "s1")]

        # The next stage finds the sources open.
        with closing(rolled_out(groups_of(3), pool, ask, BYTES)) as again:
            assert [group.key for group, _ in again] == [0, 1, 2]


def test_source_that_opens_after_the_pool_is_closed_is_closed_too():
    release = threading.Event()
    opening = threading.Event()

    def act(name, key):
        if name == "s1" and key == "open":
            opening.set()
            release.wait(PATIENCE_S)

    sources = Sources(act)
    with pool_of(sources, 2) as pool, closing(rolled_out(groups_of(1), pool, ask, BYTES)) as rolled:
        next(rolled)
        assert opening.wait(PATIENCE_S)
        threading.Timer(0.1, release.set).start()
    await_that(lambda: sources.opened == sources.closed)
    assert sources.closed == {"s0": 1, "s1": 1}


# Wrong answers


def with_aux(sample: Sample, change) -> Sample:
    return sample._replace(aux_hidden=change(sample.aux_hidden))


def with_nan(states):
    states = states.clone()
    states[1, 0] = torch.nan
    return states


WRONG = {
    "taps": (lambda s: with_aux(s, lambda aux: aux[:, HIDDEN:]), r"must be \(\d, 12\)"),
    "width": (
        lambda s: s._replace(last_hidden=s.last_hidden[:, 1:]),
        r"last_hidden \(\d, 3\): must be",
    ),
    "length": (lambda s: with_aux(s, lambda aux: aux[:-1]), "aux_hidden .*must be"),
    "dtype": (lambda s: with_aux(s, torch.Tensor.float), "both must be bfloat16"),
    "nan": (lambda s: with_aux(s, with_nan), "aux_hidden holds NaN or infinity at token 1"),
    "ids": (lambda s: s._replace(input_ids=s.input_ids + 1), "not those that were asked for"),
    "mask": (lambda s: s._replace(token_mask=1 - s.token_mask), "mask is not that of the row"),
}


def load(wrong) -> list:
    """Two updates of two samples, as training reads them; the second answer is wrong."""
    answers = iter([lambda samples: samples, wrong])
    pool = pool_of(Sources(wrong=lambda samples: next(answers)(samples)), 1)  # noqa: PLW0108
    online = OnlineSamples([row_of(number) for number in range(4)], pool, WIDTHS)
    items = [Item(Share([[0, 1]], []), 2), Item(Share([[2], [3]], []), 4)]
    found = []
    try:
        with pool, closing(online.load(items)) as loaded:
            found.extend(loaded)
    except UserError as error:
        found.append(str(error))
    return found


def test_right_answers_come_in_their_bins():
    first, second = load(list)
    assert [len(each) for each in first.value.bins] == [2]
    assert [len(each) for each in second.value.bins] == [1, 1]
    assert torch.equal(second.value.bins[1][0].input_ids, row_of(3).input_ids)
    assert (first.place, second.place) == (2, 4)


@pytest.mark.parametrize("name", WRONG)
def test_wrong_answer_is_refused_before_it_is_a_batch(name):
    change, named = WRONG[name]
    found = load(lambda samples: [samples[0], change(samples[1])])
    assert len(found) == 2
    assert isinstance(found[1], str)
    assert found[1].startswith("sample 'row3': ")
    assert re.search(named, found[1]), found[1]


def test_answer_of_too_few_samples_is_refused():
    *_, error = load(lambda samples: samples[:1])
    assert error == "a source gave 1 samples of 2 rows"


def test_who_waits_comes_before_what_is_rolled_out_ahead():
    """An evaluation's samples do not queue up between all that the buffer has room for."""
    sources = Sources(lambda name, key: time.sleep(0.01))
    groups = groups_of(420)
    with (
        Pool([sources.source("one")]) as pool,
        closing(rolled_out(groups[:400], pool, ask, 10**6)) as training,
    ):
        next(training)
        with closing(rolled_out(groups[400:], pool, ask, 10**6)) as evaluation:
            assert len(list(evaluation)) == 20
        keys = [key for _, key in sources.asked]
    between = keys[keys.index(400) : keys.index(419)]
    assert sum(key < 400 for key in between) <= 8


def test_samples_of_a_closed_pool_are_refused():
    with Pool([Sources().source("one")]) as pool:
        pass
    with pytest.raises(UserError, match="the sources are closed"):
        list(rolled_out(groups_of(1), pool, ask, BYTES))


def test_a_signal_ends_the_wait_for_a_source_that_hangs(monkeypatch):
    release = threading.Event()
    monkeypatch.setattr(rollout, "_STOPPING", 0.05)
    monkeypatch.setattr(rollout, "received", lambda: 15)
    sources = Sources(lambda name, key: key == "open" or release.wait(PATIENCE_S))
    with Pool([sources.source("one")]) as pool:
        with pytest.raises(StopRequested, match="stopped while samples were waited for"):
            list(rolled_out(groups_of(1), pool, ask, BYTES))
        release.set()

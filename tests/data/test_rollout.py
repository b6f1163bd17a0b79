"""Groups that sources roll out: in order and each once, whatever the sources do.

The sources are functions that fail, wait or answer wrongly by a plan; no model computes.
"""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eagle3fn.base.errors import UserError
from eagle3fn.base.signals import StopRequested
from eagle3fn.data import rollout
from eagle3fn.data.rollout import MOST_ATTEMPTS, rolled_out
from eagle3fn.data.source_pool import Pool
from tests.data.planned_sources import (
    BYTES,
    Sources,
    ask,
    gone,
    groups_of,
    pool_of,
    row_of,
    sample_of,
)
from tests.waiting import PATIENCE_S, await_that


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


def test_group_that_ended_a_source_is_left_to_one_that_is_well(monkeypatch):
    """So a source that always ends gives no group up, though the other one is busy for long."""
    release = threading.Event()
    looks = []  # of s0 for a group, since it was asked last, while s1 is busy

    def act(name, key):
        if name == "s0" and key != "open":
            looks.clear()
            gone()
        if name == "s1" and key != "open":
            release.wait(PATIENCE_S)

    def look(stage):
        if threading.current_thread().name == "s0" and sources.keys_of("s1"):
            looks.append(stage)
            if len(looks) == 2:
                release.set()

    sources = Sources(act)
    pool = pool_of(sources, 2, least_lease=PATIENCE_S)
    on_each_look(pool, look, monkeypatch)
    assert roll(pool, 2) == [0, 1]
    keys = sources.keys_of("s0")
    assert keys
    assert len(keys) == len(set(keys))


def test_group_that_ended_a_source_is_asked_of_it_again_where_no_other_is_well():
    left = [0]

    def act(name, key):
        if name == "s1" or (key in left and not left.remove(key)):
            gone()

    sources = Sources(act)
    assert roll(pool_of(sources, 2), 3) == [0, 1, 2]
    assert sources.keys_of("s0") == [0, 0, 1, 2]


def on_each_look(pool, look, monkeypatch) -> None:
    """Call `look(stage)` before each look of a source's thread for a group that waits."""
    gives_way = pool.gives_way
    monkeypatch.setattr(pool, "gives_way", lambda stage: look(stage) or gives_way(stage))


def test_run_goes_on_with_the_sources_that_are_left_and_ends_with_the_last():
    def dead(names):
        return Sources(lambda name, key: gone() if name in names and key == "open" else None)

    sources = dead(["s1"])
    pool = pool_of(sources, 2, pause=1e-5)
    assert roll(pool, 4) == [0, 1, 2, 3]
    assert {name for name, _ in sources.asked} == {"s0"}

    with pytest.raises(UserError, match="no source is left: toy: was killed"):
        roll(pool_of(dead(["s0", "s1"]), 2, pause=1e-5), 4)


# Stages that share a pool


def test_sources_are_left_to_the_stage_whose_consumer_waits(monkeypatch):
    """An evaluation's samples do not queue up between all that training's buffer has room for."""
    evaluates = threading.Event()
    release = threading.Event()
    stages = []
    looks = []  # of training for its group 1, while the evaluation waits for its group 9
    times = []

    def act(name, key):
        if key == 0:
            await_that(lambda: waits("another"))
        if key == 1 and sources.times(1) == 1:
            evaluates.wait(PATIENCE_S)
            gone()
        if key == 9:
            release.wait(PATIENCE_S)
            times.append(sources.times(1))

    def look(stage):
        stages.append(stage)
        if stage is stages[0] and pool.counts.again:
            looks.append(stage)
            if len(looks) == 4:
                release.set()

    def evaluation() -> list[int]:
        with closing(rolled_out(groups_of(10)[9:], pool, ask, BYTES)) as rolled:
            return [group.key for group, _ in rolled]

    sources = Sources(act)
    pool = pool_of(sources, 3, least_lease=PATIENCE_S)
    waits = pool.gives_way
    on_each_look(pool, look, monkeypatch)
    with (
        pool,
        ThreadPoolExecutor(1) as threads,
        closing(rolled_out(groups_of(3), pool, ask, 2 * BYTES)) as training,
    ):
        assert next(training)[0].key == 0
        assert not waits("another")
        await_that(lambda: sources.times(1))
        evaluated = threads.submit(evaluation)
        await_that(lambda: sources.times(9) and waits("another"))
        evaluates.set()
        assert evaluated.result(PATIENCE_S) == [9]
        assert [group.key for group, _ in training] == [1, 2]
    assert times == [1]


def test_stage_that_ended_while_it_waited_is_not_waited_for():
    wrong = UserError("wrong answer")

    def act(name, key):
        if key != "open":
            await_that(lambda: pool.gives_way("another"))
            raise wrong

    pool = pool_of(Sources(act), 1)
    with pool:
        with pytest.raises(UserError, match="wrong answer"):
            list(rolled_out(groups_of(1), pool, ask, BYTES))
        assert not pool.gives_way("another")


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


def test_samples_of_a_closed_pool_are_refused():
    with Pool([Sources().source("one")]) as pool:
        pass
    with pytest.raises(UserError, match="the sources are closed"):
        list(rolled_out(groups_of(1), pool, ask, BYTES))


def test_a_signal_ends_the_wait_for_a_source_that_hangs(monkeypatch):
    release = threading.Event()
    monkeypatch.setattr(rollout, "_STOPPING", 0.05)
    monkeypatch.setattr(rollout, "_CLOSING", 0.05)
    monkeypatch.setattr(rollout, "received", lambda: 15)
    sources = Sources(lambda name, key: key == "open" or release.wait(PATIENCE_S))
    with Pool([sources.source("one")]) as pool:
        with pytest.raises(StopRequested, match="stopped while samples were waited for"):
            list(rolled_out(groups_of(1), pool, ask, BYTES))
        release.set()


def test_samples_that_come_soon_after_a_signal_are_taken(monkeypatch):
    """The update is made of them, and saved."""
    looks = []
    monkeypatch.setattr(rollout, "received", lambda: looks.append(15) or 15)
    sources = Sources(lambda name, key: key == "open" or await_that(lambda: len(looks) >= 2))
    assert roll(pool_of(sources, 1), 1) == [0]

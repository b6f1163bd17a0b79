"""A pool's sources: opened when they are needed, again after they end, and closed with it."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager

import pytest

from eagle3fn.base.errors import EngineGone, UserError
from eagle3fn.data import rollout
from eagle3fn.data.rollout import rolled_out
from eagle3fn.data.source_pool import MOST_REOPENED, Pool, Source
from tests.data.planned_sources import BYTES, Sources, ask, gone, groups_of, pool_of
from tests.waiting import PATIENCE_S, await_that


def test_source_that_ends_whenever_it_is_asked_is_given_up():
    sources = Sources(lambda name, key: None if key == "open" else gone())
    tries = 0
    with pool_of(sources, 1, pause=1e-5) as pool:
        (source,) = pool.sources
        while tries < 20 and source.await_open(threading.Event()):
            tries += 1
            with pytest.raises(EngineGone):
                source.ask(lambda opened: ask(opened, groups_of(1)[0]))
    assert tries == sources.opened["s0"] == MOST_REOPENED + 1
    assert str(source.given_up) == "toy: was killed"


def test_source_that_answers_now_and_then_is_never_given_up():
    """It is opened again far more often than `MOST_REOPENED`, but not in a row."""
    asked = []

    def act(name, key):
        if key != "open":
            asked.append(key)
            if len(asked) % MOST_REOPENED:
                gone()

    sources = Sources(act)
    with pool_of(sources, 1, pause=1e-5) as pool:
        (source,) = pool.sources
        answers = 0
        while answers < 3 and source.await_open(threading.Event()):
            try:
                answers += len(source.ask(lambda opened: ask(opened, groups_of(1)[0])))
            except EngineGone:
                assert not source.is_well
            else:
                assert source.is_well
    assert answers == 3
    assert len(asked) == 3 * MOST_REOPENED
    assert pool.counts.reopened == sources.opened["s0"] - 1 == 3 * (MOST_REOPENED - 1)


def test_source_that_a_closed_pool_ends_is_not_said_to_be_tried_again():
    said: list[str] = []
    opening = threading.Event()

    @contextmanager
    def opened(abandoned):
        opening.set()
        abandoned.wait(PATIENCE_S)
        gone()
        yield

    with ThreadPoolExecutor(1) as threads:
        pool = Pool([Source("s0", opened)], said.append)
        awaited = threads.submit(pool.sources[0].await_open, threading.Event())
        assert opening.wait(PATIENCE_S)
        pool.close()
        assert not awaited.result(PATIENCE_S)
    assert not said


def test_source_that_is_not_like_the_first_is_refused():
    sources = Sources()
    pair = [sources.source("a"), sources.source("b", "other")]
    with Pool(pair) as pool:
        assert pool.first().identity == {"weights": "one"}
        with pytest.raises(UserError, match=r"b: its weights is 'other', .* was 'one'"):
            pool.sources[1].opened()


def test_source_that_comes_back_as_another_is_refused():
    """As a server that was started again with other weights."""
    identities = iter(["one", "other"])
    sources = Sources(lambda name, key: None if key == "open" else gone())
    again = Source("a", lambda abandoned: sources.source("a", next(identities)).open(abandoned))
    with Pool([again], pause=1e-5) as pool:
        (source,) = pool.sources
        with pytest.raises(EngineGone):
            source.ask(lambda opened: ask(opened, groups_of(1)[0]))
        with pytest.raises(UserError, match=r"a: its weights is 'other', .* was 'one'"):
            source.await_open(threading.Event())


@pytest.mark.parametrize(
    ("waits", "stage", "gives_way"),
    [
        (["evaluation"], "training", True),
        (["evaluation"], "evaluation", False),
        (["evaluation", "training"], "training", False),
        ([], "training", False),
    ],
)
def test_stage_gives_way_where_another_one_waits_and_it_does_not(waits, stage, gives_way):
    with pool_of(Sources(), 1) as pool:
        for each in ("training", "evaluation"):
            pool.note_waiting(each, True)
        for each in {"training", "evaluation"} - set(waits):
            pool.note_waiting(each, False)
        assert pool.gives_way(stage) == gives_way


# The end


def test_closed_pool_opens_nothing():
    sources = Sources()
    with pool_of(sources, 1) as pool:
        pass
    with pytest.raises(EngineGone, match="s0: was closed"):
        pool.first()
    assert not sources.opened


@pytest.mark.parametrize("when", ["opened", "asked"])
def test_closed_pool_abandons_what_is_opened_or_asked(when):
    """The thread that waits for the source ends at once, by `EngineGone`."""
    seen = []
    waits = threading.Event()

    @contextmanager
    def opened(abandoned):
        def wait(*_):
            waits.set()
            seen.append(abandoned.wait(PATIENCE_S))
            gone()

        if when == "opened":
            wait()
        record = Sources().record("a", "one")
        yield record._replace(features=wait)

    pool = Pool([Source("a", opened)])
    with pool, ThreadPoolExecutor(1) as threads:
        (source,) = pool.sources
        asked = threads.submit(source.ask, lambda opened: ask(opened, groups_of(1)[0]))
        assert waits.wait(PATIENCE_S)
        pool.close()
        with pytest.raises(EngineGone, match="toy: was killed"):
            asked.result(PATIENCE_S)
    assert seen == [True]


def test_source_that_opens_after_the_pool_is_closed_is_closed_too(monkeypatch):
    monkeypatch.setattr(rollout, "_CLOSING", 0.05)
    opening = threading.Event()

    def act(name, key):
        if name == "s1" and key == "open":
            opening.set()
            assert pool.closed.wait(PATIENCE_S)

    sources = Sources(act)
    with pool_of(sources, 2) as pool, closing(rolled_out(groups_of(1), pool, ask, BYTES)) as rolled:
        next(rolled)
        assert opening.wait(PATIENCE_S)
    await_that(lambda: sources.opened == sources.closed)
    assert sources.closed == {"s0": 1, "s1": 1}

"""Drawn lives of an online run: nothing is lost or trained twice, whatever fails or comes late."""

import math
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from eagle3fn.data.ledger import (
    GivenUp,
    Lease,
    Ledger,
    Trained,
    ack,
    add,
    commit,
    expire,
    fail,
    lease,
    opened,
    take,
)
from tests.data.ledger_model import (
    SOURCES,
    TRAINERS,
    Group,
    Model,
    distances,
    finish,
    holders,
    leaves,
    places,
)

seconds = st.sampled_from((1.0, 2.0, 5.0))


class Life(RuleBasedStateMachine):
    """Sources and trainers in any order, with faults; `Model` beside the ledger."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = opened()
        self.model = Model(0)
        self.now = 0.0
        # What the trained state holds, and what will never be in it.
        self.history: list[int] = []
        self.abandoned: list[int] = []
        self.saved: tuple[int, list[int], list[int]] = (0, [], [])

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """A call that leaves its argument as it was, and has the same result when repeated."""
        before = repr(self.ledger)
        result = function(self.ledger, *arguments)
        assert repr(self.ledger) == before
        assert function(self.ledger, *arguments) == result
        return result

    def numbers(self, distances: list[int], *names: str) -> list[int]:
        """Groups in one of these places for the lower distances, any others for the rest."""
        likely = sorted(self.model.at(*names))
        return [
            likely[distance % len(likely)]
            if likely and 0 <= distance < 6
            else self.ledger.first + distance
            for distance in distances
        ]

    @initialize(count=st.integers(6, 12))
    def begin(self, count: int) -> None:
        self.add(count)

    @precondition(lambda self: self.ledger.end - self.ledger.first < 8)
    @rule(count=st.integers(1, 6))
    def add(self, count: int) -> None:
        self.ledger = self.call(add, count)
        for number in range(self.model.end(), self.model.end() + count):
            self.model.groups[number] = Group()

    @rule(source=st.sampled_from(SOURCES), most=st.integers(0, 4), seconds=seconds)
    def lease(self, source: str, most: int, seconds: float) -> None:
        """As many new groups where none waits and few are in the air."""
        if not self.ledger.waiting and len(places(self.ledger)) < 8:
            self.add(most)
        expected = sorted(self.model.at("waiting"))[:most]
        self.ledger, asked = self.call(lease, source, most, self.now + seconds)
        assert asked == tuple(expected)
        for number in expected:
            self.model.groups[number].lease = Lease(source, self.now + seconds)
            self.model.move(number, "rolling")

    @rule(distances=distances)
    def commit(self, distances: list[int]) -> None:
        """Answers in time, late, twice, after the lease was lost, or to the life before."""
        numbers = self.numbers(distances, "waiting", "rolling")
        self.ledger, fresh = self.call(commit, numbers)
        expected = []
        for number in numbers:
            if number in self.model.at("waiting", "rolling"):
                self.model.move(number, "ready")
                expected.append(number)
        assert fresh == tuple(expected)

    @rule(
        trainer=st.sampled_from(TRAINERS),
        distances=distances,
        seconds=seconds | st.just(math.inf),
    )
    def take(self, trainer: str, distances: list[int], seconds: float) -> None:
        numbers = self.numbers(distances, "ready")
        self.ledger, taken = self.call(take, trainer, numbers, self.now + seconds)
        expected = []
        for number in numbers:
            if number in self.model.at("ready"):
                self.model.groups[number].lease = Lease(trainer, self.now + seconds)
                self.model.move(number, "training")
                expected.append(number)
        assert taken == tuple(expected)

    @rule(distances=distances, step=st.integers(0, 5))
    def ack(self, distances: list[int], step: int) -> None:
        numbers = self.numbers(distances, "training", "ready")
        self.ledger, fresh = self.call(ack, numbers, step)
        expected = []
        for number in numbers:
            if number in self.model.at("training", "ready"):
                self.model.settle(number, Trained(step))
                self.model.step = max(step, self.model.step or 0)
                expected.append(number)
        assert fresh == tuple(expected)
        # The trainer makes its update of these.
        self.history += fresh

    @precondition(lambda self: self.ledger.rolling or self.ledger.training)
    @rule(
        holder=st.none() | holders,
        pick=st.integers(0, 7),
        distances=distances,
        retryable=st.booleans(),
    )
    def fail(self, holder: str | None, pick: int, distances: list[int], retryable: bool) -> None:
        """By anybody, or by one that holds a lease."""
        leases = [*self.ledger.rolling.values(), *self.ledger.training.values()]
        holder = holder or leases[pick % len(leases)].holder
        numbers = self.numbers(distances, "rolling", "training")
        self.ledger = self.call(fail, holder, numbers, retryable, "torn")
        for number in numbers:
            group = self.model.at("rolling", "training").get(number)
            if group is None or group.lease.holder != holder:
                continue
            if retryable:
                self.model.give_back(number)
            else:
                self.model.settle(number, GivenUp("torn"))
                self.model.given_up += 1
                self.abandoned.append(number)

    @rule(seconds=seconds)
    def expire(self, seconds: float) -> None:
        self.now += seconds
        held = self.model.at("rolling", "training").items()
        past = sorted((group.lease.until, n) for n, group in held if group.lease.until < self.now)
        self.ledger, ids = self.call(expire, self.now)
        assert ids == tuple(number for _, number in past)
        for number in ids:
            self.model.give_back(number)

    @rule(trainer=st.sampled_from(TRAINERS))
    def train_the_lowest(self, trainer: str) -> None:
        """All goes well with one group, unless somebody else holds it."""
        self.commit([0])
        self.take(trainer, [0], math.inf)
        self.ack([0], 0)

    @precondition(lambda self: not self.ledger.settled)
    @rule()
    def checkpoint(self) -> None:
        self.saved = (self.ledger.first, list(self.history), list(self.abandoned))

    @precondition(lambda self: len(self.history) > len(self.saved[1]) + 2)
    @rule()
    def crash(self) -> None:
        """The trained state is the checkpoint's again; sources may still answer the life before."""
        cursor, history, abandoned = self.saved
        self.ledger = opened(cursor)
        self.model = Model(cursor)
        self.history = list(history)
        self.abandoned = list(abandoned)
        self.add(8)

    @invariant()
    def every_group_is_in_exactly_one_place(self) -> None:
        assert sorted(places(self.ledger)) == [*range(self.ledger.first, self.ledger.end)]

    @invariant()
    def the_ledger_says_what_the_model_says(self) -> None:
        assert self.ledger == self.model.record()

    @invariant()
    def what_is_settled_is_in_the_history_once(self) -> None:
        settled = [*range(self.ledger.first), *self.ledger.settled]
        assert sorted(self.history + self.abandoned) == sorted(settled)

    @invariant()
    def records_hold_numbers_and_texts_alone(self) -> None:
        assert {type(leaf) for leaf in leaves(self.ledger)} <= {int, float, str, type(None)}

    def teardown(self) -> None:
        """Fair scheduling trains everything that was not given up, once, and leaves no trace."""
        end, trained = finish(self.ledger)
        history = self.history + trained
        assert sorted(history + self.abandoned) == [*range(end.end)]
        assert end == opened(end.end)._replace(step=end.step, given_up=end.given_up)


TestLife = Life.TestCase
# A life is short: more of them than of other properties.
TestLife.settings = settings(max_examples=3 * settings().max_examples)


# Whole runs


@dataclass
class Rollouts:
    """Two sources, one slower than its lease; answers are lost, or come twice, over crashes too."""

    chance: random.Random
    seen: Counter[str]
    idle_from: dict[str, float] = field(default_factory=lambda: dict.fromkeys(SOURCES, 0.0))
    answers: list[tuple[float, tuple[int, ...]]] = field(default_factory=list)

    def work(self, ledger: Ledger, now: float) -> Ledger:
        for source, needed in zip(SOURCES, (1.0, 6.0), strict=True):
            if now < self.idle_from[source]:
                continue
            ledger, asked = lease(ledger, source, self.chance.choice((1, 2)), now + 3.0)
            self.idle_from[source] = now + needed
            luck = self.chance.random()
            if luck < 0.1:
                self.seen["source died"] += 1
            elif luck < 0.2:
                self.seen["source failed"] += 1
                ledger = fail(ledger, source, asked, retryable=True)
            else:
                copies = 2 if luck < 0.4 else 1
                self.answers += [(now + needed + 2.0 * copy, asked) for copy in range(copies)]
        return ledger

    def deliver(self, ledger: Ledger, now: float) -> Ledger:
        for when, ids in [answer for answer in self.answers if answer[0] <= now]:
            self.answers.remove((when, ids))
            late = set(ids) - set(ledger.rolling)
            ledger, fresh = commit(ledger, ids)
            self.seen["late answer"] += len(late.intersection(fresh))
            self.seen["answer without effect"] += len(set(ids) - set(fresh))
        return ledger


def simulate(seed: int, groups: int, seen: Counter[str]) -> list[int]:
    """A run with faults up to its last group: what the trained state holds, in order."""
    chance = random.Random(seed)
    rollouts = Rollouts(chance, seen)
    ledger = opened()
    history: list[int] = []
    saved: list[int] = []
    now = 0.0
    while len(history) < groups:
        now += 1.0
        assert now < 100 * groups, "the run does not end"

        # Six groups in the air.
        room = min(6, groups - ledger.first) - (ledger.end - ledger.first)
        ledger = rollouts.work(add(ledger, room), now)
        ledger = rollouts.deliver(ledger, now)
        ledger, past = expire(ledger, now)
        seen["expired"] += len(past)

        # The next group, in order; the trainer's own process may end between the two.
        ledger, taken = take(ledger, TRAINERS[0], [ledger.first])
        if chance.random() < 0.05:
            seen["crash"] += 1
            seen["taken at a crash"] += len(taken)
            seen["trained again after a crash"] += len(history) - len(saved)
            ledger = opened(len(saved))
            history = list(saved)
            continue
        ledger, fresh = ack(ledger, taken, len(history))
        history += fresh
        if len(history) % 4 == 0:
            saved = list(history)
    return history


def test_runs_with_faults_train_every_group_once_and_in_order() -> None:
    seen: Counter[str] = Counter()
    for seed in range(20):
        assert simulate(seed, 60, seen) == [*range(60)], seed
    kinds = ("source died", "source failed", "late answer", "answer without effect", "expired")
    for kind in (*kinds, "crash", "taken at a crash", "trained again after a crash"):
        assert seen[kind] >= 20, (kind, seen)

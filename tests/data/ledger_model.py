"""A second ledger, kept one group at a time and for ever, and what tests of the first share."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from hypothesis import strategies as st

from eagle3fn.data.ledger import (
    GivenUp,
    Lease,
    Ledger,
    Trained,
    ack,
    commit,
    expire,
    fail,
    lease,
    take,
)

SOURCES = ("source-0", "source-1")
TRAINERS = ("trainer-0", "trainer-1")
LATER = 100.0  # a deadline that no test reaches
NOBODY = Lease("", math.inf)

holders = st.sampled_from((*SOURCES, *TRAINERS, "stranger"))
# Distances from the lowest group that is not settled: also settled groups, and ones never added.
distances = st.lists(st.integers(0, 5) | st.integers(-3, 9), min_size=1, max_size=6)


def places(ledger: Ledger) -> list[int]:
    """Every group that the record has in a place, as often as it is there."""
    return [
        *ledger.waiting,
        *ledger.rolling,
        *ledger.ready,
        *ledger.training,
        *ledger.settled,
    ]


def leaves(value: Any) -> Iterator[Any]:
    """What a record is made of."""
    if isinstance(value, Mapping):
        for pair in value.items():
            yield from leaves(pair)
    elif isinstance(value, tuple):
        for part in value:
            yield from leaves(part)
    else:
        yield value


def finish(ledger: Ledger, now: float = math.inf) -> tuple[Ledger, list[int]]:
    """Fair scheduling from here on, with the lowest group first; the groups in trained order."""
    trained: list[int] = []
    ledger, _ = expire(ledger, now)
    for holder in (*SOURCES, *TRAINERS):
        ledger = fail(ledger, holder, range(ledger.first, ledger.end), retryable=True)

    while ledger.first < ledger.end:
        ledger, asked = lease(ledger, SOURCES[0], 2, LATER)
        ledger, _ = commit(ledger, asked)
        ledger, taken = take(ledger, TRAINERS[0], ledger.ready[:1])
        ledger, fresh = ack(ledger, taken, 0 if ledger.step is None else ledger.step + 1)
        trained += fresh
        assert asked or fresh, ledger
    return ledger, trained


@dataclass
class Group:
    place: str = "waiting"
    lease: Lease = NOBODY
    attempts: int = 0
    outcome: Trained | GivenUp | None = None


@dataclass
class Model:
    start: int
    groups: dict[int, Group] = field(default_factory=dict)
    arrived: list[int] = field(default_factory=list)
    step: int | None = None
    given_up: int = 0

    def at(self, *names: str) -> dict[int, Group]:
        return {number: group for number, group in self.groups.items() if group.place in names}

    def end(self) -> int:
        return self.start + len(self.groups)

    def move(self, number: int, place: str) -> None:
        if self.groups[number].place == "ready":
            self.arrived.remove(number)
        if place == "ready":
            self.arrived.append(number)
        self.groups[number].place = place

    def give_back(self, number: int) -> None:
        if self.groups[number].place == "rolling":
            self.groups[number].attempts += 1
            self.move(number, "waiting")
        else:
            self.move(number, "ready")

    def settle(self, number: int, outcome: Trained | GivenUp) -> None:
        self.move(number, "settled")
        self.groups[number].outcome = outcome

    def record(self) -> Ledger:
        """The ledger that says the same."""
        unsettled = [number for number, group in self.groups.items() if group.place != "settled"]
        first = min(unsettled, default=self.end())
        return Ledger(
            first=first,
            end=self.end(),
            waiting=tuple(sorted(self.at("waiting"))),
            rolling={number: group.lease for number, group in self.at("rolling").items()},
            ready=tuple(self.arrived),
            training={number: group.lease for number, group in self.at("training").items()},
            settled={
                number: group.outcome
                for number, group in self.at("settled").items()
                if number > first and group.outcome is not None
            },
            attempts={n: self.groups[n].attempts for n in unsettled if self.groups[n].attempts},
            step=self.step,
            given_up=self.given_up,
        )

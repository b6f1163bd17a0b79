"""Laws of the ledger of an online run, and its answer to every fault."""

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eagle3fn.data.ledger import (
    GivenUp,
    Ledger,
    Trained,
    ack,
    add,
    bound,
    commit,
    expire,
    fail,
    lease,
    opened,
    take,
)
from tests.data.ledger_model import LATER, NOBODY, SOURCES, TRAINERS, distances, holders, places

# Laws, on records that drawn operations have made


class Operation(NamedTuple):
    name: str
    holder: str
    distances: list[int]
    number: int
    retryable: bool


NAMES = ("add", "lease", "lease", "commit", "commit", "take", "ack", "fail", "expire")
operations = st.builds(
    Operation, st.sampled_from(NAMES), holders, distances, st.integers(0, 5), st.booleans()
)


def play(steps: Sequence[Operation], ledger: Ledger) -> Ledger:
    for step in steps:
        ids = [ledger.first + distance for distance in step.distances]
        match step.name:
            case "add":
                ledger = add(ledger, step.number)
            case "lease":
                ledger, _ = lease(ledger, step.holder, step.number, float(step.number))
            case "commit":
                ledger, _ = commit(ledger, ids)
            case "take":
                ledger, _ = take(ledger, step.holder, ids, float(step.number))
            case "ack":
                ledger, _ = ack(ledger, ids, step.number)
            case "fail":
                ledger = fail(ledger, step.holder, ids, step.retryable, "torn")
            case "expire":
                ledger, _ = expire(ledger, float(step.number))
    return ledger


histories = st.lists(operations, max_size=30)
ledgers = histories.map(lambda steps: play(steps, add(opened(), 6)))

# What is said of groups by their numbers.
MESSAGES: dict[str, Callable[[Ledger, Sequence[int]], Ledger]] = {
    "commit": lambda ledger, ids: commit(ledger, ids)[0],
    "take": lambda ledger, ids: take(ledger, TRAINERS[0], ids, 3.0)[0],
    "ack": lambda ledger, ids: ack(ledger, ids, 3)[0],
    "fail": lambda ledger, ids: fail(ledger, SOURCES[0], ids, retryable=True),
    "give up": lambda ledger, ids: fail(ledger, SOURCES[0], ids, retryable=False, reason="torn"),
    "expire": lambda ledger, ids: expire(ledger, 3.0)[0],
}


@pytest.mark.parametrize("name", list(MESSAGES))
@given(ledger=ledgers, ids=st.lists(st.integers(-1, 12), max_size=6))
def test_a_message_that_comes_twice_counts_once(name: str, ledger: Ledger, ids: list[int]) -> None:
    message = MESSAGES[name]
    once = message(ledger, ids)
    assert message(once, ids) == once
    assert message(ledger, ids + ids) == once


@pytest.mark.parametrize("name", list(MESSAGES))
@given(
    ledger=ledgers,
    left=st.lists(st.integers(-1, 12), max_size=4),
    right=st.lists(st.integers(-1, 12), max_size=4),
)
def test_two_messages_are_one_about_both(
    name: str, ledger: Ledger, left: list[int], right: list[int]
) -> None:
    message = MESSAGES[name]
    assert message(message(ledger, left), right) == message(ledger, left + right)


@given(histories, st.integers(0, 10**6))
def test_nothing_depends_on_how_far_the_run_has_come(steps: list[Operation], start: int) -> None:
    def moved(numbers: Any) -> Any:
        if isinstance(numbers, Mapping):
            return {number + start: value for number, value in numbers.items()}
        return tuple(number + start for number in numbers)

    early = play(steps, add(opened(), 6))
    numbered = ("waiting", "rolling", "ready", "training", "settled", "attempts")
    expected = early._replace(
        first=early.first + start,
        end=early.end + start,
        **{name: moved(getattr(early, name)) for name in numbered},
    )
    assert play(steps, add(opened(start), 6)) == expected


def test_the_record_stays_small_and_forgets_the_past() -> None:
    """2,000 groups with eight in the air, out of order, with failures."""
    ledger = opened()
    for number in range(2000):
        ledger = add(ledger, min(8, 2000 - number) - (ledger.end - ledger.first))
        ledger, asked = lease(ledger, SOURCES[0], 8, LATER)
        ledger = fail(ledger, SOURCES[0], asked[::2], retryable=True)
        ledger, _ = commit(ledger, reversed(asked[1::2]))
        ledger, _ = commit(ledger, [ledger.first])
        ledger, taken = take(ledger, TRAINERS[0], [number])
        ledger, _ = ack(ledger, taken, number)
        assert ledger.first == number + 1
        assert len(places(ledger)) <= 8 and len(ledger.attempts) <= 8

    assert ledger == opened(2000)._replace(step=1999)


def test_a_record_cannot_be_changed() -> None:
    ledger, _ = lease(add(opened(), 2), SOURCES[0], 1, LATER)
    mappings = [field for field in ledger if isinstance(field, Mapping)]
    assert len(mappings) == 4
    for mapping in mappings:
        assert type(mapping) is MappingProxyType
    with pytest.raises(TypeError):
        ledger.rolling[0] = NOBODY  # pyright: ignore[reportIndexIssue]
    with pytest.raises(AttributeError):
        ledger.first = 1  # pyright: ignore[reportAttributeAccessIssue]


# Faults, one by one


def rolled_out(count: int, until: float = LATER) -> Ledger:
    """`count` groups that the first source rolls out."""
    return lease(add(opened(), count), SOURCES[0], count, until)[0]


def test_a_late_answer_wins_while_no_other_has_come() -> None:
    ledger, past = expire(rolled_out(1, until=1.0), 1.5)
    assert past == (0,) and ledger.waiting == (0,) and ledger.attempts == {0: 1}
    ledger, again = lease(ledger, SOURCES[1], 1, LATER)
    assert again == (0,)

    ledger, first = commit(ledger, [0])
    assert first == (0,) and ledger.ready == (0,) and not ledger.rolling
    same, second = commit(ledger, [0])
    assert second == () and same == ledger


def test_a_late_answer_spares_the_second_roll_out() -> None:
    ledger, _ = expire(rolled_out(1, until=1.0), 1.5)
    ledger, _ = commit(ledger, [0])
    same, asked = lease(ledger, SOURCES[1], 1, LATER)
    assert asked == () and same == ledger


def test_a_lease_ends_after_its_last_instant() -> None:
    ledger = rolled_out(1, until=1.0)
    assert expire(ledger, 1.0) == (ledger, ())
    assert expire(ledger, 1.0 + 1e-9)[1] == (0,)


def test_the_oldest_lease_expires_first() -> None:
    ledger = add(opened(), 3)
    for until in (3.0, 1.0, 2.0):
        ledger, _ = lease(ledger, SOURCES[0], 1, until)
    assert expire(ledger, 4.0)[1] == (1, 2, 0)


def test_a_lease_can_be_shortened_and_not_lengthened() -> None:
    ledger, _ = lease(add(opened(), 2), "a", 1, math.inf)
    ledger, _ = lease(ledger, "b", 1, 3.0)
    bounded = bound(ledger, {0: 5.0, 1: 9.0, 7: 1.0})
    assert {group: held.until for group, held in bounded.rolling.items()} == {0: 5.0, 1: 3.0}
    assert bounded._replace(rolling=ledger.rolling) == ledger


def test_only_the_holder_can_fail() -> None:
    ledger = rolled_out(2)
    for retryable in (True, False):
        assert fail(ledger, SOURCES[1], [0, 1], retryable, "torn") == ledger
    assert fail(ledger, SOURCES[0], [1], retryable=True).rolling.keys() == {0}


def test_what_failed_is_rolled_out_next() -> None:
    """A trainer takes groups in order: after others it would wait for this one the longer."""
    ledger, _ = lease(add(opened(), 5), SOURCES[0], 2, LATER)
    ledger = fail(ledger, SOURCES[0], [0], retryable=True)
    assert lease(ledger, SOURCES[1], 2, LATER)[1] == (0, 2)


def test_attempts_count_failures_and_expired_leases_until_the_group_is_settled() -> None:
    ledger = fail(rolled_out(2), SOURCES[0], [0], retryable=True)
    ledger, _ = lease(ledger, SOURCES[1], 1, until=1.0)
    ledger, past = expire(ledger, 1.5)
    assert past == (0,) and ledger.attempts == {0: 2}

    ledger, _ = commit(ledger, [0])
    ledger, _ = take(ledger, TRAINERS[0], [0])
    ledger = fail(ledger, TRAINERS[0], [0], retryable=True)
    assert ledger.ready == (0,) and ledger.attempts == {0: 2}
    assert ack(ledger, [0], 0)[0].attempts == {}


def test_a_late_acknowledgement_wins_while_nobody_else_has_trained() -> None:
    ledger, _ = commit(rolled_out(2), [0, 1])
    ledger, _ = take(ledger, TRAINERS[0], [0, 1], until=1.0)
    ledger, _ = expire(ledger, 1.5)
    assert ledger.ready == (0, 1) and not ledger.attempts
    ledger, again = take(ledger, TRAINERS[1], [0])
    assert again == (0,)

    # One was not taken again, the other was: its second trainer makes no update.
    ledger, trained = ack(ledger, [0, 1], 0)
    assert trained == (0, 1) and ledger.first == 2
    same, twice = ack(ledger, [0], 1)
    assert twice == () and same == ledger and same.step == 0


def test_what_is_given_up_is_counted_and_not_asked_for_again() -> None:
    ledger = fail(rolled_out(3), SOURCES[0], [1], retryable=False, reason="a row of NaN")
    assert ledger.settled == {1: GivenUp("a row of NaN")} and ledger.given_up == 1
    assert commit(ledger, [1]) == (ledger, ())

    ledger, _ = commit(ledger, [0])
    ledger, _ = take(ledger, TRAINERS[0], [0])
    ledger, _ = ack(ledger, [0], 0)
    assert ledger.first == 2 and not ledger.settled and ledger.given_up == 1


@pytest.mark.parametrize("number", [-1, 0, 3, 99])
def test_groups_that_are_settled_or_were_never_added_are_left_alone(number: int) -> None:
    ledger = add(opened(1), 2)
    for name, message in MESSAGES.items():
        assert message(ledger, [number]) == ledger, name


def test_the_highest_step_is_kept() -> None:
    ledger, _ = commit(rolled_out(3), [0, 1, 2])
    assert ledger.step is None
    ledger, _ = ack(ledger, [1], 7)
    ledger, _ = ack(ledger, [2], 3)
    assert ledger.step == 7 and ledger.settled == {1: Trained(7), 2: Trained(3)}

"""What has become of each group of an online run: an immutable record, and functions on it.

A *group* is what a source is asked for at once: the samples of one update. Groups are numbered by
consecutive ints, and each is in exactly one place:

    waiting --lease--> rolling --commit--> ready --take--> training --ack--> settled
       ^                  |                  ^                 |
       +-- fail, expire --+                  +-- fail, expire -+

A function returns the next record, and those it moved; the record it was given stays as it was.
Four rules hold:

- *Exactly once.* A group that is not where a function looks for it is left alone: an answer that
  comes twice, too late, or for a group that was never added has no effect. A trainer that makes its
  update of what `ack` returns, and of nothing else, trains on no group twice.
- *Late is better than again.* An answer counts while no other has come, whoever holds the lease
  by then. So does an acknowledgement.
- *The lowest first.* A group whose roll-out failed is the next to be rolled out: trainers take the
  groups in order, so one waits for it.
- *Nothing but what is in the air.* Groups below `first` are settled and forgotten. Size and time
  are bounded by `end - first`, and by the ids that are given, never by the run's length.

After a crash `opened` at the checkpoint's cursor begins a new record: `first` of the record of that
time, when nothing above it is settled. The record holds ints, floats and texts alone, and reads no
clock. Training from files needs none of this: there the cursor is all (`data.order`).
"""

import math
from collections.abc import Container, Iterable, Mapping
from types import MappingProxyType
from typing import NamedTuple, TypeVar

Value = TypeVar("Value")


class Lease(NamedTuple):
    """Who has a group, and for how long."""

    holder: str
    until: float  # seconds of the caller's clock


class Trained(NamedTuple):
    """An update was made of the group."""

    step: int


class GivenUp(NamedTuple):
    """No update will be made of the group."""

    reason: str


class Ledger(NamedTuple):
    """Where each group is. Every one in `[first, end)` is in exactly one of the five places."""

    first: int  # every group below is settled
    end: int  # the next group to be added
    waiting: tuple[int, ...] = ()  # to be rolled out, ascending
    rolling: Mapping[int, Lease] = MappingProxyType({})  # leased to sources
    ready: tuple[int, ...] = ()  # features have arrived, in that order
    training: Mapping[int, Lease] = MappingProxyType({})  # taken by trainers
    settled: Mapping[int, Trained | GivenUp] = MappingProxyType({})  # those above `first`
    attempts: Mapping[int, int] = MappingProxyType({})  # roll-outs that failed, if not settled
    step: int | None = None  # the highest one acknowledged
    given_up: int = 0  # how many groups, those below `first` among them


def opened(start: int = 0) -> Ledger:
    """The record of a run whose groups below `start` are trained."""
    return Ledger(start, start)


def add(ledger: Ledger, count: int = 1) -> Ledger:
    """The next `count` groups wait to be rolled out."""
    assert count >= 0, count
    end = ledger.end + count
    return ledger._replace(end=end, waiting=(*ledger.waiting, *range(ledger.end, end)))


def lease(ledger: Ledger, source: str, most: int, until: float) -> tuple[Ledger, tuple[int, ...]]:
    """Waiting → rolling: the lowest `most` groups, for `source`, until then."""
    assert most >= 0, most
    ids = ledger.waiting[:most]
    rolling = {**ledger.rolling, **dict.fromkeys(ids, Lease(source, until))}
    moved = ledger._replace(waiting=ledger.waiting[most:], rolling=MappingProxyType(rolling))
    return moved, ids


def commit(ledger: Ledger, ids: Iterable[int]) -> tuple[Ledger, tuple[int, ...]]:
    """Waiting or rolling → ready: features have arrived. The fresh ones are returned.

    Whoever holds the lease: a group whose lease expired or was given to another source is ready by
    the first answer, and later ones have no effect.
    """
    fresh = _among(ids, {*ledger.waiting, *ledger.rolling})
    moved = ledger._replace(
        waiting=_without(ledger.waiting, fresh),
        rolling=_drop(ledger.rolling, fresh),
        ready=ledger.ready + fresh,
    )
    return moved, fresh


def take(
    ledger: Ledger, trainer: str, ids: Iterable[int], until: float = math.inf
) -> tuple[Ledger, tuple[int, ...]]:
    """Ready → training: those of `ids` that are ready, for `trainer`, until then."""
    taken = _among(ids, set(ledger.ready))
    training = {**ledger.training, **dict.fromkeys(taken, Lease(trainer, until))}
    moved = ledger._replace(
        ready=_without(ledger.ready, taken), training=MappingProxyType(training)
    )
    return moved, taken


def ack(ledger: Ledger, ids: Iterable[int], step: int) -> tuple[Ledger, tuple[int, ...]]:
    """Training or ready → trained at `step`. The fresh ones are returned.

    A group is ready here if the trainer's lease has expired and nobody has taken it since. Without
    a fresh one nothing changes, `Ledger.step` neither.
    """
    fresh = _among(ids, {*ledger.ready, *ledger.training})
    if not fresh:
        return ledger, fresh

    highest = step if ledger.step is None else max(step, ledger.step)
    moved = _settle(ledger, dict.fromkeys(fresh, Trained(step)))._replace(step=highest)
    return moved, fresh


def fail(
    ledger: Ledger, holder: str, ids: Iterable[int], retryable: bool, reason: str = ""
) -> Ledger:
    """The holder cannot go on with these: of its own leases alone.

    Retryable: rolling → waiting, and one more of `attempts`; training → ready, as the last. Not
    retryable: given up, with the reason, which `settled` keeps while a lower group is in the air.
    """
    leases = {**ledger.rolling, **ledger.training}
    own = _among(ids, {group for group, held in leases.items() if held.holder == holder})
    if retryable:
        return _give_back(ledger, own)
    return _settle(ledger, dict.fromkeys(own, GivenUp(reason)))


def bound(ledger: Ledger, ends: Mapping[int, float]) -> Ledger:
    """Let the leases of these groups in `rolling` end at their time in `ends`, if that is earlier.

    For leases from before it was known how long a roll-out takes.
    """
    rolling = {}
    for group, held in ledger.rolling.items():
        rolling[group] = held._replace(until=min(held.until, ends.get(group, held.until)))
    return ledger._replace(rolling=MappingProxyType(rolling))


def expire(ledger: Ledger, now: float) -> tuple[Ledger, tuple[int, ...]]:
    """Leases with `until < now` end as retryable failures, the oldest first; these are returned."""
    leases = {**ledger.rolling, **ledger.training}
    past = sorted((held.until, group) for group, held in leases.items() if held.until < now)
    ids = tuple(group for _, group in past)
    return _give_back(ledger, ids), ids


def _give_back(ledger: Ledger, ids: tuple[int, ...]) -> Ledger:
    """Rolling → waiting, training → ready."""
    rolling = [group for group in ids if group in ledger.rolling]
    training = [group for group in ids if group in ledger.training]

    attempts = dict(ledger.attempts)
    for group in rolling:
        attempts[group] = attempts.get(group, 0) + 1

    return ledger._replace(
        waiting=tuple(sorted((*ledger.waiting, *rolling))),
        rolling=_drop(ledger.rolling, rolling),
        ready=(*ledger.ready, *training),
        training=_drop(ledger.training, training),
        attempts=MappingProxyType(attempts),
    )


def _settle(ledger: Ledger, outcomes: Mapping[int, Trained | GivenUp]) -> Ledger:
    """Rolling, ready or training → settled; what lies below the lowest unsettled is forgotten."""
    settled = {**ledger.settled, **outcomes}
    first = ledger.first
    while first in settled:
        del settled[first]
        first += 1

    given_up = sum(isinstance(outcome, GivenUp) for outcome in outcomes.values())
    return ledger._replace(
        first=first,
        rolling=_drop(ledger.rolling, outcomes),
        ready=_without(ledger.ready, outcomes),
        training=_drop(ledger.training, outcomes),
        settled=MappingProxyType(settled),
        attempts=_drop(ledger.attempts, outcomes),
        given_up=ledger.given_up + given_up,
    )


def _among(ids: Iterable[int], known: Container[int]) -> tuple[int, ...]:
    """Those of `ids` that are known, each once, in their order."""
    return tuple(dict.fromkeys(group for group in ids if group in known))


def _without(ids: tuple[int, ...], gone: Iterable[int]) -> tuple[int, ...]:
    gone = set(gone)
    return tuple(group for group in ids if group not in gone)


def _drop(entries: Mapping[int, Value], gone: Iterable[int]) -> Mapping[int, Value]:
    gone = set(gone)
    return MappingProxyType({key: value for key, value in entries.items() if key not in gone})

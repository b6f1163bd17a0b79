"""Groups of samples rolled out ahead by sources that may end, be slow, or answer twice.

    groups → admitted, as far as the buffer has room → leased to a source → ready → taken, in order

`rolled_out` is a stage of the data pipeline: groups in, their samples out, in the groups' order. A
*group* is what a source is asked for at once. What becomes of each is a `data.ledger.Ledger`, a
value that this file replaces under a lock; samples are kept apart from it. For each source of the
pool (`data.source_pool`, which also says what each lock protects) the stage has a thread, which
asks it for group after group. What a source had when it ended goes to whoever asks next.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from eagle3fn.base.errors import EngineGone, UserError
from eagle3fn.base.signals import StopRequested, received
from eagle3fn.base.types import Sample
from eagle3fn.data import ledger as ledgers
from eagle3fn.data.ledger import Ledger
from eagle3fn.data.samples import Encoded
from eagle3fn.data.source_pool import Pool, PooledSource
from eagle3fn.data.sources import FeatureSource
from eagle3fn.data.stages import stage

MOST_ATTEMPTS = 3
"""Sources that may end while they have a group, before the group is given up, and the run with
it."""
_STOPPING = 10.0  # seconds that samples are waited for once a signal asks the program to end
_CLOSING = 5.0  # seconds that a stage waits for a source that is at work when it is closed


class Group(NamedTuple):
    """What a source is asked for at once: an update's samples of this rank."""

    key: Any  # what whoever asks knows it by
    place: int  # of the data's order, at which what comes after it begins
    rows: Sequence[Encoded]  # tokens; or prompts, where the target writes on
    bytes: int  # of the samples, at most


Ask = Callable[[FeatureSource, Group], list[Sample]]
"""What a source computes of a group: its samples, in the rows' order."""


@stage
def rolled_out(
    groups: Iterable[Group], pool: Pool, ask: Ask, buffer: int
) -> Iterator[tuple[Group, list[Sample]]]:
    """The groups with their samples, in their order.

    Groups are admitted as long as the samples of all that are admitted fit the buffer, one always
    is; so a consumer that is slow stops the sources. A group counts until the next one is asked
    for.

    Args:
        groups: read as they are admitted.
        pool: the sources.
        ask: what a source computes of a group.
        buffer: bytes of samples that are waited for, ready, or in the consumer's hands.

    Raises:
        UserError: a source's answer cannot be right; sources ended again and again; none is left.
        StopRequested: a signal came, and no answer did for ten seconds.
    """
    work = _Work(pool, ask)
    coming = iter(groups)
    following = next(coming, None)
    admitted = deque[Group]()
    held = 0
    try:
        while True:
            while following is not None and (not admitted or held + following.bytes <= buffer):
                work.admit(following)
                admitted.append(following)
                held += following.bytes
                following = next(coming, None)
            if not admitted:
                return

            group = admitted.popleft()
            yield group, work.take()
            work.acknowledge(group.place)
            held -= group.bytes
    finally:
        work.close()


class _Work:
    """The groups of one stage: their ledger, their samples, and a thread for each source."""

    def __init__(self, pool: Pool, ask: Ask) -> None:
        self.pool = pool
        self.ask = ask
        self.ledger: Ledger = ledgers.opened()
        self.groups: dict[int, Group] = {}
        self.samples: dict[int, list[Sample]] = {}
        self.ended_with: dict[int, str] = {}  # the source that ended last while it had a group
        self.next = 0  # the group that is taken next
        self.fault: BaseException | None = None
        self.changed = threading.Condition()
        self.closed = threading.Event()
        self.threads: list[threading.Thread] = []

    # By the consumer

    def admit(self, group: Group) -> None:
        """Let sources take a group."""
        with self.changed:
            self.groups[self.ledger.end] = group
            self.ledger = ledgers.add(self.ledger)
            self.changed.notify_all()
        if not self.threads:
            self._start()

    def take(self) -> list[Sample]:
        """The samples of the next group, once they are there."""
        stopping: float | None = None  # when a signal was seen
        with self.changed:
            while self.next not in self.samples:
                if self.fault is not None:
                    raise self.fault
                if self.pool.closed.is_set():
                    raise UserError("the sources are closed: ask for samples within their block")
                if received() is not None:
                    stopping = stopping or time.monotonic()
                    if time.monotonic() - stopping > _STOPPING:
                        raise StopRequested(
                            "stopped while samples were waited for; look at the sources' logs"
                        )
                self.pool.note_waiting(self, True)
                self.changed.wait(1.0)
            self.pool.note_waiting(self, False)
            self.ledger, taken = ledgers.take(self.ledger, "trainer", (self.next,))
            assert taken == (self.next,)
            return self.samples.pop(self.next)

    def acknowledge(self, place: int) -> None:
        """Settle the group that was taken last: the consumer asks for what comes after `place`."""
        with self.changed:
            self.ledger, fresh = ledgers.ack(self.ledger, (self.next,), place)
            assert fresh == (self.next,)
            del self.groups[self.next]
            self.ended_with.pop(self.next, None)
            self.next += 1

    def close(self) -> None:
        """End the threads; one whose source is at work for long ends with the pool."""
        self.closed.set()
        self.pool.note_waiting(self, False)
        with self.changed:
            self.changed.notify_all()
        end = time.monotonic() + _CLOSING
        for thread in self.threads:
            thread.join(max(0.0, end - time.monotonic()))

    def _start(self) -> None:
        for source in self.pool.sources:
            thread = threading.Thread(
                target=self._serve, args=(source,), name=source.name, daemon=True
            )
            self.threads.append(thread)
            thread.start()

    # By the sources' threads

    def _serve(self, source: PooledSource) -> None:
        """Ask one source for group after group, until this stage is closed or it is given up."""
        try:
            while not self._is_over():
                if not source.await_open(self.closed):
                    self._check_left()
                    return
                leased = self._lease(source)
                if leased is None:
                    return
                number, group = leased
                try:
                    samples = self._asked(source, group)
                except EngineGone as error:
                    self._return(source, number, error)
                else:
                    self._commit(number, samples)
        except BaseException as error:
            self._fail(error)

    def _asked(self, source: PooledSource, group: Group) -> list[Sample]:
        """A group's samples by a source; an update may have none of this rank."""
        if not group.rows:
            return []
        return source.ask(lambda opened: self.ask(opened, group))

    def _is_over(self) -> bool:
        return self.closed.is_set() or self.pool.closed.is_set() or self.fault is not None

    def _lease(self, source: PooledSource) -> tuple[int, Group] | None:
        """A group for a source, once there is one; None where this stage is over."""
        with self.changed:
            while not self._is_over():
                now = time.monotonic()
                self._bound_leases(now)
                self.ledger, expired = ledgers.expire(self.ledger, now)
                if expired:
                    self.pool.count(again=len(expired))
                    self._check_attempts(expired, "no source has answered in time")
                if self.ledger.waiting and not (self.pool.gives_way(self) or self._leaves(source)):
                    until = now + self._seconds_for(self.ledger.waiting[0])
                    self.ledger, (number,) = ledgers.lease(self.ledger, source.name, 1, until)
                    return number, self.groups[number]
                ends = [lease.until for lease in self.ledger.rolling.values()]
                pause = 0.02 if self.ledger.waiting else 0.5
                self.changed.wait(min([pause, *(max(end - now, 0.001) for end in ends)]))
        return None

    def _leaves(self, source: PooledSource) -> bool:
        """Whether the group that comes next ended this source, and another one is well: it shall
        show whether the group or the source is at fault.
        """
        if self.ended_with.get(self.ledger.waiting[0]) != source.name:
            return False
        return any(other.is_well for other in self.pool.sources if other is not source)

    def _seconds_for(self, number: int) -> float:
        """How long a lease of a group lasts."""
        return self.pool.seconds_for(sum(len(row.input_ids) for row in self.groups[number].rows))

    def _bound_leases(self, now: float) -> None:
        """Give an end to leases from before a source had answered, once one has."""
        endless = [
            number for number, lease in self.ledger.rolling.items() if lease.until == math.inf
        ]
        if endless:
            ends = {number: now + self._seconds_for(number) for number in endless}
            self.ledger = ledgers.bound(self.ledger, ends)

    def _commit(self, number: int, samples: list[Sample]) -> None:
        """Take in what a source has answered, unless another one has before."""
        with self.changed:
            self.ledger, fresh = ledgers.commit(self.ledger, (number,))
            if fresh:
                self.samples[number] = samples
                self.changed.notify_all()
        if not fresh:
            self.pool.count(late=1)
            return
        tokens = sum(len(sample.input_ids) for sample in samples)
        self.pool.count(groups=1, samples=len(samples), tokens=tokens)

    def _return(self, source: PooledSource, number: int, error: EngineGone) -> None:
        """A source has ended while it had a group: others may take it."""
        if self._is_over():
            return
        with self.changed:
            self.ended_with[number] = source.name
            self.ledger = ledgers.fail(
                self.ledger, source.name, (number,), retryable=True, reason=str(error)
            )
            self.pool.count(again=1)
            self._check_attempts((number,), str(error))
            self.changed.notify_all()
        self.pool.say(f"{source.name}: {error}; opened again, what it had is asked for once more")

    def _check_attempts(self, numbers: Iterable[int], reason: str) -> None:
        """End the stage where a group seems to end whoever computes it."""
        for number in numbers:
            if self.ledger.attempts.get(number, 0) < MOST_ATTEMPTS:
                continue
            rows = ", ".join(repr(row.id) for row in self.groups[number].rows[:3])
            self.fault = UserError(
                f"samples {rows} …: asked for {MOST_ATTEMPTS} times in vain ({reason}); look at "
                "the sources' logs, or leave these conversations out"
            )
            self.changed.notify_all()

    def _check_left(self) -> None:
        """End the stage where every source is given up."""
        reasons = [source.given_up for source in self.pool.sources]
        if all(reasons) and not self._is_over():
            self._fail(UserError(f"no source is left: {reasons[-1]}"))

    def _fail(self, error: BaseException) -> None:
        with self.changed:
            if self.fault is None:
                self.fault = error
            self.changed.notify_all()

"""Groups of samples rolled out ahead by sources that may end, be slow, or answer twice.

    groups → admitted, as far as the buffer has room → leased to a source → ready → taken, in order

`rolled_out` is a stage: groups in, their samples out, in the groups' order. What becomes of each
group is a `data.ledger.Ledger`, a value that this file replaces under a lock; samples are kept
apart from it. Each source is asked by a thread of its own. One that ends is opened again; what it
had leased goes to whoever asks next.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

from eagle3fn.base.errors import UserError
from eagle3fn.base.signals import received
from eagle3fn.base.types import Sample
from eagle3fn.data import ledger as ledgers
from eagle3fn.data.ledger import Ledger
from eagle3fn.data.samples import Encoded
from eagle3fn.data.sources import FeatureSource
from eagle3fn.data.stages import stage
from eagle3fn.engines.process import ABANDONED, EngineGone

MOST_ATTEMPTS = 3
"""Sources that may end while they have a group, before the group is given up, and the run with
it."""
MOST_REOPENED = 8
"""Times that a source is opened again in a row, with no answer between them."""
_LONGEST_PAUSE = 60.0  # seconds before a source is opened again
_LEAST_LEASE = 60.0  # seconds
_LEASE_FACTOR = 10.0  # of the time that a group takes by the pace so far
_STOPPING = 10.0  # seconds that samples are waited for once a signal asks the program to end
_CLOSING = 5.0  # seconds that a stage waits for a source that is at work when it is closed


class StopRequested(UserError):
    """A signal asks the program to end, and the samples that come next are not there."""


class Group(NamedTuple):
    """What a source is asked for at once: an update's samples of this rank."""

    key: Any  # what whoever asks knows it by
    place: int  # of the data's order, at which what comes after it begins
    rows: Sequence[Encoded]  # tokens; or prompts, where the target writes on
    bytes: int  # of the samples, at most


class Source(NamedTuple):
    """Where features come from, opened when they are needed."""

    name: str  # for messages: "source 1"
    open: Callable[[], AbstractContextManager[FeatureSource]]


Ask = Callable[[FeatureSource, Group], list[Sample]]
"""What a source computes of a group: its samples, in the rows' order."""


class Counts(NamedTuple):
    """What a pool's sources have done so far."""

    groups: int = 0
    samples: int = 0
    tokens: int = 0
    reopened: int = 0  # sources that ended and were opened again
    again: int = 0  # groups that were asked for once more: their source ended, or was too slow
    late: int = 0  # answers that came after another source's

    def describe(self) -> str:
        """One line."""
        said = f"{self.samples:,} samples rolled out, {self.tokens:,} tokens"
        for count, what in (
            (self.reopened, "sources opened again"),
            (self.again, "updates' samples asked for once more"),
            (self.late, "late answers dropped"),
        ):
            said += f"; {count} {what}" if count else ""
        return said


class Pool:
    """Sources of one target, shared by several stages; a context manager that closes them.

    Args:
        sources: at least one. All must be alike: the target, what computes it and its settings.
        say: called with one line where a source ends and is opened again, by the source's thread.
        least_lease: seconds that a source has for a group before another source may take it over;
            ten times what the fastest source takes by its pace so far, if that is longer.
        pause: seconds before a source is opened again, doubled each time until it answers.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        say: Callable[[str], None] = lambda line: None,
        least_lease: float = _LEAST_LEASE,
        pause: float = 1.0,
    ) -> None:
        assert sources
        self.sources = [_OpenSource(source, self) for source in sources]
        self.say = say
        self.least_lease = least_lease
        self.pause = pause
        self.counts = Counts()
        self.closed = threading.Event()
        self.works: list[_Work] = []  # of the stages that are open
        self._lock = threading.Lock()
        self._identity: dict[str, Any] | None = None

    def first(self) -> FeatureSource:
        """The first source, opened: what its features are is known by it.

        Raises:
            UserError: it cannot be opened.
        """
        return self.sources[0].opened()

    def count(self, **more: int) -> None:
        """Add to the counts."""
        with self._lock:
            added = {name: getattr(self.counts, name) + number for name, number in more.items()}
            self.counts = self.counts._replace(**added)

    def check_alike(self, name: str, source: FeatureSource) -> None:
        """Refuse a source that is not like the first one that was opened.

        Raises:
            UserError: names the source and what differs.
        """
        with self._lock:
            if self._identity is None:
                self._identity = source.identity
            known = self._identity
        for key in sorted(known.keys() | source.identity.keys()):
            if known.get(key) != source.identity.get(key):
                raise UserError(
                    f"{name}: its {key} is {source.identity.get(key)!r:.200}, that of the first "
                    f"source was {known.get(key)!r:.200}; all sources of a run must be alike"
                )

    def seconds_for(self, tokens: int) -> float:
        """How long a lease of so many tokens lasts; without end before a source has answered."""
        paces = [source.pace for source in self.sources if source.pace is not None]
        if not paces or len(self.sources) == 1:
            return math.inf
        return max(self.least_lease, _LEASE_FACTOR * min(paces) * tokens)

    def close(self) -> None:
        """Close all sources; safe to call again."""
        self.closed.set()
        for source in self.sources:
            source.close()

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _OpenSource:
    """A source of a pool, and how to open it again."""

    def __init__(self, source: Source, pool: Pool) -> None:
        self.name = source.name
        self.pace: float | None = None  # the last seconds per token, with what waits for them
        self.given_up: EngineGone | None = None  # why it is not opened any more
        self._open = source.open
        self._pool = pool
        self._context: AbstractContextManager[FeatureSource] | None = None
        self._source: FeatureSource | None = None
        self._failed = 0  # times in a row, without an answer
        self._ended: EngineGone | None = None  # the last of these
        self._lock = threading.Lock()  # stages share a source: one asks at a time
        self._leaving = threading.Lock()

    @property
    def is_well(self) -> bool:
        """Whether it has not ended since its last answer."""
        return self._failed == 0 and self.given_up is None

    def opened(self) -> FeatureSource:
        """The source, opened if need be.

        Raises:
            UserError: it cannot be opened, or is not like the others.
        """
        with self._lock:
            return self._ready()

    def ask(self, ask: Ask, group: Group) -> list[Sample]:
        """The samples of a group.

        Raises:
            EngineGone: it has ended; asked again it is opened again.
            UserError: its answer cannot be right.
        """
        with self._lock:
            source = self._ready()
            begin = time.monotonic()
            try:
                samples = ask(source, group) if group.rows else []
            except EngineGone as error:
                self._leave()
                self._note(error)
                raise
            if samples:
                tokens = sum(len(sample.input_ids) for sample in samples)
                self.pace = (time.monotonic() - begin) / max(tokens, 1)
                self._failed = 0
        return samples

    def await_open(self, closed: threading.Event) -> bool:
        """Open it, in as many tries as a source that starts anew may need; False if it is given up,
        or `closed` is set.
        """
        while not closed.is_set() and not self._pool.closed.is_set():
            if self._failed > MOST_REOPENED:
                self.given_up = self._ended
                return False
            if self._failed and self._source is None:
                pause = self._pool.pause * 2 ** (self._failed - 1)
                closed.wait(min(pause, _LONGEST_PAUSE))
            try:
                self.opened()
                return True
            except EngineGone as error:
                self._note(error)
                self._pool.say(f"{self.name}: {error}; tried again")
        return False

    def close(self) -> None:
        """Close it, also while it is opened or at work: then who waits gets an `EngineGone`."""
        self._leave()
        if self._lock.acquire(timeout=_CLOSING):  # what was being opened is closed now
            self._lock.release()

    def _ready(self) -> FeatureSource:
        source = self._source
        if source is None:
            self._check_pool()
            context = self._open()
            source = context.__enter__()
            self._context = context
            self._source = source
            self._check_pool()  # it may have been closed meanwhile
            self._pool.check_alike(self.name, source)
            self.given_up = None
            if self._failed:
                self._pool.count(reopened=1)
        return source

    def _check_pool(self) -> None:
        """Open nothing that nobody would close."""
        if self._pool.closed.is_set():
            self._leave()
            raise EngineGone(f"{self.name}: was closed")

    def _note(self, error: EngineGone) -> None:
        """It has ended, or could not be opened."""
        self._failed += 1
        self._ended = error

    def _leave(self) -> None:
        with self._leaving:
            context = self._context
            self._context = None
            self._source = None
        if context is not None:
            context.__exit__(None, None, None)


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
        self.is_awaited = False  # the consumer waits for samples
        pool.works.append(self)

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
                self.is_awaited = True
                self.changed.wait(1.0)
            self.is_awaited = False
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
        self.pool.works.remove(self)
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

    def _serve(self, source: _OpenSource) -> None:
        """Ask one source for group after group, until this stage is closed or it is given up."""
        ABANDONED.set(self.pool.closed)
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
                    samples = source.ask(self.ask, group)
                except EngineGone as error:
                    self._return(source, number, error)
                else:
                    self._commit(number, samples)
        except BaseException as error:
            self._fail(error)

    def _is_over(self) -> bool:
        return self.closed.is_set() or self.pool.closed.is_set() or self.fault is not None

    def _lease(self, source: _OpenSource) -> tuple[int, Group] | None:
        """A group for a source, once there is one; None where this stage is over."""
        with self.changed:
            while not self._is_over():
                now = time.monotonic()
                self._bound_leases(now)
                self.ledger, expired = ledgers.expire(self.ledger, now)
                if expired:
                    self.pool.count(again=len(expired))
                    self._check_attempts(expired, "no source has answered in time")
                if self.ledger.waiting and not (self._gives_way() or self._leaves(source)):
                    until = now + self._seconds_for(self.ledger.waiting[0])
                    self.ledger, (number,) = ledgers.lease(self.ledger, source.name, 1, until)
                    return number, self.groups[number]
                ends = [lease.until for lease in self.ledger.rolling.values()]
                pause = 0.02 if self.ledger.waiting else 0.5
                self.changed.wait(min([pause, *(max(end - now, 0.001) for end in ends)]))
        return None

    def _gives_way(self) -> bool:
        """Whether another stage's consumer waits, as in an evaluation, and this one's does not."""
        return not self.is_awaited and any(work.is_awaited for work in list(self.pool.works))

    def _leaves(self, source: _OpenSource) -> bool:
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

    def _return(self, source: _OpenSource, number: int, error: EngineGone) -> None:
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

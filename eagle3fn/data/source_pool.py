"""The sources of one run's features: opened when they are needed, and again after they end.

A *source* computes the features of token ids: the target in this process, an engine's process, or a
server. A *pool* is a few of them, all alike, that several stages of the data pipeline share. It
knows how to ask them, not what for: which samples are asked for next is `data.rollout`'s business.

    closed --open--> open --ask--> open           an answer
      ^                |
      +--- EngineGone --+                         opened again after a pause, at most
                                                  MOST_REOPENED times without an answer between
"""

# Which lock protects what, in this file and in `data.rollout`:
#
# - `PooledSource._asking`: that stages which share a source open and ask it one at a time, and what
#   it knows of itself. It is held while the source is opened or computes, which may take minutes.
# - `PooledSource._leaving`: that a source is left once, by whoever comes first. It is apart from
#   `_asking`, as a pool that closes leaves its sources while they are asked.
# - `Pool._lock`: counts, identity, and which stages wait.
# - `rollout._Work.changed`: all that belongs to one stage; never held together with `_asking`.
#
# All but the first are held for moments; under `_leaving` and `Pool._lock` no other is taken.
# `is_well`, `given_up` and `pace` are read without a lock: one value each, and soon read again.

import math
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

from eagle3fn.base.errors import EngineGone, UserError
from eagle3fn.base.types import Sample
from eagle3fn.data.sources import FeatureSource

MOST_REOPENED = 8
"""Times that a source is opened again in a row, with no answer between them."""
_LONGEST_PAUSE = 60.0  # seconds before a source is opened again
_LEAST_LEASE = 60.0  # seconds
_LEASE_FACTOR = 10.0  # of the time that a group takes by the pace so far
_CLOSING = 5.0  # seconds that a pool waits for a source that is being opened or at work


class Source(NamedTuple):
    """Where features come from, opened when they are needed."""

    name: str  # for messages: "source 1"
    # Its argument is set once nobody waits for the source any more: then what is being opened or at
    # work may end at once, by `EngineGone`.
    open: Callable[[threading.Event], AbstractContextManager[FeatureSource]]


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

    Attributes:
        sources: in their order.
        counts: what they have done so far.
        closed: set when the pool is closed.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        say: Callable[[str], None] = lambda line: None,
        least_lease: float = _LEAST_LEASE,
        pause: float = 1.0,
    ) -> None:
        assert sources
        self.sources = [PooledSource(source, self) for source in sources]
        self.say = say
        self.least_lease = least_lease
        self.pause = pause
        self.counts = Counts()
        self.closed = threading.Event()
        self._lock = threading.Lock()
        self._identity: dict[str, Any] | None = None
        self._waiting: set[object] = set()  # stages whose consumer waits for samples

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

    def note_waiting(self, stage: object, waits: bool) -> None:
        """Note whether a stage's consumer waits for samples."""
        with self._lock:
            if waits:
                self._waiting.add(stage)
            else:
                self._waiting.discard(stage)

    def gives_way(self, stage: object) -> bool:
        """Whether another stage's consumer waits, as in an evaluation, and this one's does not."""
        with self._lock:
            return bool(self._waiting) and stage not in self._waiting

    def close(self) -> None:
        """Close all sources; safe to call again."""
        self.closed.set()
        for source in self.sources:
            source.close()

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class PooledSource:
    """A source of a pool, and how to open it again.

    Attributes:
        name: for messages.
        pace: the last seconds per token, with what waits for them; None before the first answer.
        given_up: why it is not opened any more; None where it is.
    """

    def __init__(self, source: Source, pool: Pool) -> None:
        self.name = source.name
        self.pace: float | None = None
        self.given_up: EngineGone | None = None
        self._open = source.open
        self._pool = pool
        self._context: AbstractContextManager[FeatureSource] | None = None
        self._source: FeatureSource | None = None
        self._failed = 0  # times in a row, without an answer
        self._ended: EngineGone | None = None  # the last of these
        self._asking = threading.Lock()
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
        with self._asking:
            return self._ready()

    def ask(self, compute: Callable[[FeatureSource], list[Sample]]) -> list[Sample]:
        """The samples that `compute` gets of the source, at least one.

        Raises:
            EngineGone: it has ended; asked again it is opened again.
            UserError: its answer cannot be right.
        """
        with self._asking:
            source = self._ready()
            begin = time.monotonic()
            try:
                samples = compute(source)
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

            error = self._try_to_open()
            if error is None:
                return True
            if not self._pool.closed.is_set():
                self._pool.say(f"{self.name}: {error}; tried again")
        return False

    def close(self) -> None:
        """Leave it, also while it is opened or at work: then who waits gets an `EngineGone`."""
        self._leave()
        if self._asking.acquire(timeout=_CLOSING):  # what was being opened is closed now
            self._asking.release()

    def _try_to_open(self) -> EngineGone | None:
        """Why it is not open; None if it is."""
        with self._asking:
            try:
                self._ready()
            except EngineGone as error:
                self._note(error)
                return error
        return None

    def _ready(self) -> FeatureSource:
        source = self._source
        if source is None:
            self._check_pool()
            context = self._open(self._pool.closed)
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

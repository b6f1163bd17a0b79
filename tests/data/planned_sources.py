"""Sources that fail, wait or answer wrongly by a plan; no model computes."""

from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any, NoReturn

import torch

from eagle3fn.base.errors import EngineGone
from eagle3fn.base.types import Sample
from eagle3fn.data.rollout import Group
from eagle3fn.data.samples import Encoded
from eagle3fn.data.source_pool import Pool, Source
from eagle3fn.data.sources import FeatureSource

TAPS = 3
HIDDEN = 4
BYTES = 100  # of a group


def row_of(number: int) -> Encoded:
    ids = torch.arange(3 + number % 3) + number
    return Encoded(f"row{number}", ids, torch.ones_like(ids))


def sample_of(row: Encoded) -> Sample:
    """What a right source gives: features that the tokens decide."""
    states = (row.input_ids[:, None] + torch.arange(HIDDEN)).bfloat16()
    return Sample(row.input_ids, row.token_mask, states.repeat(1, TAPS), states)


def groups_of(count: int) -> list[Group]:
    """Groups of one row each, whose keys are their numbers."""
    return [Group(number, number + 1, [row_of(number)], BYTES) for number in range(count)]


def ask(source: FeatureSource, group: Group) -> list[Sample]:
    return source.features(group.rows, torch.bfloat16)


class Sources:
    """Sources that do as a plan says, and note what they are asked.

    Args:
        act: called with a source's name and "open", or the group's key that it is asked for, before
            it opens or answers; it may wait or raise.
        wrong: changes an answer.

    Attributes:
        asked: name and key, in the order in which they came.
        opened: how often, by name.
        closed: how often, by name.
    """

    def __init__(
        self,
        act: Callable[[str, Any], object] = lambda name, key: None,
        wrong: Callable[[list[Sample]], list[Sample]] = lambda samples: samples,
    ) -> None:
        self.act = act
        self.wrong = wrong
        self.asked: list[tuple[str, int]] = []
        self.opened = Counter[str]()
        self.closed = Counter[str]()

    def source(self, name: str, identity: str = "one") -> Source:
        @contextmanager
        def opened(abandoned):
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

    def keys_of(self, name: str) -> list[int]:
        """What a source was asked for."""
        return [key for asked, key in self.asked if asked == name]


def pool_of(sources: Sources, count: int, **options: Any) -> Pool:
    """A pool of the sources "s0", "s1", … with short leases and pauses."""
    given = {"least_lease": 0.1, "pause": 0.001, **options}
    return Pool([sources.source(f"s{number}") for number in range(count)], **given)


def gone(*_: object) -> NoReturn:
    raise EngineGone("toy: was killed")

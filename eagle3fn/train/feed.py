"""Batches of a run whose features are computed as it trains: all ranks agree that they are there.

A rank whose sources have failed has no batch, while the others wait for it in the update. So each
update's batch is announced before it is used: where one rank has none, all stop at the same step,
and what they have trained can be saved.
"""

import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from eagle3fn.base.errors import UserError
from eagle3fn.base.launch import World
from eagle3fn.base.signals import StopRequested
from eagle3fn.base.types import Batch


class Announced(NamedTuple):
    """What a rank says of its next batch."""

    fault: str | None  # why it has none
    stops: bool  # it has none, as a signal asks it to end
    counts: Tensor | None  # rows trained at each unroll step, where ranks know their own alone


class Feed:
    """The micro-batches of each update, as an iterator.

    Args:
        items: this rank's.
        world: the ranks; all must ask alike.
        counted: whether the batches' row counts are of this rank's samples alone, as where the
            target writes the answers; they are added up.
    """

    def __init__(
        self, items: Iterator[tuple[Batch, ...]], world: World, counted: bool = False
    ) -> None:
        self._items = items
        self._world = world
        self._counted = counted
        self._begin = time.monotonic()
        self._waited = 0.0

    def __iter__(self) -> Iterator[tuple[Batch, ...]]:
        return self

    def __next__(self) -> tuple[Batch, ...]:
        """The next update's batches; the end, too, where a signal came and they do not.

        Raises:
            UserError: this rank's sources have failed, or another's.
        """
        begin = time.monotonic()
        micro: tuple[Batch, ...] | None = None
        fault: Exception | None = None
        stops = False
        try:
            micro = next(self._items, None)
        except StopRequested:
            stops = True
        except Exception as error:
            fault = error
        self._waited += time.monotonic() - begin

        if self._world.size > 1:
            micro = self._agreed(micro, fault, stops)
        if fault is not None:
            raise fault
        if micro is None:
            raise StopIteration
        return micro

    def _agreed(
        self, micro: tuple[Batch, ...] | None, fault: Exception | None, stops: bool
    ) -> tuple[Batch, ...] | None:
        """The batches, once all ranks have theirs, with the counts of all; None where one stops.

        Raises:
            UserError: another rank has none.
        """
        counts = micro[0].row_counts if micro and self._counted else None
        own = Announced(
            None if fault is None else str(fault), stops, None if counts is None else counts.cpu()
        )
        every: list[Announced] = self._world.every(own)
        for rank, other in enumerate(every):
            if other.fault and fault is None:
                raise UserError(f"rank {rank}: {other.fault}")
        if any(other.stops for other in every):
            return None
        if micro is None or fault is not None or counts is None:
            return micro
        total = (
            torch.stack([other.counts for other in every if other.counts is not None])
            .sum(0)
            .to(counts.device)
        )
        return tuple(batch._replace(row_counts=total) for batch in micro)

    def share_waited(self) -> float:
        """The share of the time so far that updates waited for batches."""
        return self._waited / max(time.monotonic() - self._begin, 1e-9)

"""Which keys of step 0 a row attends to: the one question that every kind of attention asks."""

from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from eagle3fn.base.draft_config import DraftConfig

Place = TypeVar("Place", int, Tensor)


class Visible(NamedTuple):
    """The keys of step 0 that a row sees are those at the places `first … last` of its row of the
    batch.

    Besides, a row always sees its own keys of the unroll steps up to the present one.
    """

    # Below 0 is as 0. None: from the beginning, and `last` is the row's own place, at every step
    first: Tensor | int | None
    last: Tensor | int  # at step 0 not below `first`


def visible(config: DraftConfig, place: Place, step: int, start: Tensor | None = None) -> Visible:
    """What the row at `place` sees at an unroll step, where it is `step` positions further on.

    Every key of its conversation up to its own place; with a window of `W` positions, those from
    `place + step - W + 1` on. The row's own keys lie within a window of at least K.

    `start` is the first place of the row's conversation in a packed row (`Batch.starts`); None: the
    first place there is.
    """
    first: Any = start
    if config.draft_window is not None:
        first = place + step - config.draft_window + 1
        if start is not None:
            first = torch.maximum(first, start)
    return Visible(first=first, last=place)

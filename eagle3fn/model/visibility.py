"""Which keys of step 0 a row attends to: the one question that every kind of attention asks."""

from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from eagle3fn.base.draft_config import DraftConfig

Place = TypeVar("Place", int, Tensor)


class Visible(NamedTuple):
    """The keys of step 0 that a row sees are those at the places `first … last` of its sample.

    Besides, a row always sees its own keys of the unroll steps up to the present one.
    """

    # Below 0 is as 0. None: from the beginning, and `last` is the row's own place, at every step
    first: Tensor | int | None
    last: Tensor | int  # at step 0 not below `first`


def visible(config: DraftConfig, place: Place, step: int) -> Visible:
    """What the row at `place` of its sample sees at an unroll step, where its position is `place +
    step`.

    Every key up to its own place; with a window of `W` positions, those from `place + step - W + 1`
    on. The row's own keys lie within a window of at least K.
    """
    first: Any = None
    if config.draft_window is not None:
        first = place + step - config.draft_window + 1
    return Visible(first=first, last=place)

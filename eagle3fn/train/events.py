"""What a training calls while it runs, and how it says that it ended."""

from collections.abc import Callable
from typing import Any, NamedTuple

from eagle3fn.base import progress
from eagle3fn.base.types import Frozen, Params


class End(NamedTuple):
    """How a run stands when a call of `train` begins or ends."""

    step: int  # updates made
    total: int  # of the whole run
    early: bool  # by `train.patience`
    compared: bool  # held-out samples have chosen the draft
    owes: bool = False  # the evaluation of this step, whose features did not come

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to do."""
        return (self.early or self.step >= self.total) and not self.owes


class Events(NamedTuple):
    """What the loop calls: with each metrics row; each held-out row; each draft to publish, which
    is the untrained one, then the best so far, or without held-out samples the newest; each line
    about what it found and left out; and with how the call ended.

    `on_ready` is called first, before anything is written, with how the run stands and its best
    held-out accepted length so far (0: none was measured); what it raises ends the call.
    """

    on_ready: Callable[[End, float], None] = lambda end, best: None

    on_step: Callable[[dict[str, Any], int], None] = lambda row, total: None
    on_eval: Callable[[dict[str, Any]], None] = lambda row: None
    on_draft: Callable[[Params, Frozen, dict[str, Any]], None] = lambda params, frozen, row: None
    on_notice: Callable[[str], None] = progress.say
    on_end: Callable[[End], None] = lambda end: None

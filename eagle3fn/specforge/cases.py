"""Drawn cases as SpecForge can run them."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from eagle3fn.specforge.arithmetic import BATCH_MEANS
from eagle3fn.testing.builders import Case
from eagle3fn.testing.strategies import cases

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

_NEAREST_LOSS = {"nla": "lk_alpha", "lk": "lk_lambda"}


def for_specforge(case: Case) -> Case:
    """The nearest case that SpecForge can run.

    Its drafts are as wide as their target and have no switches, and its loss is divided by the
    number of all rows. In place of the losses by row it has two with means over the whole batch.
    """
    loss = case.loss
    if loss not in BATCH_MEANS:
        parts = [loss] if isinstance(loss, str) else loss  # of a sum, the first with such a mean
        loss = next((_NEAREST_LOSS[part] for part in parts if part in _NEAREST_LOSS), "kl")
    return replace(
        case, target_hidden=case.hidden, normalization="rows", loss=loss, switches=(), taps=3
    )


def specforge_cases(**pins: Any) -> "SearchStrategy[Case]":
    """A Hypothesis strategy of cases that SpecForge can run; `pins` as for `testing.cases`."""
    return cases(**pins).map(for_specforge)

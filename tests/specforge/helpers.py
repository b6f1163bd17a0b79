"""Sides of a comparison with SpecForge: our recipe at each level, and one case held on both sides.

Levels are those of `eagle3fn.specforge.oracle`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from torch import Tensor

from eagle3fn import specforge
from eagle3fn.base.types import Aux, Batch, Frozen, Params
from eagle3fn.model.forward import forward
from eagle3fn.model.unroll import Ops
from eagle3fn.specforge.arithmetic import KL, SPECFORGE, kl_loss, score
from eagle3fn.specforge.cases import for_specforge
from eagle3fn.specforge.oracle import Oracle, load_oracle, run_oracle
from eagle3fn.testing.builders import Case
from eagle3fn.testing.equivalence import assert_same
from eagle3fn.testing.results import ForwardLoss, Result, differences, named, run_forward
from eagle3fn.train.recipe import Recipe
from tests.reference.adapter import run_reference

Level = Literal[1, 2]

__all__ = [
    "Case",
    "hold_package",
    "hold_reference",
    "level_on",
    "load_oracle",
    "loss_at",
    "loss_with",
    "recipe_at",
    "reference_result",
]


def level_on(device: str) -> Level:
    """On a card each side computes its loss with its own Triton kernel; elsewhere both eagerly."""
    return 1 if device == "cuda" else 2


def loss_with(kl: KL | None = None, ops: Ops = SPECFORGE) -> ForwardLoss:
    """SpecForge's arithmetic with another KL than its device's, or with other operations."""

    def function(
        params: Params, batch: Batch, *, config: Any, frozen: Frozen, loss: Any = None
    ) -> tuple[Tensor, Aux]:
        assert loss is None, "SpecForge's arithmetic has SpecForge's losses"
        changed = ops._replace(score=partial(score, kl=kl))
        return forward(params, batch, config, frozen, changed, None)

    return function


def loss_at(level: Level) -> ForwardLoss:
    """Our side's loss: SpecForge's arithmetic.

    At level 1 its KL on a card is a Triton kernel. At level 2 it is the plain expression on every
    device.
    """
    return specforge.forward_loss if level == 1 else loss_with(kl_loss)


def recipe_at(level: Level) -> Recipe:
    """SpecForge's recipe with the loss of `loss_at`."""
    return specforge.RECIPE._replace(loss=loss_at(level))


def reference_result(case: Case, device: str = "cpu") -> Result:
    """Everything that is compared of the reference, by name; gradients under their leaf's."""
    loss, metrics, gradients = run_reference(case, device)
    return named(loss, metrics, gradients)  # pyright: ignore[reportArgumentType]


def hold_reference(oracle: Oracle, case: Case, device: str = "cpu") -> Result:
    """Compare SpecForge and the reference on one case, at level 2; returns SpecForge's result."""
    return _hold(
        lambda case: run_oracle(oracle, case, 2, "sdpa", device),
        lambda case: reference_result(case, device),
        case,
        "hold_reference",
    )


def hold_package(oracle: Oracle, case: Case, device: str = "cpu") -> Result:
    """Compare SpecForge and the package on one case, at the device's level; SpecForge's result."""
    level = level_on(device)
    return _hold(
        lambda case: run_oracle(oracle, case, level, "sdpa", device),
        lambda case: run_forward(loss_at(level), case, device),
        case,
        "hold_package",
    )


def _hold(
    specforge_side: Callable[[Case], Result],
    our_side: Callable[[Case], Result],
    case: Case,
    name: str,
) -> Result:
    """Compare two sides by `torch.equal`; a failure ends with lines that repeat it by `name`."""

    def repeat(case: Case) -> str:
        lines = ["import tests.conftest  # before torch is loaded"]
        lines += ["from tests.specforge.helpers import *", ""]
        lines += [f"{name}(load_oracle(), {case})"]
        return "\n".join(lines)

    expected = specforge_side(case)
    if differences(expected, our_side(case)):
        # Once more, to find the simplest case.
        assert_same(
            specforge_side,
            our_side,
            case,
            repeat,
            can_run=lambda case: for_specforge(case) == case,
        )
    return expected

"""Updates of our step and of SpecForge's script on the same batches, compared one by one."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from eagle3fn.base.types import Batch, TrainState
from tests.specforge.oracle_script import LeafState, ScriptTrainer, leaf_states


def check_updates(
    functions: Any, state: TrainState, theirs: ScriptTrainer, updates: Sequence[Sequence[Batch]]
) -> TrainState:
    """Make every update on both sides; norm, rate, losses and every leaf are equal after each.

    Args:
        functions: ours, bound.
        state: ours, to begin with.
        theirs: SpecForge's script, at the same start.
        updates: the micro-batches of each.

    Returns:
        Our state after the last.
    """
    for index, batches in enumerate(updates):
        rate = theirs.optimizer.get_learning_rate()
        state, metrics = functions.step(state, tuple(batches))

        # SpecForge's micro-batches; the losses it reports are divided by their number.
        norm: Tensor | None = None
        losses = torch.zeros_like(metrics["aux"].losses)
        for batch in batches:
            seen = theirs.micro_step(batch, len(batches))
            norm = seen.norm
            losses = losses + torch.stack([loss.detach() for loss in seen.losses]) / len(batches)

        assert norm is not None
        assert torch.equal(metrics["grad_norm"], norm), index
        assert metrics["learning_rate"] == rate, index
        assert torch.equal(metrics["aux"].losses, losses), index
        check_state(state, theirs.state(), index)
    return state


def check_state(state: TrainState, expected: dict[str, LeafState], where: Any) -> None:
    """Weights, masters and moments of every leaf are equal, in the same order of leaves."""
    ours = leaf_states(state)
    assert list(ours) == list(expected), where
    for name, leaf in expected.items():
        for part, value in leaf._asdict().items():
            mine = getattr(ours[name], part)
            assert mine.dtype == value.dtype, (where, part, name)
            assert torch.equal(mine, value), (where, part, name)

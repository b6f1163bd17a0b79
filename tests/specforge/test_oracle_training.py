"""The package's `step` equals the old script's own `run_forward` and `run_backward_and_update`, update by update.

Those two functions are read out of the commit's script and run as they stand, on one rank. On a card each side computes
its loss with its own Triton kernel (level 1); on the CPU `Tensor.cuda` does nothing, and the loss kernel is replaced by
its eager expression (level 2).
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import Tensor

import eagle3fn as e3
from eagle3fn.base.config import OptimizerConfig
from eagle3fn.base.types import TrainState
from eagle3fn.specforge.cases import for_specforge
from eagle3fn.specforge.oracle import Oracle
from eagle3fn.testing.builders import Case, on, tiny_batch, tiny_frozen, tiny_params
from eagle3fn.testing.strategies import drawn
from tests.tally import Tally
from tests.factories import GATE
from tests.specforge.oracle_script import Script, ScriptTrainer, load_script


@pytest.fixture(scope="module")
def script(commit: Oracle) -> Script:
    return load_script(commit)


def same_state(state: TrainState, old: dict[str, tuple[Tensor, ...]]) -> bool:
    assert list(state.params) == list(old)
    ours = {
        name: (state.params[name], state.masters[name], state.opt.mu[name], state.opt.nu[name])
        for name in old
    }
    return all(
        torch.equal(a, b) and a.dtype == b.dtype
        for name in old
        for a, b in zip(ours[name], old[name], strict=True)
    )


def train_both(
    oracle: Oracle,
    script: Script,
    case: Case,
    choice: OptimizerConfig,
    total: int,
    micro: int,
    device: str = "cpu",
) -> bool:
    """Five updates on both sides, the last past the schedule's end if `total` is 4; True if every leaf has moved."""
    config, params = case.config(choice, total), on(device, tiny_params(case))
    fns = e3.bind(config, on(device, tiny_frozen(case)))
    level = 1 if device == "cuda" else 2
    old = ScriptTrainer(oracle, script, case, choice, total, device, level=level)
    state = fns.init_state(params)
    for index in range(5):
        batches = tuple(on(device, tiny_batch(case, index * micro + i)) for i in range(micro))
        rate = old.optimizer.get_learning_rate()
        state, metrics = fns.step(state, batches)
        norm, summed = None, None
        for batch in batches:
            seen = old.micro_step(batch, micro)
            norm, steps = seen.norm, torch.stack([loss.detach() for loss in seen.losses]) / micro
            summed = steps if summed is None else summed + steps
        assert norm is not None and torch.equal(metrics["grad_norm"], norm), index
        assert metrics["learning_rate"] == rate, index
        assert summed is not None and torch.equal(metrics["aux"].losses, summed), index
        assert same_state(state, old.state()), index
    return all(not torch.equal(state.masters[name], params[name].float()) for name in params)


@pytest.mark.parametrize("micro", [1, 2, 3])
def test_drawn_training_equals_the_old_script(
    commit: Oracle, script: Script, micro: int, device: str, tally: Tally
) -> None:
    """Fifteen drawn cases each at most; losses by acceptance with one micro-batch alone, as ours has them."""
    for index, drawn_case in enumerate(drawn(min(15, settings().max_examples), micro)):
        case = for_specforge(drawn_case if micro == 1 else replace(drawn_case, loss="kl"))
        choice = OptimizerConfig(
            learning_rate=(3e-3, 1e-2)[index % 2], warmup_ratio=(0.0, 0.3, 0.015)[index % 3],
            max_grad_norm=(0.5, 5.0)[index % 2], schedule="legacy", accumulation="legacy",
        )  # fmt: skip
        tally.add(
            case, train_both(commit, script, case, choice, (4, 10, 17)[index % 3], micro, device)
        )
    tally.check()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_old_gates_own_shapes(commit: Oracle, script: Script, dtype: Any, device: str) -> None:
    choice = OptimizerConfig(learning_rate=1e-2, schedule="legacy", accumulation="legacy")
    assert train_both(commit, script, replace(GATE, dtype=dtype), choice, 10, 2, device)


def test_a_better_setting_is_told_apart(commit: Oracle, script: Script, device: str) -> None:
    """The control: the closed-form schedule and sums in fp32 are not the old script's."""
    for change in ({"schedule": "cosine"}, {"accumulation": "fp32"}):
        choice = replace(OptimizerConfig(schedule="legacy", accumulation="legacy"), **change)
        with pytest.raises(AssertionError):
            train_both(commit, script, GATE, choice, 10, 2, device)

"""The package's `step` equals SpecForge's script, update by update.

The script's functions `run_forward` and `run_backward_and_update` are read out of the commit's
script and run as they are, on one rank. On a card each side computes its loss with its own Triton
kernel (level 1). On the CPU `Tensor.cuda` does nothing, and the loss kernel is replaced by its
eager expression (level 2).
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import settings

import eagle3fn as e3
from eagle3fn import specforge
from eagle3fn.base.sections import OptimizerConfig
from eagle3fn.specforge.cases import for_specforge
from eagle3fn.specforge.oracle import Oracle
from eagle3fn.testing.builders import Case, on, tiny_batch, tiny_frozen, tiny_params
from eagle3fn.testing.strategies import drawn
from eagle3fn.train.recipe import Recipe
from eagle3fn.train.schedules import cosine
from tests.factories import GATE
from tests.specforge.helpers import level_on, recipe_at
from tests.specforge.oracle_script import Script, ScriptTrainer, load_script
from tests.specforge.script_updates import check_state, check_updates
from tests.tally import Tally

OPTIMIZER = OptimizerConfig(learning_rate=1e-2, accumulation="params")


@pytest.fixture(scope="module")
def script(commit: Oracle) -> Script:
    return load_script(commit)


def train_both(
    oracle: Oracle,
    script: Script,
    case: Case,
    optimizer: OptimizerConfig,
    total: int,
    micro: int,
    device: str = "cpu",
    changed: Recipe | None = None,
) -> bool:
    """Five updates on both sides; the last is past the schedule's end if `total` is 4.

    `changed` replaces SpecForge's recipe on our side. True if every leaf has moved.
    """
    level = level_on(device)
    params = on(device, tiny_params(case))
    functions = e3.bind(
        case.config(optimizer, total),
        on(device, tiny_frozen(case)),
        recipe=changed or recipe_at(level),
    )
    theirs = ScriptTrainer(oracle, script, case, optimizer, total, device, level=level)
    state = functions.init_state(params)
    updates = [
        [on(device, tiny_batch(case, index * micro + i)) for i in range(micro)]
        for index in range(5)
    ]
    state = check_updates(functions, state, theirs, updates)
    return all(not torch.equal(state.masters[name], params[name].float()) for name in params)


@pytest.mark.parametrize("micro", [1, 2, 3])
def test_drawn_training_equals_specforges_script(
    commit: Oracle, script: Script, micro: int, device: str, tally: Tally
) -> None:
    """Fifteen drawn cases each at most; losses by acceptance with one micro-batch alone."""
    for index, drawn_case in enumerate(drawn(min(15, settings().max_examples), micro)):
        case = for_specforge(drawn_case)
        if micro > 1:
            case = replace(case, loss="kl", kl_scale=Case.kl_scale, kl_decay=Case.kl_decay)
        optimizer = OptimizerConfig(
            learning_rate=(3e-3, 1e-2)[index % 2],
            warmup_ratio=(0.0, 0.3, 0.015)[index % 3],
            max_grad_norm=(0.5, 5.0)[index % 2],
            accumulation="params",
        )
        total = (4, 10, 17)[index % 3]
        moved = train_both(commit, script, case, optimizer, total, micro, device)
        tally.add(case, moved)
    tally.check()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_at_the_shapes_of_specforges_gates_is_equal(
    commit: Oracle, script: Script, dtype: Any, device: str
) -> None:
    case = replace(GATE, dtype=dtype)
    assert train_both(commit, script, case, OPTIMIZER, 10, 2, device)


def test_another_schedule_or_accumulation_is_detected(
    commit: Oracle, script: Script, device: str
) -> None:
    """The control: the closed-form schedule and sums in fp32 are not SpecForge's."""
    closed_form = recipe_at(level_on(device))._replace(schedule=cosine)
    with pytest.raises(AssertionError):
        train_both(commit, script, GATE, OPTIMIZER, 10, 2, device, closed_form)

    in_fp32 = replace(OPTIMIZER, accumulation="fp32")
    with pytest.raises(AssertionError):
        train_both(commit, script, GATE, in_fp32, 10, 2, device)


def test_specforge_recipe_trains_three_steps_as_specforges_script(
    commit: Oracle, script: Script
) -> None:
    """`specforge.recipe` and `bind`, as a user calls them, from the recipe's own start."""
    case = Case(dtype="bfloat16", steps=3)
    frozen = tiny_frozen(case)
    config, recipe = specforge.recipe(
        case.draft(), objective={"ttt_length": 3}, train={"steps": 3, "seed": 5}
    )
    functions = e3.bind(config, frozen, recipe=recipe)
    params = functions.init(config.train.seed)
    state = functions.init_state(params)

    theirs = ScriptTrainer(commit, script, case, config.optimizer, config.train.steps)
    with torch.no_grad():
        for name, master in zip(params, theirs.optimizer.fp32_params, strict=True):
            theirs.draft.get_parameter(name).copy_(params[name])
            master.copy_(params[name])

    for index in range(3):
        batch = tiny_batch(case, index)
        state, metrics = functions.step(state, batch)
        seen = theirs.micro_step(batch)
        assert seen.norm is not None
        assert torch.equal(metrics["grad_norm"], seen.norm)
        check_state(state, theirs.state(), index)
    assert int(state.step) == 3

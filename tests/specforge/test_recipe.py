"""SpecForge's recipe: its orders, its schedule, its start, and old settings refused by their new names."""

import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, DistributedSampler

from eagle3fn.base.config import Config, DataConfig, OptimizerConfig
from eagle3fn.base.errors import UserError
from eagle3fn.specforge import recipe
from eagle3fn.testing import Case


def config(global_batch: int, micro_batch: int) -> Config:
    return Config(
        Case().draft(), data=DataConfig(global_batch=global_batch, micro_batch=micro_batch)
    )


@given(st.integers(1, 9), st.integers(1, 3), st.integers(1, 3))
@settings(max_examples=30, deadline=None)
def test_orders_are_those_of_torchs_sampler_and_loader(n, micro, share):
    """`DistributedSampler`, its epoch counted from 1, under a `DataLoader` that drops the rest; or no shuffling."""
    for order, shuffle in ((recipe.script_order, True), (recipe.stored_order, False)):
        made = config(micro * share, micro)
        if n < micro:
            with pytest.raises(
                UserError, match=f"data.micro_batch = {micro}: {n} samples fill no batch"
            ):
                order(n, made, 0)
            continue
        places: Any = range(n)
        sampler = DistributedSampler(places, num_replicas=1, rank=0, shuffle=shuffle)
        loader = DataLoader(
            places, batch_size=micro, sampler=sampler, drop_last=True, collate_fn=list
        )
        stream = []
        for epoch in range(4):
            sampler.set_epoch(epoch + 1)
            stream += [place for batch in loader for place in batch]
        steps = len(stream) // (micro * share)
        ours = [place for step in range(steps) for place in order(n, made, step)]
        assert ours == stream[: len(ours)] and len(ours) == steps * micro * share


def test_schedule_is_the_recursion_above_the_closed_form():
    settings = OptimizerConfig(learning_rate=1.0, warmup_ratio=0.0)
    rate = recipe.schedule(settings, 17)
    assert rate(0) == pytest.approx(1.0086, abs=5e-5)
    assert recipe.schedule(settings, 1)(0) == 2.0
    assert rate(25) > rate(17)
    with pytest.raises(UserError, match="at least 1 step"):
        recipe.schedule(settings, 0)


def test_schedule_can_be_shared_by_threads():
    """Threads that ask for rates past the schedule's end get those of one alone."""
    settings = OptimizerConfig(learning_rate=1e-4)
    alone = recipe.schedule(settings, 100)
    wanted = [alone(step) for step in range(300)]
    shared = recipe.schedule(settings, 100)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(3) as pool:
            found = list(pool.map(lambda _: [shared(step) for step in range(300)], range(12)))
    finally:
        sys.setswitchinterval(before)
    assert all(rates == wanted for rates in found)


@pytest.mark.parametrize(
    ("section", "key", "value", "instead"),
    [
        ("objective", "numerics", "legacy", "objective.numerics=plain"),
        ("optimizer", "schedule", "legacy", "--recipe specforge"),
        ("optimizer", "accumulation", "legacy", "optimizer.accumulation=params"),
        ("optimizer", "horizon", 5, "optimizer.schedule_steps"),
        ("train", "init", "legacy", "--recipe specforge"),
        ("data", "mask_alignment", "legacy", "--recipe specforge"),
        ("data", "mask_alignment", "serving", "leave it out"),
        ("data", "order", "stored", "specforge-dataflow"),
    ],
)
def test_old_settings_are_refused_with_their_new_names(section, key, value, instead):
    with pytest.raises(UserError, match=rf"run.toml: {section}\.{key} = .*{instead}"):
        recipe.refuse_old_settings({section: {key: value}}, "run.toml")
    recipe.refuse_old_settings({section: {}}, "run.toml")


def test_recipe_takes_settings_over_its_own():
    found = recipe.recipe(Case().draft(), objective={"teacher": "compact"}, train={"steps": 7})
    assert (
        found.config.objective.teacher == "compact" and found.config.objective.numerics == "plain"
    )
    assert found.config.optimizer.accumulation == "params" and found.config.train.steps == 7
    with pytest.raises(UserError, match="unknown key train.stepz"):
        recipe.recipe(Case().draft(), train={"stepz": 7})

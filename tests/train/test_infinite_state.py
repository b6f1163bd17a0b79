"""An update that makes the state infinite, though its loss and gradient are finite."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import eagle3fn as e3
from eagle3fn.base.tree import equal, named_leaves, tree_map
from eagle3fn.base.types import Frozen, Params
from eagle3fn.train import loop
from eagle3fn.train.bad_updates import MOST_DROPPED
from eagle3fn.train.checkpoint import checkpoints
from eagle3fn.train.events import Events
from eagle3fn.train.optimizer import Optimizer, adamw
from eagle3fn.train.recipe import OURS, Recipe, start
from eagle3fn.train.track import append_row
from tests.factories import make_batch, make_config, make_frozen
from tests.train.run_files import read_leaves, rows, same_end
from tests.train.run_problem import Problem, make_problem, train_in

STEPS = 6
RATE = 1e-2


def overflowing(at: Callable[[int], bool]) -> Recipe:
    """A recipe with AdamW, whose parameters overflow in the steps, from 1, for which `at` holds."""
    adam = adamw(e3.OptimizerConfig(learning_rate=RATE))

    def update(grads: Params, state: Any, params: Params, info: Any) -> Any:
        params, state = adam.update(grads, state, params, info)
        if at(info.step + 1):
            params = {name: leaf.mul_(1e30).mul_(1e30) for name, leaf in params.items()}
        return params, state

    return OURS._replace(name="overflowing", optimizer=Optimizer(adam.init, update))


GOOD = overflowing(lambda step: False)
BAD_AT_4 = overflowing(lambda step: step == 4)
BAD = overflowing(lambda step: True)


@pytest.fixture
def problem(tmp_path: Path) -> Problem:
    """Evaluated and saved every two steps."""
    train = {"eval_every": 2, "checkpoint_every": 2}
    return make_problem(tmp_path / "features", STEPS, dtype="bfloat16", train=train)


def with_train(problem: Problem, **values: Any) -> Problem:
    """Other settings of the loop."""
    config = problem.config
    return problem._replace(config=replace(config, train=replace(config.train, **values)))


def steps_of(path: Path) -> list[int]:
    return [row["step"] for row in rows(path)]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_infinite_state_is_neither_saved_nor_evaluated_nor_exported(
    problem, tmp_path, monkeypatch, asynchronous
):
    monkeypatch.setattr(loop, "_is_asynchronous", lambda device: asynchronous)
    out = tmp_path / "run"
    exported = []
    events = Events(on_draft=lambda params, frozen, row: exported.append(row["step"]))
    with pytest.raises(e3.UserError) as caught:
        train_in(out, problem, recipe=BAD_AT_4, events=events)

    text = str(caught.value)
    assert text.startswith("step 4: after an update whose loss and gradient are finite params.")
    assert f"last good checkpoint: {out}/checkpoints/step-00000002" in text
    assert "lower optimizer.learning_rate" in text
    assert len(text.splitlines()) == 1
    assert [path.name for path in checkpoints(out / "checkpoints")] == ["step-00000002"]
    assert steps_of(out / "metrics.jsonl") == [1, 2, 3]
    assert steps_of(out / "eval.jsonl") == [0, 2]
    assert max(exported) <= 2

    # Without the fault the run goes on from there.
    train_in(tmp_path / "whole", problem, recipe=GOOD)
    train_in(out, problem, recipe=GOOD)
    assert same_end(out, tmp_path / "whole", STEPS)


def test_dropped_update_is_counted_and_the_run_goes_on(problem, tmp_path):
    out = tmp_path / "run"
    train_in(out, with_train(problem, on_nonfinite="skip"), recipe=BAD_AT_4)
    written = rows(out / "metrics.jsonl")
    assert [row["skipped"] for row in written] == [0, 0, 0, 1, 1, 1]
    assert written[3]["loss"] is None
    leaves = read_leaves(out / f"checkpoints/step-{STEPS:08d}")
    assert all(leaf.isfinite().all() for leaf in leaves.values())


def test_dropped_updates_are_counted_at_the_end(problem, tmp_path):
    said: list[str] = []
    events = Events(on_notice=said.append)
    skipping = with_train(problem, on_nonfinite="skip")
    train_in(tmp_path / "good", skipping, recipe=GOOD, events=events)
    assert said == []
    train_in(tmp_path / "run", skipping, recipe=BAD_AT_4, events=events)
    (line,) = said
    assert line.startswith("1 update was dropped (train.on_nonfinite = 'skip'): ")

    # Of a run that is called again after its end too.
    train_in(tmp_path / "run", skipping, recipe=BAD_AT_4, events=events)
    assert said[::2] == [line, line]
    assert "finished, step 6 of 6" in said[1]


@pytest.mark.parametrize(("steps", "last"), [(30, MOST_DROPPED), (3, 3)])
def test_run_that_drops_all_updates_ends(problem, tmp_path, steps, last):
    out = tmp_path / "run"
    dropping = with_train(problem, on_nonfinite="skip", steps=steps, eval_every=10)
    message = rf"step {last}: the last {last} updates were all dropped.*last good checkpoint"
    with pytest.raises(e3.UserError, match=message):
        train_in(out, dropping, recipe=BAD)
    assert len(rows(out / "metrics.jsonl")) == last

    # Nothing was trained, and nothing was called the best draft.
    assert steps_of(out / "eval.jsonl") == list(range(0, last, 10))


def test_dropped_updates_are_counted_across_a_resume(problem, tmp_path):
    """A run killed once in a while ends as one that was left alone."""

    class Stop(Exception):
        pass

    def stop(row: dict[str, Any], total: int) -> None:
        if row["step"] == 15:
            raise Stop

    out = tmp_path / "run"
    dropping = with_train(problem, on_nonfinite="skip", steps=30, checkpoint_every=7, eval_every=30)
    with pytest.raises(Stop):
        train_in(out, dropping, recipe=BAD, events=Events(on_step=stop))
    with pytest.raises(e3.UserError, match=f"step {MOST_DROPPED}: the last {MOST_DROPPED} updates"):
        train_in(out, dropping, recipe=BAD)


def test_first_state_that_is_not_finite_is_refused(problem, tmp_path):
    def broken(config: e3.Config, frozen: Frozen, seed: int) -> Params:
        params = start(config, frozen, seed)
        params["norm.weight"][1] = torch.nan
        return params

    recipe = OURS._replace(name="broken", start=broken)
    message = r"the first params\.norm\.weight holds NaN or infinity; mend .*train.init='random'"
    with pytest.raises(e3.UserError, match=message):
        train_in(tmp_path / "run", with_train(problem, init="target"), recipe=recipe)

    # What a remedy names is not what is there.
    drawn = with_train(problem, init="random")
    with pytest.raises(e3.UserError, match=r"infinity; lower draft\.initializer_range") as caught:
        train_in(tmp_path / "drawn", drawn, recipe=recipe)
    assert "set train.init" not in str(caught.value)


# One step.


def infinite(part: str) -> Optimizer:
    """Leaves its state, or the last value of one leaf, infinite."""

    def update(grads: Params, state: Params, params: Params, info: Any) -> Any:
        state, params = tree_map(torch.clone, (state, params))
        chosen = state if part == "opt" else params
        chosen["norm.weight"][-1] = {"opt": torch.nan, "params": -torch.inf}[part]
        return params, state

    return Optimizer(lambda params, roles: tree_map(torch.zeros_like, params), update)


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("part", ["params", "opt"])
@pytest.mark.parametrize("on_nonfinite", ["stop", "skip"])
def test_step_reports_the_leaf_and_drops_the_update(part, on_nonfinite, donate):
    config = make_config("bfloat16", train={"on_nonfinite": on_nonfinite})
    fns = e3.bind(config, make_frozen(config), optimizer=infinite(part))
    state = fns.init_state(fns.init(0))
    before = tree_map(torch.clone, state)
    after, metrics = fns.step(state, make_batch(1, (6, 4)), donate=donate)

    names = list(named_leaves(before._replace(masters={}, step=())))
    bad = [name for name, good in zip(names, metrics["finite"].tolist(), strict=True) if not good]
    assert bad == [f"{part}.norm.weight"]
    assert metrics["skipped"] == int(on_nonfinite == "skip")
    if on_nonfinite == "skip":
        assert equal(after, before._replace(step=before.step + 1))


def test_values_that_only_the_narrow_dtype_cannot_hold_are_seen():
    """A master below fp32's largest value rounds to infinity in bf16."""

    def update(grads: Params, state: dict, params: Params, info: Any) -> Any:
        return {name: torch.full_like(leaf, 3.4e38) for name, leaf in params.items()}, state

    config = make_config("bfloat16")
    optimizer = Optimizer(lambda params, roles: {}, update)
    fns = e3.bind(config, make_frozen(config), optimizer=optimizer)
    after, metrics = fns.step(fns.init_state(fns.init(0)), make_batch(1, (6, 4)))
    assert all(leaf.isfinite().all() for leaf in after.masters.values())
    assert not metrics["finite"].any()


def test_states_dropped_under_vmap_are_dropped_alone():
    def update(grads: Params, state: dict, params: Params, info: Any) -> Any:
        return {name: leaf * 1e20 * info.rate for name, leaf in params.items()}, state

    config = make_config(train={"on_nonfinite": "skip"})
    optimizer = Optimizer(lambda params, roles: {}, update)
    fns = e3.bind(config, make_frozen(config), optimizer=optimizer)
    state = fns.init_state(fns.init(0))
    batch = make_batch(0, (7, 5))

    rates = torch.tensor([1.0, 1e30], dtype=torch.float64)
    found, metrics = torch.func.vmap(lambda rate: fns.step(state, batch, rate=rate))(rates)
    assert metrics["skipped"].tolist() == [0, 1]
    assert metrics["finite"].all(1).tolist() == [True, False]
    expected = state._replace(step=state.step + 1)
    assert equal(tree_map(lambda leaf: leaf[1], found), expected)


def test_settings_that_are_no_rates_are_refused():
    for value in (float("inf"), float("nan"), -1.0, 0.0):
        with pytest.raises(e3.UserError, match=r"optimizer\.learning_rate"):
            e3.OptimizerConfig(learning_rate=value)

    config = make_config()
    fns = e3.bind(config, make_frozen(config))
    state = fns.init_state(fns.init(0))
    for rate in (float("inf"), float("nan"), 1e39):
        with pytest.raises(e3.UserError, match="the learning rate of update 1 is"):
            fns.step(state, make_batch(0, (7, 5)), rate=rate)


def test_rows_that_are_not_finite_are_null_in_the_file(tmp_path):
    """NaN is no JSON."""
    append_row(tmp_path / "eval.jsonl", {"step": 2, "losses": [math.nan, 1.0]})
    assert json.loads((tmp_path / "eval.jsonl").read_text()) == {"step": 2, "losses": [None, 1.0]}


# A state that is finite, and computes nothing.


@pytest.mark.parametrize("on_nonfinite", ["stop", "skip"])
def test_state_whose_held_out_loss_is_not_finite_is_neither_saved_nor_exported(
    problem, tmp_path, on_nonfinite
):
    """A rate of 1e30 leaves finite weights near 1e30, whose products are not."""
    problem = with_train(problem, eval_every=1, checkpoint_every=1, on_nonfinite=on_nonfinite)
    rate = replace(problem.config.optimizer, learning_rate=1e30, warmup_ratio=0.0)
    problem = problem._replace(config=replace(problem.config, optimizer=rate))
    out = tmp_path / "run"
    exported = []
    events = Events(on_draft=lambda params, frozen, row: exported.append(row["step"]))
    with pytest.raises(e3.UserError) as caught:
        train_in(out, problem, events=events)
    assert str(caught.value) == (
        "step 1: the held-out loss is not finite; no checkpoint was written yet; lower "
        "optimizer.learning_rate"
    )
    assert checkpoints(out / "checkpoints") == []
    assert steps_of(out / "eval.jsonl") == [0]
    assert exported == [0]


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (0, r"step 0: the held-out loss is not finite before any update; check the held-out"),
        (4, r"step 4: the held-out loss is not finite; last good checkpoint: .*/step-00000002; "),
    ],
)
def test_held_out_loss_that_is_not_finite_ends_the_run_at_its_step(
    problem, tmp_path, monkeypatch, step, message
):
    evaluate = loop.evaluate_held_out
    losses = iter([0.0] * (step // 2) + [math.nan])

    def broken(run: Any, params: Params) -> dict[str, Any]:
        row = evaluate(run, params)
        return row | {"loss": row["loss"] + next(losses)}

    monkeypatch.setattr(loop, "evaluate_held_out", broken)
    with pytest.raises(e3.UserError, match=message) as caught:
        train_in(tmp_path / "run", problem, recipe=GOOD)
    assert len(str(caught.value).splitlines()) == 1
    assert step not in steps_of(tmp_path / "run/eval.jsonl")
    saved = [path.name for path in checkpoints(tmp_path / "run/checkpoints")]
    assert saved == ["step-00000002"][: step // 2]

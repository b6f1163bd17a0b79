"""How many steps a run takes when it goes on: as it began, or more, or fewer that are not made."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import eagle3fn as e3
from eagle3fn.base.sections import MOST_STEPS
from eagle3fn.base.tree import equal
from eagle3fn.base.types import TrainState
from eagle3fn.train.loop import Events
from eagle3fn.train.recipe import OURS
from tests.train.run_files import rows, same_rows
from tests.train.run_problem import LENGTHS, Problem, make_problem, train_in

STEPS = 4
LONGER = 7
CONSTANT = OURS._replace(name="constant", schedule=lambda config, total: lambda step: 1e-2)


class Ended(NamedTuple):
    """A call that went to the run's end."""

    state: TrainState
    said: list[str]


def call(out: Path, problem: Problem, **options: Any) -> Ended:
    """Train in a folder; every line that is said is one."""
    said: list[str] = []
    state = train_in(out, problem, events=Events(on_notice=said.append), **options)
    assert all(len(line.splitlines()) == 1 for line in said)
    return Ended(state, said)


def with_train(problem: Problem, **train: Any) -> Problem:
    """The problem with other settings of `[train]`."""
    config = problem.config
    return problem._replace(config=replace(config, train=replace(config.train, **train)))


@pytest.fixture(scope="module")
def problem(tmp_path_factory: pytest.TempPathFactory) -> Problem:
    train = {"eval_every": 2, "checkpoint_every": 2}
    return make_problem(tmp_path_factory.mktemp("horizon") / "features", STEPS, train=train)


@pytest.fixture(scope="module")
def made(problem: Problem, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has ended."""
    out = tmp_path_factory.mktemp("ended") / "run"
    assert call(out, problem).said == []
    return out


@pytest.fixture
def ended(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "run")


def test_finished_run_says_so_and_changes_nothing(ended, problem):
    before = (ended / "metrics.jsonl").read_text()
    (line,) = call(ended, problem).said
    assert line.startswith(f"{ended}: finished, step 4 of 4 is its last one")
    assert (ended / "metrics.jsonl").read_text() == before


def test_longer_run_is_the_whole_one_under_a_constant_rate(problem, tmp_path):
    """Bit for bit, rows and held-out rows included."""
    train_in(tmp_path / "run", problem, recipe=CONSTANT)
    longer = with_train(problem, steps=LONGER)
    found = call(tmp_path / "run", longer, recipe=CONSTANT)
    whole = train_in(tmp_path / "whole", longer, recipe=CONSTANT)
    assert equal(found.state, whole)
    assert same_rows(tmp_path / "run", tmp_path / "whole")

    first, steps, rate = found.said
    assert first.startswith("resumed from step 4 of 7, ")
    assert steps == "train.steps: 7, was 4"
    assert (
        rate == "learning rate: 0.01 at step 4, from step 5 on 0.01, the rate of a run of 7 steps"
    )


def test_longer_run_says_the_rates_that_it_has(ended, problem):
    """Those of the longer cosine, which are not those that the shorter one ended with."""
    found = call(ended, with_train(problem, steps=LONGER))
    written = [row["learning_rate"] for row in rows(ended / "metrics.jsonl")]
    assert [row["step"] for row in rows(ended / "metrics.jsonl")] == list(range(1, LONGER + 1))
    assert found.said[-1] == (
        f"learning rate: {written[3]:.3g} at step 4, from step 5 on {written[4]:.3g}, the rate of "
        "a run of 7 steps"
    )
    assert written[4] > written[3]


def test_call_that_names_no_number_goes_on_as_the_run_began(problem, tmp_path):
    """Even where its steps were not chosen by epochs; and a longer one keeps its new length."""
    longer = with_train(problem, steps=LONGER)
    train_in(tmp_path / "run", problem)
    train_in(tmp_path / "run", longer)
    found = call(tmp_path / "run", with_train(problem, steps=0))
    assert int(found.state.step) == LONGER
    assert "finished, step 7 of 7" in found.said[0]


@pytest.mark.parametrize("steps", [1, 3])
def test_fewer_steps_than_were_made_are_refused(ended, problem, steps):
    before = sorted(ended.rglob("*"))
    message = rf"train\.steps = {steps}: .*step-00000004 has made 4; .*--from"
    with pytest.raises(e3.UserError, match=message):
        train_in(ended, with_train(problem, steps=steps))
    assert sorted(ended.rglob("*")) == before
    assert json.loads((ended / "horizon.json").read_text())["steps"] == STEPS


def test_fewer_steps_that_are_not_made_end_the_run_sooner(problem, tmp_path):
    train_in(tmp_path / "run", with_train(problem, steps=2))
    train_in(tmp_path / "run", with_train(problem, steps=LONGER, checkpoint_every=LONGER))
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000007")
    found = call(tmp_path / "run", with_train(problem, steps=3))
    assert int(found.state.step) == 3
    assert [row["step"] for row in rows(tmp_path / "run/metrics.jsonl")] == [1, 2, 3]


def test_more_epochs_are_as_many_steps_as_they_need(problem, tmp_path):
    """Two samples an update: an epoch has three."""
    one = with_train(problem, steps=0, epochs=1)
    assert int(call(tmp_path / "run", one).state.step) == len(LENGTHS) // 2
    found = call(tmp_path / "run", with_train(one, epochs=2))
    assert int(found.state.step) == len(LENGTHS)
    assert "train.epochs: 2, was 1" in found.said

    with pytest.raises(e3.UserError, match=r"train\.epochs = 1, 3 steps: .*has made 6"):
        train_in(tmp_path / "run", one)


def test_twice_the_minutes_are_twice_the_steps_and_the_same_none(problem, tmp_path):
    free = with_train(problem, steps=0)
    chosen = int(call(tmp_path / "run", free, minutes=1e-3).state.step)
    again = call(tmp_path / "run", free, minutes=1e-3)
    assert int(again.state.step) == chosen
    assert "finished" in again.said[0]

    twice = call(tmp_path / "run", free, minutes=2e-3)
    assert int(twice.state.step) == 2 * chosen
    assert f"train.steps: {2 * chosen}, was {chosen}" in twice.said
    assert json.loads((tmp_path / "run/horizon.json").read_text())["minutes"] == 2e-3


@pytest.mark.parametrize("kept", [{}, {"minutes": None}])
@pytest.mark.parametrize("minutes", [None, 1])
def test_run_of_an_early_version_that_kept_no_minutes_goes_on(problem, tmp_path, kept, minutes):
    """With its number of steps, with a checkpoint and without."""
    free = with_train(problem, steps=0)
    for out, said in ((tmp_path / "begun", "resumed from step 2 of 3"), (tmp_path / "new", "")):
        if said:
            train_in(out, problem, max_steps=2)
        out.mkdir(exist_ok=True)
        (out / "horizon.json").write_text(json.dumps({"steps": 3, "chosen_by": "minutes"} | kept))
        found = call(out, free, minutes=minutes)
        assert int(found.state.step) == 3
        assert said in " ".join(found.said)

    # Fewer than were made are refused, in words.
    (out / "horizon.json").write_text(json.dumps({"steps": 1, "chosen_by": "minutes"} | kept))
    with pytest.raises(e3.UserError, match=r"an earlier call, 1 steps: .* has made 3"):
        call(out, free, minutes=minutes)


def test_minutes_beyond_all_bounds_are_the_most_steps(problem, tmp_path):
    free = with_train(problem, steps=0)
    call(tmp_path / "run", free, minutes=1e-3)
    call(tmp_path / "run", free, minutes=1e308, max_steps=1)
    assert json.loads((tmp_path / "run/horizon.json").read_text())["steps"] == MOST_STEPS
    call(tmp_path / "new", free, minutes=1e308, max_steps=1)
    assert json.loads((tmp_path / "new/horizon.json").read_text())["steps"] == MOST_STEPS


def test_minutes_for_a_run_of_steps_are_refused(ended, problem):
    message = r"steps chosen by steps, 4 of them; leave --minutes out, or raise train\.steps"
    with pytest.raises(e3.UserError, match=message):
        train_in(ended, with_train(problem, steps=0), minutes=1)


def test_settings_that_leave_a_step_as_it_is_may_change_and_are_said(problem, tmp_path):
    whole = train_in(tmp_path / "whole", problem)
    train_in(tmp_path / "run", problem)
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000004")

    changed = with_train(problem, eval_every=1, checkpoint_every=3, keep_last=5)
    data = replace(problem.config.data, prefetch=0)
    found = call(tmp_path / "run", changed._replace(config=replace(changed.config, data=data)))
    assert found.said == [
        f"resumed from step 2 of 4, {tmp_path}/run/checkpoints/step-00000002",
        "data.prefetch: 0, was 2",
        "train.checkpoint_every: 3, was 2",
        "train.eval_every: 1, was 2",
        "train.keep_last: 5, was 2",
    ]
    assert equal(found.state, whole)
    assert [row["step"] for row in rows(tmp_path / "run/eval.jsonl")] == [0, 2, 3, 4]


@pytest.mark.parametrize(
    ("section", "value", "message"),
    [
        ("train", {"init": "target"}, r"train\.init was 'random', is 'target'"),
        ("data", {"held_out": 4}, r"data\.held_out was 5, is 4"),
    ],
)
def test_remedy_is_no_call_that_is_refused(ended, problem, section, value, message):
    """`--from` goes on under neither, nor under another optimizer."""
    config = replace(
        problem.config, **{section: replace(getattr(problem.config, section), **value)}
    )
    remedy = "; set it back, or begin a new run with another --out"
    with pytest.raises(e3.UserError, match=rf"{message}{remedy}$"):
        train_in(ended, problem._replace(config=config))

    optimizer = replace(problem.config.optimizer, learning_rate=0.5, name="muon")
    other = problem._replace(config=replace(problem.config, optimizer=optimizer))
    with pytest.raises(
        e3.UserError, match=r"optimizer\.name was 'adamw', is 'muon'; .*train\.init"
    ):
        train_in(ended, other)


def test_setting_that_changes_a_step_is_refused_with_the_remedy(ended, problem):
    optimizer = replace(problem.config.optimizer, learning_rate=0.5)
    other = problem._replace(config=replace(problem.config, optimizer=optimizer))
    message = r"learning_rate was 0\.01, is 0\.5; set it back, or .* --from .*step-00000004 --out"
    with pytest.raises(e3.UserError, match=message):
        train_in(ended, other)
    assert [row["step"] for row in rows(ended / "metrics.jsonl")] == [1, 2, 3, 4]

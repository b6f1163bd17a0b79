"""How a call of `train` ends: after its last update, by `train.patience`, or after `max_steps`."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import eagle3fn as e3
from eagle3fn.train import loop
from eagle3fn.train.checkpoint import checkpoints
from eagle3fn.train.events import End, Events
from eagle3fn.train.horizon import times_left
from tests.factories import make_draft
from tests.train.ends_job import FEW, patient
from tests.train.run_files import rows, same_end
from tests.train.run_problem import Problem, make_problem, train_in
from tests.train.start_ranks import torchrun

STEPS = 8


@pytest.fixture
def problem(tmp_path: Path) -> Problem:
    """Eight updates, evaluated after each second one."""
    return make_problem(tmp_path / "features", STEPS, train={"eval_every": 2})


def with_train(problem: Problem, **changes: Any) -> Problem:
    train = replace(problem.config.train, **changes)
    return problem._replace(config=replace(problem.config, train=train))


def without_held_out(problem: Problem) -> Problem:
    data = replace(problem.config.data, held_out=0)
    return problem._replace(config=replace(problem.config, data=data))


class Noted:
    """What a call of `train` said."""

    def __init__(self) -> None:
        self.ends: list[End] = []
        self.lines: list[str] = []
        self.drafts: list[int] = []

    def events(self) -> Events:
        return Events(
            on_draft=lambda params, frozen, row: self.drafts.append(row["step"]),
            on_notice=self.lines.append,
            on_end=self.ends.append,
        )


def call(out: Path, problem: Problem, **options: Any) -> Noted:
    noted = Noted()
    train_in(out, problem, events=noted.events(), **options)
    return noted


@pytest.fixture
def lengths(monkeypatch: pytest.MonkeyPatch) -> dict[int, float]:
    """The held-out accepted length by step; of a step that is not in it, the true one."""
    scripted: dict[int, float] = {}
    evaluate = loop.evaluate_held_out
    steps = iter(range(0, 1000, 2))

    def evaluated(run: Any, params: Any) -> dict[str, Any]:
        row = evaluate(run, params)
        return row | {"accepted_length": scripted.get(next(steps), 1.0)}

    monkeypatch.setattr(loop, "evaluate_held_out", evaluated)
    return scripted


# By patience.


def test_a_run_ends_when_its_patience_is_over(problem, tmp_path, lengths):
    """The untrained draft's length does not count: a trained one is the best so far."""
    lengths |= {0: 9.0, 2: 1.2, 4: 1.2, 6: 1.1}
    noted = call(tmp_path / "run", with_train(problem, patience=2))
    assert noted.ends == [End(step=6, total=STEPS, early=True, compared=True)]
    assert noted.ends[0].finished
    assert noted.drafts == [0, 2]
    (line,) = noted.lines
    assert line.startswith(
        "step 6 of 8: the run has ended, as its held-out accepted length has not risen above 1.200 "
        "for 2 evaluations (train.patience = 2)"
    )
    assert checkpoints(tmp_path / "run/checkpoints")[-1].name == "step-00000006"

    # A later call respects it, and says so again; a longer one has no rate to say.
    again = call(tmp_path / "run", with_train(problem, patience=2))
    assert (again.ends, again.lines, again.drafts) == (noted.ends, noted.lines, [])
    longer = call(tmp_path / "run", with_train(problem, patience=2, steps=50))
    assert longer.lines == ["train.steps: 50, was 8", line.replace("of 8", "of 50")]


@pytest.mark.parametrize(("patience", "said"), [(4, False), (5, True), (0, False)])
def test_a_patience_beyond_the_evaluations_left_is_said_once(problem, tmp_path, patience, said):
    noted = call(tmp_path / "run", with_train(problem, patience=patience), max_steps=2)
    line = (
        f"train.patience = {patience} cannot end this run early: to step 8 only 4 evaluations are "
        "left (train.eval_every = 2); lower one of the two"
    )
    assert [line for line in noted.lines if "patience" in line] == ([line] if said else [])


@given(st.integers(1, 9), st.integers(0, 40), st.integers(1, 40))
def test_times_left_are_those_of_a_plain_count(every, step, total):
    steps = range(step + 1, total + 1)
    assert times_left(every, step, total) == sum(n % every == 0 or n == total for n in steps)


def test_a_greater_patience_goes_on_to_the_bits_of_a_run_without(problem, tmp_path, monkeypatch):
    monkeypatch.setattr(
        loop, "evaluate_held_out", lambda run, params: {"loss": 1.0, "accepted_length": 1.5}
    )
    call(tmp_path / "whole", problem)
    early = call(tmp_path / "run", with_train(problem, patience=1))
    assert early.ends[0].step == 4
    noted = call(tmp_path / "run", with_train(problem, patience=9))
    assert noted.ends == [End(STEPS, STEPS, False, True)]
    assert same_end(tmp_path / "run", tmp_path / "whole", STEPS)


@pytest.mark.parametrize("seed", range(6))
def test_patience_is_that_of_a_plain_loop(tmp_path, seed):
    """Whether or not the run is called a second time on its way."""
    source = random.Random(seed)
    values = [source.choice([1.0, 1.1, 1.2, 1.3]) for _ in range(STEPS)]
    patience = source.randint(1, 4)
    cut = source.randint(1, STEPS - 1)
    problem = make_problem(tmp_path / "features", STEPS, train={"eval_every": 1})
    best = 0.0
    waited = 0
    expected = STEPS
    for step, value in enumerate(values, 1):
        waited = 0 if value > best else waited + 1
        best = max(best, value)
        if waited == patience:
            expected = step
            break

    scripted = iter([5.0, *values])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            loop, "evaluate_held_out", lambda run, params: {"accepted_length": next(scripted)}
        )
        patient = with_train(problem, patience=patience)
        call(tmp_path / "run", patient, max_steps=cut)
        noted = call(tmp_path / "run", patient)
    assert noted.ends == [End(expected, STEPS, expected < STEPS, True)]
    assert len(rows(tmp_path / "run/metrics.jsonl")) == expected


def test_two_ranks_end_at_the_step_of_one(tmp_path):
    """To the same bits, as sums are taken by the tree."""
    patient(tmp_path / "one", tmp_path)
    (*_, last) = rows(tmp_path / "one/metrics.jsonl")
    assert FEW < last["step"] < STEPS

    ended = torchrun(2, "-m", "tests.train.ends_job", tmp_path / "two")
    assert ended.codes == [0], ended.text
    assert same_end(tmp_path / "two", tmp_path / "one", last["step"])
    assert checkpoints(tmp_path / "two/checkpoints")[-1].name == f"step-{last['step']:08d}"


def test_patience_without_held_out_samples_is_refused():
    with pytest.raises(e3.UserError, match=r"train\.patience = 3: must be 0 where no .*held_out"):
        e3.Config(
            draft=make_draft(),
            train=e3.TrainConfig(patience=3),
            data=e3.DataConfig(held_out=0),
        )


# By `max_steps`.


@pytest.mark.parametrize("parts", [[1, 1, 4], [3, 20]])
def test_calls_of_few_updates_end_as_one_call(problem, tmp_path, parts):
    """Also where one ends between two evaluations; the schedule is the whole run's."""
    call(tmp_path / "whole", problem)
    made = 0
    for number in parts:
        noted = call(tmp_path / "run", problem, max_steps=number)
        made = min(made + number, STEPS)
        assert noted.ends == [End(made, STEPS, False, True)]
        assert noted.ends[0].finished == (made == STEPS)
        assert checkpoints(tmp_path / "run/checkpoints")[-1].name == f"step-{made:08d}"
    call(tmp_path / "run", problem)
    assert same_end(tmp_path / "run", tmp_path / "whole", STEPS)


# Without held-out samples.


def test_without_held_out_samples_each_newest_draft_is_published(problem, tmp_path):
    noted = call(tmp_path / "run", without_held_out(problem))
    assert noted.drafts == [0, 2, 4, 6, 8]
    assert noted.ends == [End(STEPS, STEPS, False, compared=False)]

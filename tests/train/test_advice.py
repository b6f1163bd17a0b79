"""Advice: each symptom is seen where it is, and not on a run that learns."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eagle3fn.base.types import VocabMap
from eagle3fn.data.features import open_features
from eagle3fn.train import advice
from eagle3fn.train.advice import (
    SYMPTOMS,
    WINDOW,
    History,
    advise,
    history_of,
    with_held_out,
    with_step,
)
from eagle3fn.train.events import Events
from eagle3fn.use.advising import with_advice
from tests.factories import supervised_sample, write_folder
from tests.train.run_files import rows
from tests.train.run_problem import HIDDEN, LENGTHS, VOCAB, Problem, make_problem, train_in

Row = dict[str, Any]


def step_rows(count: int = 600, first: float = 4.0, last: float = 2.0, **fields: Any) -> list[Row]:
    """Updates whose loss goes in a line from `first` to `last`."""
    rates = {"counted": 0.95, "rows": 20} | fields
    return [
        {"step": n, "loss": first + (last - first) * n / count, **rates}
        for n in range(1, count + 1)
    ]


def held_out_rows(*lengths: float, every: int = 100, **fields: Any) -> list[Row]:
    """Evaluations from step 0 on."""
    rates = {"counted": 0.95, "rows": 90, "accuracy": [0.5, 0.4]} | fields
    rates = {"conditional_accuracy": [0.5, 0.6]} | rates
    return [{"step": every * n, "accepted_length": x, **rates} for n, x in enumerate(lengths)]


GROWING = (1.1, 1.2, 1.3, 1.4, 1.4, 1.5, 1.5)


def seen(steps: list[Row], held_out: list[Row]) -> set[str]:
    return set(advise(history_of(steps, held_out)))


def test_a_run_that_learns_gets_no_advice():
    assert seen(step_rows(), held_out_rows(*GROWING)) == set()
    assert seen(step_rows(), []) == set()
    assert seen([], []) == set()


CASES: dict[str, tuple[Any, ...]] = {
    "few rows counted": (step_rows(), held_out_rows(*GROWING, counted=0.79)),
    "no gradient": (step_rows(60, grad_norm=0.0), held_out_rows(*GROWING)),
    "length of an untrained draft": (
        step_rows(),
        held_out_rows(1.1, 1.05, 1, 1, 1, 1.1, every=120),
    ),
    "worse than its start": (step_rows(60), held_out_rows(1.6, 1.59, every=50), True),
    "level loss": (step_rows(first=3.0, last=3.0), held_out_rows(*GROWING)),
    "falling length": (step_rows(), held_out_rows(1.1, 1.5, 1.44, 1.44, 1.3)),
    "rare chains": (
        step_rows(),
        held_out_rows(*GROWING, accuracy=[0.02, 0.0], conditional_accuracy=[0.02, 0.9]),
    ),
}


@pytest.mark.parametrize("name", SYMPTOMS)
def test_each_symptom_alone_is_one_line_with_a_remedy(name):
    lines = advise(history_of(*CASES[name]))
    assert set(lines) == {name}
    assert lines[name].startswith("advice: ") and "\n" not in lines[name] and ";" in lines[name]


@pytest.mark.parametrize(
    ("name", "steps", "held_out"),
    [
        ("few rows counted", step_rows(), held_out_rows(1.1, counted=0.8)),
        ("few rows counted", step_rows(), [{"step": 0}]),
        ("no gradient", step_rows(60, grad_norm=1e-30), []),
        ("no gradient", [*step_rows(20, grad_norm=0.0), *step_rows(1, grad_norm=0.1)], []),
        ("no gradient", step_rows(60, grad_norm=0.0, counted=0.0), []),
        ("no gradient", step_rows(60, grad_norm=None), []),
        ("length of an untrained draft", step_rows(499), held_out_rows(1.1, 1.0, every=499)),
        ("length of an untrained draft", step_rows(), held_out_rows(1.1, 1.2, 1.0, every=300)),
        ("level loss", step_rows(499, 3.0, 3.0), []),
        ("level loss", step_rows(600, 3.0, 2.99), []),
        ("falling length", step_rows(), held_out_rows(1.1, 1.5, 1.46, 1.44, 1.3)),
        ("falling length", step_rows(), held_out_rows(1.1, 1.5, 1.0, 1.0)),
        ("rare chains", step_rows(), held_out_rows(1.1, accuracy=[0, 0], every=1)),
    ],
)
def test_what_is_just_within_its_bound_is_not_said(name, steps, held_out):
    assert name not in seen(steps, held_out)


@pytest.mark.parametrize(
    ("lengths", "warm", "name"),
    [
        ((1.6, 1.5, 1.55), True, "worse than its start"),
        ((1.6, 1.5, 1.6), True, None),
        ((1.6,), True, None),
        ((1.6, 1.5, 1.55), False, None),
        ((1.6, 1.5, 1.55, 1.5, 1.5, 1.5), False, "length of an untrained draft"),
        ((1.6, 1.5, 1.55, 1.5, 1.5, 1.5), True, "worse than its start"),
    ],
)
def test_a_draft_that_training_made_worse_is_said_of_one_that_was_trained(lengths, warm, name):
    lines = advise(history_of(step_rows(), held_out_rows(*lengths), warm))
    falling = {"falling length"}
    assert lines.keys() - falling == ({name} if name else set())
    if name and warm:
        assert "at most 1.550, and it was 1.600 before the first" in lines[name]


def test_without_held_out_samples_the_updates_rows_are_weighed():
    """40 rows of which all count and 160 of which half do: 60% do."""
    few = [{**row, "counted": 0.5, "rows": 16} for row in step_rows(10)]
    all_of_them = [{**row, "counted": 1.0, "rows": 4} for row in step_rows(10)]
    lines = advise(history_of(few + all_of_them, []))
    assert lines["few rows counted"].startswith("advice: 60% of the trained rows count")


def test_dropped_updates_have_no_loss_and_are_left_out():
    steps = [{**row, "loss": None} if row["step"] % 2 else row for row in step_rows()]
    assert seen(steps, []) == set()
    assert seen([{**row, "loss": None} for row in steps], []) == set()


@given(st.integers(0, 3 * WINDOW), st.integers(0, 4))
def test_a_history_row_by_row_is_that_of_the_files(count, evaluations):
    steps = step_rows(count)
    held_out = held_out_rows(*GROWING[:evaluations])
    history = History()
    for row in steps:
        history = with_step(history, row)
    for row in held_out:
        history = with_held_out(history, row)
    assert history == history_of(steps, held_out)
    assert len(history.first) <= WINDOW and len(history.latest) <= WINDOW


# While a run is trained.


def whole_map(size: int) -> VocabMap:
    """Every token of the target's vocabulary."""
    return VocabMap(torch.ones(size, dtype=torch.bool), torch.zeros(size, dtype=torch.int64))


def test_a_tiny_run_is_advised_of_its_map_once_and_of_nothing_else(tmp_path):
    """Its map is drawn: about a third of the labels is not in it."""
    lines: list[str] = []
    problem = make_problem(tmp_path / "features", 8, train={"eval_every": 2})
    events = with_advice(Events(on_notice=lines.append), tmp_path / "run")
    train_in(tmp_path / "run", problem, events=events, max_steps=5)
    counted = rows(tmp_path / "run/eval.jsonl")[0]["counted"]
    assert counted < 0.8
    (line,) = lines
    assert line.startswith(f"advice: {counted:.0%} of the trained rows count")

    # A later call of the run does not say it again.
    events = with_advice(Events(on_notice=lines.append), tmp_path / "run")
    train_in(tmp_path / "run", problem, events=events)
    assert [said for said in lines if said.startswith("advice")] == [line]


def constant(logits: torch.Tensor, p_draft: torch.Tensor, p_full: torch.Tensor) -> torch.Tensor:
    """Its gradient is there, and zero."""
    return 0 * logits.sum(-1)


def test_a_run_whose_loss_is_constant_is_advised(tmp_path):
    lines: list[str] = []
    problem = make_problem(tmp_path / "features", loss=f"{__name__}:constant")
    events = with_advice(Events(on_notice=lines.append), tmp_path / "run")
    train_in(tmp_path / "run", problem, events=events)
    wanted = "advice: the gradient norm of the last 4 updates that count rows is exactly 0, so"
    assert len([line for line in lines if line.startswith(wanted)]) == 1


def test_a_run_that_went_on_elsewhere_is_advised_by_its_own_rows(tmp_path):
    """The other run's accepted lengths were greater, on other held-out samples, and its loss rose:
    neither is advised of.
    """
    copied = [row | {"tokens": 9, "seconds": 1.0} for row in step_rows(600, 1.0, 2.0)]
    for name, written in (("metrics", copied), ("eval", held_out_rows(5.0, 5.0, 5.0, every=200))):
        text = "".join(json.dumps(row) + "\n" for row in written)
        (tmp_path / f"{name}.jsonl").write_text(text)
    branch = {"named": "/old", "run": "old", "step": 600, "changes": []}
    (tmp_path / "from.json").write_text(json.dumps(branch))

    lines: list[str] = []
    events = with_advice(Events(on_notice=lines.append), tmp_path)
    for n, row in enumerate(held_out_rows(1.2, 1.2, 1.2, 1.2)):
        events.on_eval(row | {"step": 600 + n})
    for n, row in enumerate(step_rows(100, 3.0, 3.0), 601):
        events.on_step(row | {"step": n}, 700)
    assert lines == []


@pytest.mark.parametrize("rate", [1e-2, 1e-12])
def test_a_good_tiny_run_gets_no_advice(tmp_path, monkeypatch, rate):
    """Its held-out samples are those trained on, so it learns them; at a rate of nearly zero it
    does not, and both loss and length are said. The bounds are those of a shorter run.
    """
    monkeypatch.setattr(advice, "_LONG", 60)
    monkeypatch.setattr(advice, "WINDOW", 20)
    problem = make_problem(tmp_path / "features", 80, train={"eval_every": 20})
    samples = [supervised_sample(length, i, VOCAB, HIDDEN) for i, length in enumerate(LENGTHS)] * 2
    features = open_features(write_folder(tmp_path / "twice", samples, VOCAB, HIDDEN))
    config = problem.config
    config = replace(
        config,
        draft=replace(config.draft, draft_vocab_size=VOCAB),
        data=replace(config.data, held_out=len(LENGTHS)),
        optimizer=replace(config.optimizer, learning_rate=rate),
    )
    problem = Problem(config, features, whole_map(VOCAB), problem.target)

    lines: list[str] = []
    events = with_advice(Events(on_notice=lines.append), tmp_path / "run")
    train_in(tmp_path / "run", problem, events=events)
    row = rows(tmp_path / "run/eval.jsonl")[-1]
    assert row["counted"] == 1.0
    if rate > 1e-6:
        assert row["accepted_length"] > 1.5
        assert lines == []
    else:
        assert len(lines) == 2 and "does not fall" in lines[1] + lines[0]

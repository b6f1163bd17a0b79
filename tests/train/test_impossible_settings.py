"""Settings that no run can have are refused by name, before anything is written."""

from dataclasses import replace

import pytest

import eagle3fn as e3
from tests.train.run_problem import Problem, make_problem, train_in


@pytest.fixture(scope="module")
def problem(tmp_path_factory: pytest.TempPathFactory) -> Problem:
    """Six samples to train on, and ten epochs of them."""
    return make_problem(tmp_path_factory.mktemp("settings") / "features")


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("data", "global_batch", 10**12),
        ("data", "global_batch", 61),
        ("data", "micro_batch", 10**12),
        ("data", "prefetch", 10**9),
        ("data", "max_length", 10**30),
        ("data", "held_out", -1),
        ("data", "held_out", 10**30),
        ("data", "held_out", 11),
        ("objective", "ttt_length", 10**6),
        ("objective", "teacher_chunk", 10**30),
        ("optimizer", "schedule_steps", 10**30),
        ("optimizer", "weight_decay", 1e30),
        ("optimizer", "weight_decay", 1e5),
        ("optimizer", "beta2", 1 - 1e-12),
        ("train", "checkpoint_every", 0),
        ("train", "eval_every", -1),
        ("train", "keep_last", 0),
        ("train", "steps", 10**8),
        ("train", "epochs", 10**30),
        ("train", "seed", 2**63),
        ("train", "seed", -1),
    ],
)
def test_impossible_settings_are_refused_by_name(problem, tmp_path, section, name, value):
    config = problem.config
    with pytest.raises(e3.UserError, match=rf"{section}\.{name} = "):
        part = replace(getattr(config, section), **{name: value})
        other = problem._replace(config=replace(config, **{section: part}))
        train_in(tmp_path / "run", other)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("minutes", [0.0, -1.0, float("nan"), float("inf")])
def test_minutes_that_are_none_are_refused(problem, tmp_path, minutes):
    train = replace(problem.config.train, steps=0)
    other = problem._replace(config=replace(problem.config, train=train))
    with pytest.raises(e3.UserError, match=r"--minutes .*: must be above 0"):
        train_in(tmp_path / "run", other, minutes=minutes)


def test_more_updates_than_can_be_named_are_refused(problem, tmp_path):
    train = replace(problem.config.train, steps=0, epochs=10**9)
    other = problem._replace(config=replace(problem.config, train=train))
    with pytest.raises(e3.UserError, match=r"train\.epochs = 1000000000: 6 samples make more"):
        train_in(tmp_path / "run", other)

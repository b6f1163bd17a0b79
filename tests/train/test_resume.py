"""A resumed run: it draws no first state, holds one state alone, and is that of its recipe."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import eagle3fn as e3
from eagle3fn.base.tree import equal, named_leaves
from eagle3fn.base.types import Frozen, Params
from eagle3fn.train.events import Events
from eagle3fn.train.recipe import OURS, start
from tests.factories import make_draft
from tests.peak import Peak
from tests.train.run_problem import Problem, make_problem, train_in

STEPS = 4


class CountedStart:
    """A recipe's start that counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, config: e3.Config, frozen: Frozen, seed: int) -> Params:
        self.calls += 1
        return start(config, frozen, seed)


def no_start(config: e3.Config, frozen: Frozen, seed: int) -> Params:
    raise AssertionError("a resumed run must draw no parameters")


NAMED = OURS._replace(name="counting")


class Stop(Exception):
    """Ends a run from outside."""


def stopped_after(steps: int, out: Path, problem: Problem, **options: Any) -> None:
    """Train, and stop in the step after step `steps`."""

    def stop(row: dict[str, Any], total: int) -> None:
        if row["step"] > steps:
            raise Stop

    with pytest.raises(Stop):
        train_in(out, problem, events=Events(on_step=stop), **options)


def test_resumed_run_draws_no_state_and_ends_as_the_whole(tmp_path):
    problem = make_problem(tmp_path / "features", STEPS, train={"checkpoint_every": 2})
    counted = CountedStart()
    whole = train_in(tmp_path / "whole", problem, recipe=NAMED._replace(start=counted))
    assert counted.calls == 1

    stopped_after(2, tmp_path / "run", problem, recipe=NAMED)
    resumed = train_in(tmp_path / "run", problem, recipe=NAMED._replace(start=no_start))
    assert equal(resumed, whole)

    # With no step left the state is read all the same.
    again = train_in(tmp_path / "run", problem, recipe=NAMED._replace(start=no_start))
    assert equal(again, whole)


def test_minutes_of_a_resumed_run_time_no_steps(tmp_path):
    problem = make_problem(tmp_path / "features", steps=0)
    whole = train_in(tmp_path / "run", problem, minutes=1e-4, recipe=NAMED)
    again = NAMED._replace(start=no_start)
    resumed = train_in(tmp_path / "run", problem, minutes=1e-4, recipe=again)
    assert equal(resumed, whole)


def test_resumed_run_holds_one_state(tmp_path):
    """The draft is large beside all else, so that a second state would show."""
    problem = make_problem(tmp_path / "features", steps=1)
    draft = make_draft(intermediate_size=6000)
    problem = problem._replace(config=replace(problem.config, draft=draft))
    state = train_in(tmp_path / "run", problem)
    bytes_of_state = sum(leaf.nbytes for leaf in named_leaves(state).values())

    # Reading needs a leaf more, of which the largest is less than a tenth of the state.
    with Peak() as peak:
        resumed = train_in(tmp_path / "run", problem)
    assert equal(resumed, state)
    assert bytes_of_state <= peak.most < 1.3 * bytes_of_state


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        ("first", "second", r"step-00000002: written for another recipe \(first, now second\)"),
        ("first", "", r"another recipe \(first, now none\); name it again, or .* --from"),
        ("", "second", r"another recipe \(none, now second\)"),
    ],
)
def test_run_of_another_recipe_is_refused_by_name(tmp_path, before, now, message):
    problem = make_problem(tmp_path / "features", STEPS, train={"checkpoint_every": 2})
    stopped_after(2, tmp_path / "run", problem, recipe=OURS._replace(name=before))
    with pytest.raises(e3.UserError, match=message):
        train_in(tmp_path / "run", problem, recipe=OURS._replace(name=now))

    state = train_in(tmp_path / "run", problem, recipe=OURS._replace(name=before))
    assert int(state.step) == STEPS

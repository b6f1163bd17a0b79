"""Every schedule of the table: laws, values, and a user's own by name."""

import doctest
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import eagle3fn as e3
from eagle3fn.base.sections import OptimizerConfig
from eagle3fn.train import schedules
from eagle3fn.train.dry_run import dry_run
from eagle3fn.train.events import Events
from eagle3fn.train.recipe import OURS, check_schedule
from eagle3fn.train.schedules import SCHEDULES, Schedule, named_schedule
from tests.factories import make_batch, make_config, make_frozen
from tests.train.run_files import rows
from tests.train.run_problem import make_problem, train_in

EVERY = pytest.mark.parametrize("name", SCHEDULES)
AT_THE_END = {"cosine": 0.0, "linear": 0.0, "constant": 1.0, "wsd": 0.0}
"""The share of the base from the last step on."""


def settings(name: str, **others: Any) -> OptimizerConfig:
    return OptimizerConfig(schedule=name, learning_rate=1.0, **others)


def rates_of(config: OptimizerConfig, total: int, count: int) -> list[float]:
    rate = named_schedule(config, total)
    return [rate(step) for step in range(count)]


def test_values_in_the_docstrings() -> None:
    result = doctest.testmod(schedules)
    assert result.attempted >= 2 * len(SCHEDULES)
    assert result.failed == 0


@EVERY
@given(total=st.integers(1, 60), warmup=st.floats(0, 0.9), cooldown=st.floats(0.01, 1.0))
def test_a_rate_rises_to_the_base_then_never_rises(
    name: str, total: int, warmup: float, cooldown: float
) -> None:
    """Also at one and two steps, and without a warm-up; from the last step on it is constant."""
    assume(warmup + cooldown <= 1)
    others = {"cooldown_ratio": cooldown} if name == "wsd" else {}
    rates = rates_of(settings(name, warmup_ratio=warmup, **others), total, total + 3)
    rising = int(warmup * total)
    assert rates[:rising] == [(step + 1) / rising for step in range(rising)]
    assert rates[rising] == 1.0 or name == "wsd"
    assert all(0 < rate <= 1 for rate in rates[:total])
    assert all(rates[step] >= rates[step + 1] for step in range(rising, total + 2))
    assert rates[total:] == [AT_THE_END[name]] * 3


@EVERY
@pytest.mark.parametrize(
    ("total", "wanted"),
    [
        (1, {"cosine": [1.0], "linear": [1.0], "constant": [1.0], "wsd": [1.0]}),
        (
            2,
            {
                "cosine": [1.0, 0.5],
                "linear": [1.0, 0.5],
                "constant": [1.0, 1.0],
                "wsd": [1.0, 1.0],
            },
        ),
    ],
)
def test_runs_of_one_and_two_steps(total: int, wanted: dict[str, list[float]], name: str) -> None:
    found = rates_of(settings(name, warmup_ratio=0.0), total, total)
    assert found == pytest.approx(wanted[name])
    assert wanted.keys() == SCHEDULES.keys()


@EVERY
def test_schedule_steps_replace_the_runs_number_of_steps(name: str) -> None:
    short = settings(name, warmup_ratio=0.2, schedule_steps=10)
    whole = settings(name, warmup_ratio=0.2)
    assert rates_of(short, 25, 25) == rates_of(whole, 10, 25)
    with pytest.raises(e3.UserError, match=r"train\.steps = 0: .* at least 1 step"):
        named_schedule(whole, 0)


def test_wsd_with_a_cooldown_of_all_steps_is_linear() -> None:
    whole = settings("wsd", warmup_ratio=0.0, cooldown_ratio=1.0)
    assert rates_of(whole, 7, 9) == pytest.approx(
        rates_of(settings("linear", warmup_ratio=0.0), 7, 9)
    )


@EVERY
def test_the_named_schedule_gives_the_rates_of_a_run(name: str) -> None:
    config = make_config()
    choice = settings(name, warmup_ratio=0.3)
    config = replace(config, optimizer=choice, train=replace(config.train, steps=5))
    fns = e3.bind(config, make_frozen(config))
    state = fns.init_state(fns.init(0))
    found = []
    for step in range(5):
        state, metrics = fns.step(state, make_batch(step, (5, 4)))
        found.append(metrics["learning_rate"])
    assert found == rates_of(choice, 5, 5)


# A user's own.


def halving(config: OptimizerConfig, total_steps: int) -> Schedule:
    """Half the rate of the step before."""
    return lambda step: config.learning_rate / 2**step


def no_function(config: OptimizerConfig, total_steps: int) -> float:
    return config.learning_rate / total_steps


def failing(config: OptimizerConfig, total_steps: int) -> Schedule:
    raise KeyError("no rate")


def leaving(config: OptimizerConfig, total_steps: int) -> Schedule:
    raise SystemExit("no rate")


def test_own_schedule_is_taken_by_name() -> None:
    assert rates_of(settings(f"{__name__}:halving"), 9, 3) == [1.0, 0.5, 0.25]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cosin", r"must be one of 'cosine', 'linear', 'constant', 'wsd', or a function as"),
        ("no_such_module:f", "cannot be imported"),
        ("math:sqrt", r"must be a function of \(config, total_steps\)"),
    ],
)
@pytest.mark.parametrize("steps", [0, 4])
def test_what_names_no_schedule_is_refused_before_any_work(
    name: str, message: str, steps: int
) -> None:
    """By `bind`, also where the number of steps is not chosen yet."""
    assert_refused(name, message, steps)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_function", r"the function returned float; it must take"),
        ("failing", r"the function raised KeyError: 'no rate'; it must take"),
        ("leaving", r"the function raised SystemExit: no rate; it must take"),
    ],
)
def test_what_makes_no_schedule_is_refused_once_the_steps_are_known(name: str, message: str):
    assert_refused(f"{__name__}:{name}", message, steps=4)


def assert_refused(name: str, message: str, steps: int) -> None:
    config = make_config()
    config = replace(config, optimizer=settings(name), train=replace(config.train, steps=steps))
    with pytest.raises(e3.UserError, match=rf"optimizer\.schedule = '{name}': .*{message}"):
        e3.bind(config, make_frozen(config))


RATES: dict[str, Any] = {
    "nan": math.nan,
    "nothing": None,
    "below 0": -1e-3,
    "too high": 10**400,
    "words": "1e-3",
    "a flag": True,
    "complex": 1e-3 + 0j,
    "two": torch.tensor([1e-3, 1e-3]),
    "a flag's tensor": torch.tensor(True),
    "a complex tensor": torch.tensor(1e-3 + 0j),
    "with a gradient": torch.tensor(1e-3, requires_grad=True),
    "a whole number": 1,
    "an array's number": np.float32(1),
    "a tensor": torch.tensor(1.0),
}
GOOD_RATES = ["a whole number", "an array's number", "a tensor"]


@pytest.mark.parametrize("kind", RATES)
def test_a_rate_is_a_real_number_and_others_are_refused_before_any_work(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{__name__}.rate_of_all", RATES[kind])
    if kind not in GOOD_RATES:
        message = r"the rate of step 1 is .*, must be a real number from 0 to 1e\+30; mend it"
        assert_refused(f"{__name__}:always", message, steps=4)
        return
    (rate,) = rates_of(settings(f"{__name__}:always"), 4, 1)
    assert type(rate) is float and rate == 1


rate_of_all: Any = None


def always(config: OptimizerConfig, total_steps: int) -> Schedule:
    return lambda step: rate_of_all


def needs_three(config: OptimizerConfig, total_steps: int) -> Schedule:
    """For the 3 steps of an epoch or 6 of two alone."""
    if total_steps not in (3, 6):
        raise ValueError(f"total_steps={total_steps}")
    return lambda step: 1e-3


def test_a_schedule_is_asked_with_the_runs_own_number_of_steps_alone(tmp_path: Path) -> None:
    """In a run, when it goes on without a word on steps, by epochs, from another, and dry."""
    problem = make_problem(tmp_path / "features", steps=3)
    config = replace(problem.config, optimizer=settings(f"{__name__}:needs_three"))
    problem = problem._replace(config=config)
    epochs = replace(config, train=replace(config.train, steps=0, epochs=1))
    unsaid = problem._replace(config=epochs)

    out = tmp_path / "run"
    assert int(train_in(out, problem, max_steps=1).step) == 1
    assert dry_run(*unsaid, out).horizon.steps == 3
    assert int(train_in(out, unsaid).step) == 3
    assert int(train_in(tmp_path / "by epochs", unsaid).step) == 3
    twice = problem._replace(config=replace(epochs, train=replace(epochs.train, epochs=2)))
    assert int(train_in(tmp_path / "from", twice, source=out).step) == 6


@pytest.mark.parametrize("minutes", [None, 1e-3])
def test_a_schedule_of_other_steps_is_refused_before_anything_is_written(
    tmp_path: Path, minutes: float | None
) -> None:
    problem = make_problem(tmp_path / "features", steps=0, train={"epochs": 3})
    config = replace(problem.config, optimizer=settings(f"{__name__}:failing"))
    with pytest.raises(e3.UserError, match="the function raised KeyError"):
        train_in(tmp_path / "run", problem._replace(config=config), minutes=minutes)
    assert not list((tmp_path / "run").rglob("*.*"))


LATER = {"raises": None, "words": "fast", "nan": math.nan, "below 0": -1e-3, "infinite": math.inf}


def failing_later(config: OptimizerConfig, total_steps: int) -> Schedule:
    """Fails at the fourth step, in the way that `beta1` says; mended, it does not."""

    def rate(step: int) -> Any:
        if step != 3 or "mended" in LATER:
            return 1e-3
        bad = list(LATER.values())[int(10 * config.beta1)]
        return 1 / 0 if bad is None else bad

    return rate


@pytest.mark.parametrize("way", LATER)
def test_a_schedule_that_fails_later_ends_the_run_before_the_update(tmp_path, monkeypatch, way):
    """The updates before it are kept, and the run goes on once the function is mended."""
    problem = make_problem(tmp_path / "features", steps=5)
    name = f"{__name__}:failing_later"
    optimizer = settings(name, beta1=list(LATER).index(way) / 10)
    problem = problem._replace(config=replace(problem.config, optimizer=optimizer))
    out = tmp_path / "run"
    with pytest.raises(e3.UserError, match=rf"schedule = '{name}': .*step 4 .*; mend it, and call"):
        train_in(out, problem)
    assert [row["step"] for row in rows(out / "metrics.jsonl")] == [1, 2, 3]

    said: list[str] = []
    monkeypatch.setitem(LATER, "mended", None)
    train_in(out, problem, events=Events(on_notice=said.append))
    assert said[0].startswith("resumed from step 3 of 5")
    assert [row["step"] for row in rows(out / "metrics.jsonl")] == [1, 2, 3, 4, 5]


def test_a_recipe_with_a_schedule_refuses_another_one() -> None:
    config = replace(make_config(), optimizer=settings("linear"))
    recipe = OURS._replace(name="mine", schedule=halving)
    with pytest.raises(
        e3.UserError, match=r"schedule = 'linear': the recipe 'mine' has a schedule"
    ):
        check_schedule(config, recipe)
    check_schedule(replace(config, optimizer=settings("cosine")), recipe)

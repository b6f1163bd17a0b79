"""Trackers: what is logged to stand-ins of their libraries, and what becomes of one that fails."""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import eagle3fn as e3
from eagle3fn.base.config import to_dict
from eagle3fn.train.events import Events
from eagle3fn.use import trackers
from eagle3fn.use.trackers import TRACKERS, check_trackers, scalars, tracked
from tests.train.run_files import rows
from tests.train.run_problem import Problem, make_problem, train_in

STEPS = 6
Logged = list[tuple[dict[str, float], int]]


class Library:
    """What a stand-in was given: runs opened, their rows, and how many were closed."""

    def __init__(self) -> None:
        self.opened: list[dict[str, Any]] = []
        self.logged: Logged = []
        self.closed = 0
        self.fails_at: int | None = None  # a step
        self.fails_closing = False
        self.error: type[BaseException] = ConnectionError

    def init(self, **options: Any) -> Any:
        self.opened.append(options)
        return SimpleNamespace(log=self.log, finish=self.finish)

    def log(self, row: dict[str, float], step: int) -> None:
        if step == self.fails_at:
            raise self.error("no answer\nfrom the server")
        self.logged.append((row, step))

    def finish(self) -> None:
        self.closed += 1
        if self.fails_closing:
            raise self.error("full")


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> dict[str, Library]:
    """Stand-ins for all three."""
    made = {name: Library() for name in TRACKERS}
    for name in ("wandb", "trackio"):
        module = ModuleType(name)
        module.init = made[name].init  # pyright: ignore[reportAttributeAccessIssue]
        monkeypatch.setitem(sys.modules, name, module)

    board = made["tensorboard"]

    class SummaryWriter:
        def __init__(self, log_dir: str, purge_step: int) -> None:
            board.opened.append({"log_dir": log_dir, "purge_step": purge_step})

        def add_text(self, name: str, text: str, step: int) -> None:
            board.opened[-1][name] = text

        def add_scalar(self, name: str, value: float, step: int) -> None:
            if board.logged and board.logged[-1][1] == step and name not in board.logged[-1][0]:
                board.logged[-1][0][name] = value
            else:
                board.log({name: value}, step)

        def close(self) -> None:
            board.finish()

    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    return made


@pytest.fixture
def problem(tmp_path: Path) -> Problem:
    return make_problem(tmp_path / "features", STEPS, train={"eval_every": 3})


def run(out: Path, problem: Problem, names: list[str], **options: Any) -> list[str]:
    """Train with trackers; what was said."""
    lines: list[str] = []
    events = Events(on_notice=lines.append)
    with tracked(events, names, out, to_dict(problem.config)) as events:
        train_in(out, problem, events=events, **options)
    return lines


@pytest.mark.parametrize("name", TRACKERS)
def test_every_row_is_logged_at_its_step(problem, tmp_path, libraries, name):
    out = tmp_path / "run"
    assert run(out, problem, [name]) == []
    library = libraries[name]
    found: dict[str, float] = {}
    for row, step in library.logged:
        found |= {f"{step} {key}": value for key, value in row.items()}

    expected: dict[str, float] = {}
    for file, prefix in (("metrics.jsonl", "train"), ("eval.jsonl", "held_out")):
        for line in (out / file).read_text().splitlines():
            row = json.loads(line)
            values = scalars(row, prefix)
            expected |= {f"{row['step']} {key}": value for key, value in values.items()}
    assert found == pytest.approx(expected) and len(found) > 100
    assert [step for _, step in library.logged] == sorted(step for _, step in library.logged)
    assert (len(library.opened), library.closed) == (1, 1)
    assert "learning_rate" in str(library.opened[0])


def test_names_of_values_are_by_position_from_one_on():
    row = {"step": 7, "loss": 2.0, "accuracy": [0.5, 0.25], "grad_norm": None}
    assert scalars(row, "train") == {
        "train/loss": 2.0,
        "train/accuracy/1": 0.5,
        "train/accuracy/2": 0.25,
    }


@pytest.mark.parametrize("name", TRACKERS)
def test_a_run_that_goes_on_is_the_same_run_there(problem, tmp_path, libraries, name):
    out = tmp_path / "run"
    run(out, problem, [name], max_steps=2)
    run(out, problem, [name])
    first, second = libraries[name].opened
    if name == "tensorboard":
        assert first["log_dir"] == second["log_dir"] == f"{out}/tensorboard"
        assert (first["purge_step"], second["purge_step"]) == (0, 3)
    else:
        assert first == second and first["resume"] == "allow"
        identity = first["id"] if name == "wandb" else first["name"]
        assert json.loads((out / "tracking.json").read_text())["id"] in identity


def test_runs_of_two_folders_are_two_runs(problem, tmp_path, libraries):
    run(tmp_path / "one", problem, ["wandb"], max_steps=1)
    run(tmp_path / "two", problem, ["wandb"], max_steps=1)
    first, second = libraries["wandb"].opened
    assert first["id"] != second["id"]


FAILURES = pytest.mark.parametrize("error", [ConnectionError, SystemExit])


@FAILURES
@pytest.mark.parametrize("name", TRACKERS)
def test_a_tracker_that_fails_is_said_once_and_the_training_goes_on(
    problem, tmp_path, libraries, name, error
):
    other = "wandb" if name != "wandb" else "trackio"
    libraries[name].fails_at = 2
    libraries[name].error = error
    (line,) = run(tmp_path / "run", problem, [name, other])
    assert line.startswith(f"--track {name}: {error.__name__}: no answer")
    assert "nothing is logged to it from step 2 on" in line and "\n" not in line
    assert len(rows(tmp_path / "run/metrics.jsonl")) == STEPS
    assert {step for _, step in libraries[name].logged} == {0, 1}
    assert {step for _, step in libraries[other].logged} == set(range(STEPS + 1))


@FAILURES
def test_a_tracker_that_cannot_be_closed_is_said(problem, tmp_path, libraries, error):
    libraries["trackio"].fails_closing = True
    libraries["trackio"].error = error
    (line,) = run(tmp_path / "run", problem, ["trackio"])
    assert line.startswith(f"--track trackio: {error.__name__}: full; its last rows may be missing")


def test_trackers_are_closed_where_the_training_fails(problem, tmp_path, libraries):
    def broken(row: dict[str, Any], total: int) -> None:
        raise e3.UserError("a full disk")

    events = Events(on_step=broken)
    with (
        pytest.raises(e3.UserError, match="a full disk"),
        tracked(events, ["wandb"], tmp_path / "run", {}) as events,
    ):
        train_in(tmp_path / "run", problem, events=events)
    assert libraries["wandb"].closed == 1


def test_a_training_that_is_refused_opens_none(problem, tmp_path, libraries):
    run(tmp_path / "run", problem, ["wandb"])
    with (
        pytest.raises(e3.UserError, match="both choose the number of steps"),
        tracked(Events(), ["wandb"], tmp_path / "run", {}) as events,
    ):
        train_in(tmp_path / "run", problem, events=events, minutes=1.0)
    assert len(libraries["wandb"].opened) == 1


@pytest.mark.parametrize("name", TRACKERS)
def test_a_missing_package_is_named_with_its_command(monkeypatch, name):
    monkeypatch.setattr(trackers, "find_spec", lambda package: None)
    with pytest.raises(
        e3.UserError, match=rf"--track {name}: .* not installed; pip install {name}"
    ):
        check_trackers([name])


def test_a_damaged_id_is_said_and_the_training_goes_on(problem, tmp_path, libraries):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/tracking.json").write_text('{"id": "../x"}')
    (line,) = run(tmp_path / "run", problem, ["wandb"])
    assert "no id in it; delete it" in line
    assert libraries["wandb"].opened == []

"""What a training run prints at its end."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from eagle3fn.base import progress
from eagle3fn.base.config import Config
from eagle3fn.base.errors import UserError
from eagle3fn.testing.builders import Case
from eagle3fn.train.events import End, Events
from eagle3fn.use.publish import check_published, run_events

FINISHED = End(step=10, total=10, early=False, compared=True)
ARGUMENTS = ["train", "--out", "my run"]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder."""
    return tmp_path


@pytest.mark.parametrize(
    ("ranks", "program"),
    [(1, "eagle3fn"), (2, "torchrun --nproc-per-node 2 -m eagle3fn.cli")],
)
def test_resume_command_is_made_of_the_arguments_given(run, monkeypatch, ranks, program):
    """Not of those of the process, which may be any program that calls the library."""
    monkeypatch.setattr(sys, "argv", ["notebook", "--port", "8888"])
    line = check_published(run, End(3, 10, False, True), ranks, ARGUMENTS)
    assert line == (f"stopped, step 3 of 10 is saved; resume with {program} train --out 'my run'")


def test_the_draft_of_a_finished_run_is_named(run):
    (run / "draft").mkdir()
    assert check_published(run, FINISHED, 1, ARGUMENTS) == (
        f"{run}/draft: the best draft of 10 steps, by held-out accepted length"
    )


def test_a_run_that_its_patience_ended_is_finished(run):
    (run / "draft").mkdir()
    end = FINISHED._replace(step=4, early=True)
    assert "the best draft of 4 steps" in check_published(run, end, 1, ARGUMENTS)


def test_a_draft_that_was_compared_with_no_other_is_not_called_the_best(run):
    (run / "draft").mkdir()
    line = check_published(run, FINISHED._replace(compared=False), 1, ARGUMENTS)
    assert line.startswith(f"{run}/draft: the draft after 10 steps; no sample was held out")
    assert "best" not in line


def test_a_missing_draft_is_refused(run):
    with pytest.raises(UserError, match="draft: gone, and the run's draft up to step 10"):
        check_published(run, FINISHED, 1, ARGUMENTS)


def events_of(run: Path, **train) -> Events:
    config = Config(Case().draft())
    return run_events(run, replace(config, train=replace(config.train, **train)), 8)


def test_between_evaluations_a_log_gets_step_loss_rate_and_time_left(run, capsys, monkeypatch):
    times = iter([0.0, 31.0, 40.0, 62.0])
    monkeypatch.setattr(progress, "monotonic", lambda: next(times))
    events = events_of(run)
    row = {"tokens": 9, "seconds": 1.0, "learning_rate": 0.00025, "counted": 1.0, "rows": 5}
    for step, loss in ((1, 3.5), (2, 3.25), (3, None)):
        events.on_step(row | {"step": step, "loss": loss}, 9)
    assert capsys.readouterr().out.splitlines() == [
        "step 1 of 9: loss 3.5000, learning rate 0.00025",
        "step 3 of 9: no loss, the update was dropped, learning rate 0.00025, 1 min 33 s left",
    ]


@pytest.mark.parametrize(("init", "said"), [("DRAFT", True), ("target", False)])
def test_a_trained_draft_that_gets_worse_is_said_at_once(run, capsys, init, said):
    events = events_of(run, init=init)
    for step, length in ((0, 1.6), (5, 1.5)):
        events.on_eval({"step": step, "accepted_length": length, "accuracy": [0.5]})
    assert ("advice: after 5 updates" in capsys.readouterr().out) == said


def test_a_draft_that_a_kill_moved_away_is_back(run):
    (run / ".draft.abcdefgh.old/draft").mkdir(parents=True)
    assert check_published(run, FINISHED, 1, ARGUMENTS).startswith(f"{run}/draft: the best draft")


@pytest.mark.parametrize("name", ["draft", "untrained"])
def test_a_link_to_another_runs_draft_is_refused_before_the_training(run, tmp_path, name):
    (tmp_path / "other/draft").mkdir(parents=True)
    (run / name).symlink_to(tmp_path / "other/draft")
    with pytest.raises(UserError, match=rf"{name}: is a link, not a folder; remove it"):
        run_events(run, Config(Case().draft()), 8)


@pytest.mark.parametrize("name", ["draft", "untrained"])
def test_a_strangers_folder_is_refused_before_the_training(run, name):
    (run / name).mkdir()
    (run / name / "config.json").write_text('{"architectures": ["LlamaForCausalLMEagle3"]}')
    with pytest.raises(UserError, match=rf"{name}: holds config\.json, and only what eagle3fn"):
        run_events(run, Config(Case().draft()), 8)
    assert (run / name / "config.json").exists()

"""What a training run prints at its end."""

import sys
from pathlib import Path

import pytest

from eagle3fn.base.config import Config
from eagle3fn.base.errors import UserError
from eagle3fn.testing.builders import Case
from eagle3fn.train.events import End
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
    with pytest.raises(UserError, match="draft: gone since the run ended at step 10"):
        check_published(run, FINISHED, 1, ARGUMENTS)


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

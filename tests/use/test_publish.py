"""What a training run prints at its end."""

import json
import sys
from pathlib import Path

import pytest

from eagle3fn.base.config import Config
from eagle3fn.base.errors import UserError
from eagle3fn.testing.builders import Case
from eagle3fn.use.publish import check_published, run_events

ARGUMENTS = ["train", "--out", "my run"]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of ten steps."""
    (tmp_path / "horizon.json").write_text(json.dumps({"steps": 10}))
    return tmp_path


@pytest.mark.parametrize(
    ("ranks", "program"),
    [(1, "eagle3fn"), (2, "torchrun --nproc-per-node 2 -m eagle3fn.cli")],
)
def test_resume_command_is_made_of_the_arguments_given(run, monkeypatch, ranks, program):
    """Not of those of the process, which may be any program that calls the library."""
    monkeypatch.setattr(sys, "argv", ["notebook", "--port", "8888"])
    line = check_published(run, 3, ranks, ARGUMENTS)
    assert line == (f"stopped, step 3 of 10 is saved; resume with {program} train --out 'my run'")


def test_the_draft_of_a_finished_run_is_named(run):
    (run / "draft").mkdir()
    assert check_published(run, 10, 1, ARGUMENTS) == f"{run}/draft: the best draft of 10 steps"


def test_a_missing_draft_is_refused(run):
    with pytest.raises(UserError, match="draft: gone since the run ended at step 10"):
        check_published(run, 10, 1, ARGUMENTS)


def test_a_draft_that_a_kill_moved_away_is_back(run):
    (run / ".draft.abcdefgh.old/draft").mkdir(parents=True)
    assert check_published(run, 10, 1, ARGUMENTS).startswith(f"{run}/draft: the best draft")


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

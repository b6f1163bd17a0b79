"""Starting, leaving and failing on two ranks: exit codes, one message, no rank left waiting."""

import os
import subprocess
import sys
import time

import pytest

from tests.train.start_ranks import ROOT, processes, torchrun

JOB = "tests.train.launch_job"

WITHIN_S = 60
"""From one rank's failure to the end of all; 3 and less on a machine that is not busy, 21 were seen
on one that was."""

SOON_S = 100
"""Starting Python twice on a busy machine; a rank left waiting would wait for half an hour."""


def test_program_without_torchrun_leaves_nothing(tmp_path):
    command = [sys.executable, "-m", JOB, "nothing", str(tmp_path)]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 0


def test_incomplete_environment_of_ranks_is_refused_in_one_line(tmp_path):
    command = [sys.executable, "-m", JOB, "nothing", str(tmp_path)]
    environment = os.environ | {"RANK": "0"}
    ended = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 2
    assert "RANK is set" in ended.stderr
    assert "start the ranks by torchrun" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


@pytest.mark.parametrize("how", ["checkpoint", "destroyed"])
def test_successful_run_ends_with_exit_code_0_on_all_ranks(how, tmp_path):
    ended = processes(2, "-m", JOB, how, tmp_path)
    assert ended.codes == [0, 0], ended.text
    assert (tmp_path / "step-00000002/meta.json").exists()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("first_raises", "job: this rank has had enough"),
        ("asleep", "job: this rank has had enough"),
        ("bug", "ZeroDivisionError: a bug of this rank"),
        (
            "all_raise",
            "job: data.global_batch = 1 and data.micro_batch = 1 make 1 micro-batches an update",
        ),
        ("threads", "job: number of threads is 1 on rank 0, 2 on rank 1; start all ranks alike"),
        ("killed", "job: rank 0: another rank is gone"),
    ],
)
def test_failure_of_one_rank_ends_all_with_its_message_once(how, message, tmp_path):
    ended = processes(2, "-m", JOB, how, tmp_path, timeout=SOON_S)
    assert all(ended.codes), ended.text
    if (tmp_path / "raised").exists():
        raised = float((tmp_path / "raised").read_text())
        assert time.time() - raised < WITHIN_S
    assert ended.text.count(message) == 1, ended.text
    if how != "bug":
        assert "Traceback" not in ended.text, ended.text


def test_torchrun_reports_the_failure_once(tmp_path):
    ended = torchrun(2, "-m", JOB, "last_raises", tmp_path, timeout=SOON_S)
    assert ended.codes == [1]
    assert ended.text.count("job: this rank has had enough") == 1, ended.text

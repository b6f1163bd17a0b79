"""Faults on two ranks: each ends with one message, and the run resumes from its last checkpoint."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.faults_job import LAST, STEPS
from tests.train.run_files import read_leaves, rows, same_end
from tests.train.start_ranks import ROOT, run_job


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A folder in which all faults have happened; `seen.json` has how each run ended."""
    folder = tmp_path_factory.mktemp("faults")
    run_job("tests.train.faults_job", folder)
    return folder


def seen(root: Path, name: str) -> list[dict[str, Any]]:
    """How the run with a fault ended, and the one after it."""
    return json.loads((root / "seen.json").read_text())[name]


def goes_on(root: Path, name: str, whole: str = "whole") -> bool:
    """Whether a run has ended as the run that nothing happened to."""
    return same_end(root / name, root / whole, STEPS)


SHARD = f"shard-{LAST[1]:05d}.safetensors"
FAULTS = {
    "missing": [SHARD, "missing", "run eagle3fn extract again"],
    "truncated": [SHARD, "500 bytes", "run eagle3fn extract again"],
    "flipped": [SHARD, "its bytes have changed", "run eagle3fn extract again"],
    "nan": [SHARD, f"'row{LAST[1]}'", "aux_hidden holds NaN or infinity at token 3"],
    "large": [
        "step-00000004: not written",
        "rank 1",
        "the checkpoints before it are whole; make room",
    ],
    "config": ["optimizer.learning_rate was", "is 0.5", "set it back"],
    "killed": ["another rank is gone", "start all ranks again"],
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_on_two_ranks_is_reported_once_and_the_run_goes_on(root, name):
    fault, after = seen(root, name)
    assert all(fault["codes"]), fault
    assert 2 in fault["codes"]
    assert fault["text"].count("eagle3fn train: ") == 1, fault["text"]
    assert "Traceback" not in fault["text"]
    for text in FAULTS[name]:
        assert text in fault["text"], fault["text"]

    assert after["codes"] == [0], after["text"]
    assert goes_on(root, name)


def test_sigterm_on_one_rank_saves_and_ends_all_with_exit_code_0(root):
    stopped, after = seen(root, "sigterm")
    assert stopped["codes"] == [0, 0]
    message = f"step 3 of {STEPS} is saved; resume with torchrun --nproc-per-node 2 "
    message += "-m eagle3fn.cli train --target"
    assert stopped["text"].count(message) == 1
    assert after["codes"] == [0]
    assert goes_on(root, "sigterm")


def test_second_start_of_a_run_that_goes_on_ends_all_its_ranks(root):
    (fault,) = seen(root, "held")
    assert all(fault["codes"])
    assert fault["text"].count("another process is at work there") == 1, fault["text"]
    assert fault["text"].count("eagle3fn train: ") == 1
    assert "Traceback" not in fault["text"]
    assert same_end(root / "held", root / "half", 3)


def test_loss_that_is_not_finite_stops_all_ranks(root):
    stopped, _ = seen(root, "overflow")
    assert all(stopped["codes"])
    names = ", ".join(f"row{number}" for number in LAST)
    message = f"step {STEPS}: the loss or its gradient is not finite; samples {names};"
    assert message in stopped["text"]
    assert "overflow/checkpoints/step-00000006" in stopped["text"]
    assert "--on-nonfinite skip" in stopped["text"]


def test_skipped_update_changes_no_value_and_is_counted(root):
    _, after = seen(root, "overflow")
    assert after["codes"] == [0, 0], after["text"]
    assert seen(root, "skip")[0]["codes"] == [0]
    assert goes_on(root, "overflow", "skip")

    last = rows(root / "overflow/metrics.jsonl")[-1]
    assert last["loss"] is None
    assert last["skipped"] == 1

    # The step before it was made; its own values are finite, as they were.
    state = read_leaves(root / f"overflow/checkpoints/step-{STEPS:08d}")
    before = read_leaves(root / "overflow/checkpoints/step-00000006")
    assert int(state["step"]) == STEPS
    assert all(leaf.isfinite().all() for leaf in state.values())
    assert not torch.equal(state["masters.fc.weight"], before["masters.fc.weight"])


def test_full_disk_leaves_the_checkpoints_before(root):
    if "full" not in json.loads((root / "seen.json").read_text()):
        pytest.skip("a small file system must be mounted, which needs the right to")
    fault, after = seen(root, "full")
    assert all(fault["codes"])
    assert "No space left on device" in fault["text"]
    assert after["left"] == ["step-00000002"]
    assert after["codes"] == [0]
    assert goes_on(root, "full")


def test_killed_runs_resume_to_the_same_bits():
    command = [sys.executable, "-m", "tests.train.kill_resume"]
    command += ["--kills", "3", "--ranks", "2,1", "1,2", "--seed", "7", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["kills"] == counts["equal"] == sum(counts["ranks"].values()) == 3
    assert counts["lost"] == counts["repeated"] == 0

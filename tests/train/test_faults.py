"""Faults on two ranks: each ends with a message, and the run goes on from its last good checkpoint to the same bits."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from eagle3fn.train.checkpoint import read_leaves
from tests.train.faults_job import LAST, STEPS

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A folder in which all faults have happened; `seen.json` says how each run ended."""
    folder = tmp_path_factory.mktemp("faults")
    log = folder / "job.log"
    with log.open("w") as file:
        command = [sys.executable, "-m", "tests.train.faults_job", str(folder)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        code = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=file, stderr=file, check=False
        ).returncode
    assert code == 0, log.read_text()
    return folder


def seen(root: Path, name: str) -> tuple[dict[str, Any], ...]:
    return tuple(json.loads((root / "seen.json").read_text())[name])


def rows(path: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in found]


def same_end(root: Path, name: str, whole: str = "whole") -> bool:
    last = f"checkpoints/step-{STEPS:08d}"
    one, two = read_leaves(root / name / last), read_leaves(root / whole / last)
    equal = one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    return equal and rows(root / name / "metrics.jsonl") == rows(root / whole / "metrics.jsonl")


FAULTS = [
    ("missing", [f"shard-{LAST[1]:05d}.safetensors", "missing", "run eagle3fn extract again"]),
    ("truncated", [f"shard-{LAST[1]:05d}.safetensors", "500 bytes", "run eagle3fn extract again"]),
    (
        "flipped",
        [
            f"shard-{LAST[1]:05d}.safetensors",
            "its bytes have changed",
            "run eagle3fn extract again",
        ],
    ),
    (
        "nan",
        [
            f"shard-{LAST[1]:05d}.safetensors",
            f"'row{LAST[1]}'",
            "aux_hidden holds NaN or infinity at token 3",
        ],
    ),
    (
        "large",
        ["step-00000004: not written", "rank 1", "the checkpoints before it are whole; make room"],
    ),
    ("config", ["optimizer.learning_rate was", "is 0.5", "set it back"]),
    ("killed", ["another rank is gone", "start all ranks again"]),
]


@pytest.mark.parametrize(("name", "texts"), FAULTS, ids=[name for name, _ in FAULTS])
def test_a_fault_on_two_ranks_is_told_once_and_the_run_goes_on(root, name, texts):
    fault, after = seen(root, name)
    assert all(fault["codes"]), fault
    assert 2 in fault["codes"]
    assert fault["text"].count("eagle3fn train: ") == 1, fault["text"]
    assert "Traceback" not in fault["text"]
    for text in texts:
        assert text in fault["text"], fault["text"]
    assert after["codes"] == [0], after["text"]
    assert same_end(root, name)


def test_sigterm_on_one_rank_ends_all_well(root):
    stopped, after = seen(root, "sigterm")
    assert stopped["codes"] == [0, 0]
    told = f"step 3 of {STEPS} is saved; resume with torchrun --nproc-per-node 2 -m eagle3fn.cli train --target"
    assert stopped["text"].count(told) == 1
    assert after["codes"] == [0]
    assert same_end(root, "sigterm")


def test_a_loss_that_is_not_finite_stops_all_ranks_or_is_left_out(root):
    stopped, after = seen(root, "overflow")
    assert all(stopped["codes"])
    names = ", ".join(f"row{number}" for number in LAST)
    assert (
        f"step {STEPS}: the loss or its gradient is not finite; samples {names};" in stopped["text"]
    )
    assert "overflow/checkpoints/step-00000006" in stopped["text"]
    assert "--on-nonfinite skip" in stopped["text"]
    assert after["codes"] == [0, 0], after["text"]
    assert seen(root, "skip")[0]["codes"] == [0]
    assert same_end(root, "overflow", "skip")
    last = rows(root / "overflow/metrics.jsonl")[-1]
    assert (last["loss"], last["skipped"]) == (None, 1)
    state = read_leaves(root / f"overflow/checkpoints/step-{STEPS:08d}")
    before = read_leaves(root / "overflow/checkpoints/step-00000006")
    assert int(state["step"]) == STEPS
    assert all(leaf.isfinite().all() for leaf in state.values())
    assert not torch.equal(
        state["masters.fc.weight"], before["masters.fc.weight"]
    )  # step 7 was made


def test_a_full_disk_leaves_the_checkpoints_before(root):
    if "full" not in json.loads((root / "seen.json").read_text()):
        pytest.skip("a small file system must be mounted, which needs the right to")
    fault, after = seen(root, "full")
    assert all(fault["codes"])
    assert "No space left on device" in fault["text"]
    assert after["left"] == ["step-00000002"]
    assert after["codes"] == [0]
    assert same_end(root, "full")


def test_killed_runs_resume_to_the_same_bits():
    command = [
        sys.executable,
        "tests/train/kill_resume.py",
        "--kills",
        "3",
        "--ranks",
        "2,1",
        "--seed",
        "7",
        "--json",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    line = json.loads(done.stdout.splitlines()[-1])
    assert line["kills"] == line["equal"] == len(line["resumed_from"]) == 3
    assert line["lost"] == line["repeated"] == 0

"""Ctrl-C and SIGTERM in every stage: one line that names the command, which then goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.signals_job import PLACES
from tests.stages import STEPS, commands
from tests.train.start_ranks import ROOT, run_job

TIMES = 600


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A folder in which all signals have come; `seen.json` has how each stage ended."""
    folder = tmp_path_factory.mktemp("signals")
    run_job("tests.signals_job", folder)
    return folder


def seen(root: Path, name: str) -> dict[str, Any]:
    """How a stage ended after its signal, and when it was called again."""
    return json.loads((root / "seen.json").read_text())[name]


@pytest.mark.parametrize("stage", sorted(set(PLACES) - {"train"}))
def test_ctrl_c_is_one_line_that_names_the_command(root, stage):
    found = seen(root, f"{stage} SIGINT")
    assert found["stopped"]["code"] == 130, found
    text = found["stopped"]["text"]
    assert "Traceback" not in text
    assert text.count(f"eagle3fn {stage}: stopped by Ctrl-C; ") == 1, text
    last = text.splitlines()[-1]
    assert f" with eagle3fn {stage} --" in last

    assert found["left"] == []
    assert found["again"]["code"] == 0, found["again"]["text"]


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 0)])
def test_training_saves_its_step_and_names_the_command(root, name, code):
    found = seen(root, f"train {name}")
    assert found["stopped"]["code"] == code, found
    by = "Ctrl-C" if name == "SIGINT" else "SIGTERM"
    line = f"stopped by {by}, step 3 of {STEPS} is saved; resume with eagle3fn train --target"
    assert found["stopped"]["text"].splitlines()[-1].startswith(line)
    assert found["left"] == []
    assert found["again"]["code"] == 0
    assert f"best draft of {STEPS} steps" in found["again"]["text"]


def test_sigterm_in_a_report_leaves_no_temporary_file(root):
    found = seen(root, "report SIGTERM")
    assert found["stopped"]["code"] == 143
    assert found["left"] == []


def test_ctrl_c_to_torchrun_saves_a_step_on_all_ranks(root, tmp_path):
    """torchrun passes it on, and prints a traceback of its own; the ranks print one line."""
    out = tmp_path / "train"
    line = commands(root / "world", tmp_path)["train"][:-2]
    line[line.index(f"train.steps={STEPS}")] = "train.steps=100000"
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    start += ["--nproc-per-node", "2", "-m", "eagle3fn.cli", *line]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            start, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=log
        )
    for _ in range(TIMES):
        if (out / "metrics.jsonl").is_file() or process.poll() is not None:
            break
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    process.wait(120)

    text = (tmp_path / "log").read_text()
    assert text.count("stopped by Ctrl-C, step ") == 1, text
    assert "resume with torchrun --nproc-per-node 2 -m eagle3fn.cli train --target" in text
    (saved,) = list((out / "checkpoints").glob("step-*"))[-1:]
    rows = (out / "metrics.jsonl").read_text().splitlines()
    assert json.loads(rows[-1])["step"] == int(saved.name.removeprefix("step-"))

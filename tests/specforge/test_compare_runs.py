"""Two runs' metrics compared by exact value: what is equal, what differs first, what is refused."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from eagle3fn.specforge import compare_runs

ROOT = Path(__file__).resolve().parents[2]


def write_run(path: Path, count: int = 4, **changes: Any) -> Path:
    """Metrics of `count` steps; `changes` replace values of the third."""
    rows = []
    for step in range(1, count + 1):
        row = {
            "step": step,
            "loss": 1.0 / step,
            "accuracy": [0.5, 0.25],
            "acceptance": [0.1, 0.2],
            "grad_norm": step + 0.5,
        }
        rows.append(row | (changes if step == 3 else {}))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_equal_runs_exit_with_0(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    left = write_run(tmp_path / "left.jsonl")
    right = write_run(tmp_path / "right.jsonl")
    assert compare_runs.main([str(left), str(right), "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "| step | old loss | new loss | old accuracy | new accuracy | old acceptance | "
        "new acceptance | old grad_norm | new grad_norm |"
    )
    assert lines[2] == "| 1 | 1 | 1 | 0.5 | 0.5 | 0.1 | 0.1 | 1.5 | 1.5 |"
    assert len(lines) == 2 + 4 + 2
    assert lines[-2] == "equal at every step: 4 of 4"
    assert json.loads(lines[-1]) == {"steps": [4, 4], "equal": True, "first_difference": None}


@pytest.mark.parametrize(
    ("name", "value", "label"),
    [
        ("loss", math.nextafter(1 / 3, 1), "loss"),
        ("grad_norm", 3.25, "grad_norm"),
        ("accuracy", [0.5, 0.3], "accuracy[1]"),
        ("acceptance", [0.1], "acceptance[1]"),
    ],
)
def test_the_first_difference_is_named_if_only_one_ulp(
    tmp_path: Path, capsys: pytest.CaptureFixture, name: str, value: Any, label: str
) -> None:
    left = write_run(tmp_path / "left.jsonl")
    right = write_run(tmp_path / "right.jsonl", **{name: value})
    assert compare_runs.main([str(left), str(right), "--steps", "1"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 1 + 1
    assert lines[-1].startswith(f"first unequal step: 3, {label} ")

    assert compare_runs.main([str(left), str(right), "--json"]) == 1
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["equal"] is False
    assert list(found["first_difference"]) == ["step", "name", "old", "new"]
    assert found["first_difference"]["name"] == label


def test_a_shorter_run_is_not_equal(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    left = write_run(tmp_path / "left.jsonl")
    right = write_run(tmp_path / "right.jsonl", 3)
    assert compare_runs.main([str(left), str(right)]) == 1
    expected = "first unequal step: 4, which the new run does not have"
    assert expected in capsys.readouterr().out
    assert compare_runs.main([str(right), str(left)]) == 1
    assert "which the old run does not have" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda p: p.unlink(), "no such file"),
        (lambda p: p.write_text(""), "no rows"),
        (lambda p: p.write_text(p.read_text()[:-20]), ":4: not JSON"),
        (lambda p: write_run(p, loss=math.nan), ":3: not JSON (NaN"),
        (lambda p: write_run(p, loss=True), ":3: loss holds True"),
        (lambda p: write_run(p, acceptance=[0.1, math.inf]), ":3: not JSON (Infinity"),
        (lambda p: write_run(p, acceptance=[]), ":3: acceptance is []: must be a list"),
        (lambda p: write_run(p, grad_norm=None), ":3: grad_norm is None: must be a number"),
        (lambda p: write_run(p, accuracy=0.5), ":3: accuracy is 0.5: must be a list"),
        (lambda p: write_run(p, step=4), ":3: step 4: must be 3"),
        (lambda p: p.write_text("7\n"), ":1: step 7: must be 1"),
        (lambda p: p.write_text("1\n"), ":1: step 1: must be 1"),
        (lambda p: write_run(p, loss=10**400), ":3: not JSON (a whole number of 401 digits"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(
    tmp_path: Path, damage: Any, named: str, capsys: pytest.CaptureFixture
) -> None:
    left = write_run(tmp_path / "left.jsonl")
    folder = tmp_path / "right"
    folder.mkdir()
    damage(write_run(folder / "metrics.jsonl"))
    assert compare_runs.main([str(left), str(folder)]) == 2
    line = capsys.readouterr().err
    assert named in line
    assert "metrics.jsonl" in line
    assert line.count("\n") == 1


def test_the_script_compares_two_files(tmp_path: Path) -> None:
    left = write_run(tmp_path / "left.jsonl")
    right = write_run(tmp_path / "right.jsonl", loss=2.0)
    command = [sys.executable, "scripts/compare_runs.py", str(left), str(right)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "first unequal step: 3, loss" in done.stdout

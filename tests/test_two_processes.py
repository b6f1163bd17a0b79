"""All tests in two processes: what a run's end says of its tests is said there too."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COUNTED = "tests/testing/test_testing.py"
OF_ENGINES = "tests/use/test_real_layouts.py"


def test_end_of_a_run_in_two_processes_has_the_counts_of_both() -> None:
    """Cases that properties were checked on, and tests that were left out."""
    pytest.importorskip("xdist", reason="pytest-xdist comes with the extra `test`")
    command = [sys.executable, "-m", "pytest", "-n", "2", "--dist", "loadfile"]
    command += ["-p", "no:cacheprovider", "-k", "nontrivial", COUNTED, OF_ENGINES]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"HYPOTHESIS_PROFILE": "gate"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    counted = re.findall(r"^(test_\w+): \d+ cases, \d+ non-trivial", done.stdout, re.M)
    assert sorted(counted) == [
        "test_four_of_five_are_nontrivial",
        "test_the_strategys_cases_are_nontrivial",
    ]
    assert re.search(r"^\d+ tests need a serving engine", done.stdout, re.M)

"""A few hundred mutated files: the command line takes each well (scripts/fuzz_inputs.py)."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
CASES = {"dev": 60, "nightly": 5000}
SEED = 15


def test_mutated_files_end_in_clear_errors_or_right_results():
    cases = CASES.get(os.environ.get("HYPOTHESIS_PROFILE", "ci"), 120)
    script = [sys.executable, "scripts/fuzz_inputs.py", "--workers", "1", "--json"]
    ended = subprocess.run(
        [*script, "--cases", str(cases), "--seed", str(SEED)],
        check=False,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout
    found = json.loads(ended.stdout.splitlines()[-1])
    assert found["cases"] == cases and found["other"] == 0
    assert found["clear_errors"] > cases / 4 and found["unharmed"] > 0 and found["changed"] > 0

"""Kills a training, an extraction or an evaluation, calls it again, and compares; --help has all.

The check stands with the tests: `python -m tests.train.kill_resume`.
"""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    os.chdir(Path(__file__).resolve().parents[1])
    os.execv(sys.executable, [sys.executable, "-m", "tests.train.kill_resume", *sys.argv[1:]])

"""Mutate every kind of file that the commands read, and say how they took it: `tests.fuzz`.

python scripts/fuzz_inputs.py --cases N --seed S --json
"""

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    runpy.run_module("tests.fuzz", run_name="__main__", alter_sys=True)

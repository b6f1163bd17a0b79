"""Trains many steps of a tiny problem and looks whether memory and open files grow.

    python -m tests.soak --steps 5000 --json

The training is `eagle3fn train` in a process of its own, with held-out evaluations and checkpoints
on its way. Its resident memory and its open files are read from /proc as it goes; the median of the
last quarter is compared with that of the second, as the first one warms caches up.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

from eagle3fn.base.provenance import provenance
from tests.stages import STEPS, commands, write_world
from tests.train.start_ranks import ROOT

PERIOD_S = 0.2
GROWTH = 1.02  # of resident memory, at most


class Look(NamedTuple):
    """What a process holds."""

    bytes: int  # resident
    files: int  # open


def look(pid: int) -> Look | None:
    """What a process holds now; None once it has ended."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return Look(pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir(f"/proc/{pid}/fd")))
    except (OSError, IndexError):
        return None


def train(world: Path, out: Path, steps: int) -> list[Look]:
    """Train so many steps; what the process held, from the first step to the last."""
    line = commands(world, out)["train"]
    line[line.index(f"train.steps={STEPS}")] = f"train.steps={steps}"
    line[line.index("train.eval_every=3")] = "train.eval_every=50"
    line[line.index("train.checkpoint_every=2")] = "train.checkpoint_every=100"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    looks = []
    with (out / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "eagle3fn.cli", *line], env=environment, stdout=log, stderr=log
        )
        while process.poll() is None:
            found = look(process.pid)
            if found and (out / "train/metrics.jsonl").exists():
                looks.append(found)
            time.sleep(PERIOD_S)
    if process.returncode:
        raise SystemExit(f"ended with {process.returncode}: {(out / 'log').read_text()}")
    return looks


def compare(looks: list[Look]) -> dict[str, float]:
    """Medians of the second and of the last quarter."""
    quarter = len(looks) // 4
    second = looks[quarter : 2 * quarter]
    last = looks[-quarter:]
    return {
        "looks": len(looks),
        "mib_second_quarter": round(median(found.bytes for found in second) / 2**20, 1),
        "mib_last_quarter": round(median(found.bytes for found in last) / 2**20, 1),
        "files_second_quarter": median(found.files for found in second),
        "files_last_quarter": median(found.files for found in last),
    }


def main() -> int:
    """Train and compare; 0 if neither grew."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=5000, help="default 5000")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        world = Path(folder) / "world"
        write_world(world)
        out = Path(folder) / "out"
        out.mkdir()
        begin = time.monotonic()
        looks = train(world, out, options.steps)
        seconds = round(time.monotonic() - begin, 1)
        steps = len((out / "train/metrics.jsonl").read_text().splitlines())

    found = {"steps": steps, "seconds": seconds, **compare(looks)}
    if options.json:
        print(json.dumps({**provenance("python -m tests.soak --json"), **found}))
    else:
        for name, value in found.items():
            print(f"{name:<24}{value}")
    flat = found["mib_last_quarter"] <= GROWTH * found["mib_second_quarter"]
    same_files = found["files_last_quarter"] == found["files_second_quarter"]
    return 0 if steps == options.steps and flat and same_files else 1


if __name__ == "__main__":
    sys.exit(main())

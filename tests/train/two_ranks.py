"""Trains one run on one rank and on several, kills it on several and resumes it on one, and compares what they wrote.

    python tests/train/two_ranks.py --work FOLDER -- --target T --features F --vocab V --set train.reduce=tree …

Behind `--` stand the arguments of `eagle3fn train`, without `--out`. Several ranks are started by torchrun. Compared
with the run on one rank: every leaf of the last checkpoint by `torch.equal`, the rows of `metrics.jsonl` and
`eval.jsonl` without their times, the draft's files byte by byte. Exit code 0: all equal; 1: a difference.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from eagle3fn.base.files import read_jsonl, sha256, write_json
from eagle3fn.base.provenance import provenance
from eagle3fn.train.checkpoint import checkpoints, read_leaves

_PATIENCE_S = 3600.0


def start(ranks: int, arguments: list[str], out: Path) -> subprocess.Popen:
    """`eagle3fn train` on so many ranks; what it prints goes to `out` with `.log` behind it."""
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        if ranks > 1
        else []
    )
    command = [
        sys.executable,
        *launcher,
        "-m",
        "eagle3fn.cli",
        "train",
        *arguments,
        "--out",
        str(out),
    ]
    with out.with_suffix(".log").open("a") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)


def finish(ranks: int, arguments: list[str], out: Path) -> None:
    """Train to the end, or stop this script."""
    code = start(ranks, arguments, out).wait(_PATIENCE_S)
    if code:
        raise SystemExit(f"{out}: ended with exit code {code}; see {out.with_suffix('.log')}")


def kill(ranks: int, arguments: list[str], out: Path, steps: int) -> int:
    """SIGKILL every process of a run once it has told `steps` steps; returns the step that a resumed run begins at."""
    launched, metrics = start(ranks, arguments, out), out / "metrics.jsonl"
    while launched.poll() is None and not (
        metrics.exists() and len(metrics.read_bytes().splitlines()) >= steps
    ):
        time.sleep(0.02)
    if launched.poll() is not None:
        raise SystemExit(f"{out}: ended before step {steps}; see {out.with_suffix('.log')}")
    for process in [launched.pid, *children(launched.pid)]:
        os.kill(process, signal.SIGKILL)
    launched.wait()
    found = checkpoints(out / "checkpoints")
    return int(found[-1].name.removeprefix("step-")) if found else 0


def children(process: int) -> list[int]:
    """The processes that a process has started, from /proc."""
    return [
        int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()
    ]


def compare(run: Path, whole: Path) -> dict[str, bool]:
    """What is equal in two finished runs."""
    one, two = (checkpoints(folder / "checkpoints")[-1] for folder in (run, whole))
    left, right = read_leaves(one), read_leaves(two)
    same = left.keys() == right.keys() and all(
        torch.equal(left[name], right[name]) for name in left
    )
    equal = {f"{one.name}, {len(left)} leaves": one.name == two.name and same}
    equal |= {
        name: rows(run / name) == rows(whole / name) for name in ("metrics.jsonl", "eval.jsonl")
    }
    return equal | {"draft/, all files": files(run / "draft") == files(whole / "draft")}


def rows(path: Path) -> list[dict[str, Any]]:
    """A file's rows without the times."""
    return [
        {key: value for key, value in row.items() if key != "seconds"} for row in read_jsonl(path)
    ]


def files(folder: Path) -> dict[str, str]:
    """Hashes of a folder's files."""
    return {path.name: sha256(path) for path in folder.iterdir()}


def main() -> int:
    """Parse the options, train three times, compare; 0 if all is equal."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2, help="ranks compared with one (default 2)")
    parser.add_argument(
        "--kill-after", type=int, default=3, help="steps after which a run is killed (default 3)"
    )
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for the runs, empty or not yet there"
    )
    parser.add_argument("--out", help="JSON file for the result")
    parser.add_argument("arguments", nargs="+", help="of eagle3fn train, behind --, without --out")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    if any(options.work.iterdir()):
        parser.error(f"--work: {options.work} is not empty")
    one, several, killed = (options.work / name for name in ("one", "several", "killed"))
    finish(1, options.arguments, one)
    finish(options.ranks, options.arguments, several)
    resumed_from = kill(options.ranks, options.arguments, killed, options.kill_after)
    finish(1, options.arguments, killed)
    equal = {
        f"{options.ranks} ranks": compare(several, one),
        "killed, resumed on 1": compare(killed, one),
    }
    good = all(all(part.values()) for part in equal.values())
    words = [Path(word).name if Path(word).is_absolute() else word for word in options.arguments]
    command = shlex.join(
        ["python", "tests/train/two_ranks.py", "--ranks", str(options.ranks), "--", *words]
    )
    result = {
        "equal": good,
        "compared": equal,
        "resumed_from": resumed_from,
        "metrics": rows(one / "metrics.jsonl"),
    }
    result |= {"config": (one / "config.toml").read_text().splitlines()} | provenance(command)
    if options.out:
        write_json(options.out, result)
    print(json.dumps({name: result[name] for name in ("equal", "compared", "resumed_from")}))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())

"""Trains on one rank and on several, kills and resumes, and compares what the runs wrote.

    python -m tests.train.two_ranks --work FOLDER -- --target T --features F --vocab V \\
        --set train.reduce=tree …

After `--` come the arguments of `eagle3fn train`, without `--out`. Several ranks are started by
torchrun. Compared with the run on one rank: every leaf of the last checkpoint by `torch.equal`, the
rows of `metrics.jsonl` and `eval.jsonl` without their times, the draft's files byte by byte. Exit
code 0: all equal; 1: a difference.
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

os.environ.setdefault("OMP_NUM_THREADS", "1")

from eagle3fn.base.files import sha256, write_json
from eagle3fn.base.provenance import provenance
from eagle3fn.train.checkpoint import checkpoints
from tests.train.run_files import read_leaves, rows, same_leaves, same_rows

_PATIENCE_S = 3600.0


def start(ranks: int, arguments: list[str], out: Path) -> subprocess.Popen:
    """`eagle3fn train` on so many ranks; what it prints goes to `out` with the suffix `.log`."""
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += ["-m", "eagle3fn.cli", "train", *arguments, "--out", str(out)]
    with out.with_suffix(".log").open("a") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)


def finish(ranks: int, arguments: list[str], out: Path) -> None:
    """Train to the end, or end this program."""
    code = start(ranks, arguments, out).wait(_PATIENCE_S)
    if code:
        raise SystemExit(f"{out}: ended with exit code {code}; see {out.with_suffix('.log')}")


def kill(ranks: int, arguments: list[str], out: Path, steps: int) -> int:
    """SIGKILL every process of a run once it has written `steps` rows.

    Returns:
        The step from which a resumed run goes on.
    """
    launched = start(ranks, arguments, out)
    metrics = out / "metrics.jsonl"
    while launched.poll() is None and _lines(metrics) < steps:
        time.sleep(0.02)
    if launched.poll() is not None:
        raise SystemExit(f"{out}: ended before step {steps}; see {out.with_suffix('.log')}")

    for process in [launched.pid, *children(launched.pid)]:
        os.kill(process, signal.SIGKILL)
    launched.wait()
    found = checkpoints(out / "checkpoints")
    return int(found[-1].name.removeprefix("step-")) if found else 0


def _lines(path: Path) -> int:
    return len(path.read_bytes().splitlines()) if path.exists() else 0


def children(process: int) -> list[int]:
    """The processes that a process has started, from /proc."""
    text = Path(f"/proc/{process}/task/{process}/children").read_text()
    return [int(child) for child in text.split()]


def compare(run: Path, whole: Path) -> dict[str, bool]:
    """What is equal in two finished runs, by name."""
    last = checkpoints(run / "checkpoints")[-1]
    last_of_whole = checkpoints(whole / "checkpoints")[-1]
    same_last = last.name == last_of_whole.name and same_leaves(last, last_of_whole)
    return {
        f"{last.name}, {len(read_leaves(last))} leaves": same_last,
        "metrics.jsonl": same_rows(run, whole, ("metrics.jsonl",)),
        "eval.jsonl": same_rows(run, whole, ("eval.jsonl",)),
        "draft/, all files": hashes(run / "draft") == hashes(whole / "draft"),
    }


def hashes(folder: Path) -> dict[str, str]:
    """Hashes of a folder's files."""
    return {path.name: sha256(path) for path in folder.iterdir()}


def make_parser() -> argparse.ArgumentParser:
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
    parser.add_argument("arguments", nargs="+", help="of eagle3fn train, after --, without --out")
    return parser


def main() -> int:
    """Train three times, compare; 0 if all is equal."""
    parser = make_parser()
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    if any(options.work.iterdir()):
        parser.error(f"--work: {options.work} is not empty")

    one = options.work / "one"
    several = options.work / "several"
    killed = options.work / "killed"
    finish(1, options.arguments, one)
    finish(options.ranks, options.arguments, several)
    resumed_from = kill(options.ranks, options.arguments, killed, options.kill_after)
    finish(1, options.arguments, killed)

    compared = {
        f"{options.ranks} ranks": compare(several, one),
        "killed, resumed on 1": compare(killed, one),
    }
    equal = all(all(part.values()) for part in compared.values())
    counts = {"equal": equal, "compared": compared, "resumed_from": resumed_from}

    if options.out:
        words = [
            Path(word).name if Path(word).is_absolute() else word for word in options.arguments
        ]
        command = ["python", "-m", "tests.train.two_ranks", "--ranks", str(options.ranks)]
        runs = {
            "metrics": rows(one / "metrics.jsonl"),
            "config": (one / "config.toml").read_text().splitlines(),
        }
        about = provenance(shlex.join([*command, "--", *words]))
        write_json(options.out, counts | runs | about)
    print(json.dumps(counts))
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())

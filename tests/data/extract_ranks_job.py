"""Extractions on several ranks, in forks: killed, resumed on others, refused; results as JSON.

`python -m tests.data.extract_ranks_job FOLDER` reads FOLDER/target and FOLDER/talks.jsonl, and
writes FOLDER/results.json.
"""

import json
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import transformers.models.auto.modeling_auto
import transformers.models.llama.modeling_llama
import transformers.models.llama.tokenization_llama  # noqa: F401  so that forks need not

from eagle3fn import cli
from eagle3fn.base import launch
from eagle3fn.base.files import sha256
from eagle3fn.data import extract as extraction
from eagle3fn.data import sources
from tests.train.forked import POLL_S, Ranks

PATIENCE_S = 100.0
SHARD = 3  # samples
launch._SILENT_S = 3.0

SECONDS = 0.15  # that a run of the target takes

_extract = extraction.extract
_run_target = sources.run_target


def work(folder: Path, out: Path, more: dict[int, list[str]], rank: int) -> int:
    """The command on a rank; `more` are further arguments of some ranks."""

    def slow(*arguments: Any) -> Any:
        time.sleep(SECONDS)
        with (folder / f"runs{rank}").open("a") as file:
            file.write("run\n")
        return _run_target(*arguments)

    def small(*arguments: Any, **options: Any) -> Any:
        return _extract(*arguments, samples_per_shard=SHARD, **options)

    def uneven(numbers: Iterable[int], minutes: float | None, first: bool) -> Iterator[int]:
        """Any time is enough on rank 0, and for one shard on the others."""
        return islice(numbers, 1 if minutes and rank else None)

    extraction.extract = small
    extraction.in_time = uneven
    sources.run_target = slow
    line = ["extract", "--target", str(folder / "target"), "--out", str(out)]
    line += ["--conversations", str(folder / "talks.jsonl"), "--max-length", "90"]
    line += ["--dtype", "float32", "--aux-layers", "0,1,3", *more.get(rank, [])]
    return cli.main(line)


def start(folder: Path, out: Path, ranks: int, more: dict[int, list[str]] | None = None) -> Ranks:
    return Ranks(partial(work, folder, out, more or {}), ranks, folder / "log")


def run(folder: Path, out: Path, ranks: int, more: dict[int, list[str]] | None = None) -> Any:
    """Exit codes, what the ranks printed, and how often each ran the target."""
    for path in folder.glob("runs*"):
        path.unlink()
    codes = start(folder, out, ranks, more).wait(PATIENCE_S)
    runs = [len(path.read_text().splitlines()) for path in sorted(folder.glob("runs*"))]
    return {"codes": codes, "text": printed(folder, ranks), "runs": runs}


def printed(folder: Path, ranks: int) -> list[str]:
    return [(folder / f"log{rank}").read_text() for rank in range(ranks)]


def contents(out: Path) -> dict[str, str]:
    """Digests of all files but the lock."""
    files = sorted(path for path in out.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(out)): sha256(path) for path in files}


def killed(folder: Path, out: Path, ranks: int, victims: list[int], shards: int) -> Any:
    """Kill some ranks once so many shards are there; the others' codes, and what is finished."""
    job = start(folder, out, ranks)
    while job.running() and len(list(out.glob("shard-*.json"))) < shards:
        time.sleep(POLL_S)
    begin = time.monotonic()
    for rank in victims:
        job.send(rank, signal.SIGKILL)
    codes = job.wait(PATIENCE_S)
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("shard-*.json")}
    return {
        "codes": codes,
        "text": printed(folder, ranks),
        "seconds": time.monotonic() - begin,
        "kept": kept,
    }


def main(folder: Path) -> None:
    whole = folder / "whole"
    results: dict[str, Any] = {"one": run(folder, whole, 1), "cycles": []}
    results["two"] = run(folder, folder / "two", 2)
    results["whole"], results["of_two"] = contents(whole), contents(folder / "two")

    # Killed in the middle, one rank or all, and gone on with by others.
    cycles = [(2, [1], 2, 3), (2, [0], 3, 1), (3, [0, 1, 2], 2, 2)]
    for number, (ranks, victims, shards, later) in enumerate(cycles):
        out = folder / f"out{number}"
        cycle = killed(folder, out, ranks, victims, shards)
        cycle["again"] = run(folder, out, later)
        cycle["contents"] = contents(out)
        cycle["later"] = {path.name: path.stat().st_mtime_ns for path in out.glob("shard-*.json")}
        results["cycles"].append(cycle)

    # Another extraction while ranks are at work.
    out = folder / "held"
    job = start(folder, out, 2)
    while job.running() and not list(out.glob("shard-*.json")):
        time.sleep(POLL_S)
    other = Ranks(partial(work, folder, out, {}), 1, folder / "other")
    results["other"] = {
        "codes": other.wait(PATIENCE_S),
        "text": [(folder / "other0").read_text()],
    }
    results["held"] = job.wait(PATIENCE_S)
    results["of_held"] = contents(out)

    # Time that ends on one rank before it does on the other; a later call makes the rest.
    out = folder / "short"
    short = ["--minutes", "0.01"]
    results["short"] = run(folder, out, 2, {0: short, 1: short})
    results["of_short"] = contents(out)
    results["short_again"] = run(folder, out, 1)
    results["of_short_again"] = contents(out)

    # What is refused.
    threads = {0: ["--threads", "1"], 1: ["--threads", "2"]}
    results["threads"] = run(folder, folder / "refused", 2, threads)
    (folder / "talks.jsonl").write_text('{"messages": 3}\n')
    results["bad_row"] = run(folder, folder / "refused", 2)
    results["refused_exists"] = (folder / "refused").exists()
    (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

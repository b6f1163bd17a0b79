"""Kills `extract` or `evaluate` with SIGKILL at a random time, calls it again, and compares.

A cycle starts the stage in a fork, kills it after a share of the time that it takes undisturbed,
and calls it again until it ends by itself; some are killed twice. What it wrote must be what the
undisturbed call wrote, and nothing else may be left.
"""

import json
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any, NamedTuple

from tests.stages import commands, leftovers, run, start, write_world

STAGES = ("extract", "evaluate")
_TIMED = ("seconds", "speed", "tokens_per_s", "break_even", "date", "timed", "differing", "cost")


class StageCycle(NamedTuple):
    """What one kill and the call after it gave."""

    died_at: float  # share of the undisturbed call's time
    equal: bool  # what is on the disk is what the undisturbed call wrote
    kept: int  # files that the killed call had finished
    left: list[str]  # temporary files after the second call


def products(out: Path) -> dict[str, Any]:
    """What a stage wrote, by file: bytes, and JSON without what is the machine's."""
    found: dict[str, Any] = {}
    for path in sorted(out.rglob("*")):
        if not path.is_file() or path.name == ".lock":
            continue
        name = str(path.relative_to(out))
        found[name] = path.read_bytes()
        if path.name == "evaluation.json":
            tree = json.loads(found[name])
            found[name] = {
                key: value for key, value in tree.items() if not any(word in key for word in _TIMED)
            }
    return found


def run_cycles(stage: str, kills: int, draw: random.Random, folder: Path) -> list[StageCycle]:
    """`kills` cycles that count; a call that ended before its kill does not."""
    world = folder / "world"
    write_world(world)

    # The call that nothing happens to, timed; once more, as the first one warms files.
    for name in ("warm", "whole"):
        begin = time.monotonic()
        ended = run(_line(world, folder / name, stage), folder / f"{name}.log")
        length = time.monotonic() - begin
        if ended.code:
            raise SystemExit(f"{stage}: ended with {ended.code}: {ended.text}")
    expected = products(folder / "whole")

    cycles: list[StageCycle] = []
    for number in range(10 * kills):
        out = folder / f"out{number}"
        line = _line(world, out, stage)
        share = draw.random()
        if not _killed(line, folder / "killed.log", share * length):
            shutil.rmtree(out)
            continue
        kept = len(list(out.rglob("*.json"))) + len(list(out.rglob("*.safetensors")))
        if draw.random() < 0.25:
            _killed(line, folder / "killed.log", draw.random() * length)

        ended = run(line, folder / "again.log")
        equal = ended.code == 0 and products(out) == expected
        cycles.append(StageCycle(round(share, 3), equal, kept, leftovers(out)))
        if equal:
            shutil.rmtree(out)
        if len(cycles) == kills:
            break
    return cycles


def _line(world: Path, out: Path, stage: str) -> list[str]:
    out.mkdir(exist_ok=True)
    return commands(world, out)[stage]


def _killed(line: list[str], log: Path, seconds: float) -> bool:
    """Start a stage and kill it after some seconds; False if it had ended."""
    job = start(line, log)
    time.sleep(seconds)
    job.send(0, signal.SIGKILL)
    return job.wait(60)[0] == -signal.SIGKILL


def count(cycles: list[StageCycle]) -> dict[str, Any]:
    """Counts over all cycles."""
    return {
        "kills": len(cycles),
        "equal": sum(cycle.equal for cycle in cycles),
        "with_finished_files": sum(cycle.kept > 0 for cycle in cycles),
        "left_temporary_files": sum(bool(cycle.left) for cycle in cycles),
    }

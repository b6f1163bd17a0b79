"""Kills `train --online`, one of its ranks or of its sources, until it has ended; then compares.

A cycle draws several kills, each at an update. A killed source is opened again while the training
goes on; after a killed trainer the command is called again. In the end state and rows must be those
of a run that nothing happened to, and no process and no temporary file may be left. The sources are
processes of the engine "transformers"; trainers are forks of this process, with torchrun's
variables where there are several.
"""

import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from eagle3fn import cli
from eagle3fn.commands import online
from eagle3fn.train import loop
from tests.factories import write_talks
from tests.small_run import write_run
from tests.stages import leftovers
from tests.train.forked import Ranks
from tests.train.run_files import rows, same_end

STEPS = 16
SOURCES = {1: 2, 2: 1}  # a rank's, by the number of ranks
KILLS_A_CYCLE = 5
PATIENCE_S = 400.0
POLL_S = 0.01
PAUSE_S = 0.15  # of each update, in which a kill may come
ENDS_S = 30.0  # a source whose trainer was killed ends within
_PROGRAM = "transformers_states.py"
_SETTINGS = (
    f"train.steps={STEPS}",
    "train.eval_every=8",
    "train.checkpoint_every=3",
    "train.reduce=tree",
    "train.dtype=float32",
    "data.held_out=2",
    "data.global_batch=4",
    "objective.ttt_length=2",
)


class Kill(NamedTuple):
    """What is killed, and when."""

    victim: str  # "trainer" or "source"
    rank: int  # the trainer's, or that of the trainer whose source it is
    step: int  # after this update's row
    wait: float  # seconds after that


class OnlineCycle(NamedTuple):
    """What came of a few kills of one run."""

    ranks: int
    kills: list[Kill]  # those that met a process which lived
    calls: int  # of the command, until it had ended
    equal: bool  # it ended well; the last state and all rows are those of the run left alone
    lost: int  # updates without a row
    repeated: int  # rows of an update that had one
    left: list[str]  # temporary files in the end
    running: int  # sources that outlive their trainer


def run_cycles(
    kills: int, draw: random.Random, folder: Path, ranks: tuple[int, ...] = (1, 1, 1, 2)
) -> list[OnlineCycle]:
    """Cycles with `kills` kills in all, on these numbers of ranks by turns."""
    world = folder / "world"
    write_run(world)
    write_talks(world / "many.jsonl", 30)

    # The runs that nothing happens to. What a rank's source gives depends on the ranks.
    for count in sorted(set(ranks)):
        whole = run_cycle(world, folder / f"whole{count}", count, [], None)
        if whole.left or whole.running or whole.calls != 1:
            raise SystemExit(f"{folder}: the run that nothing happened to: {whole}")

    cycles: list[OnlineCycle] = []
    for number in range(4 * kills):
        missing = kills - sum(len(cycle.kills) for cycle in cycles)
        if missing <= 0:
            break
        count = ranks[number % len(ranks)]
        plan = draw_kills(draw, min(missing, KILLS_A_CYCLE), count)
        whole = folder / f"whole{count}/run"
        cycles.append(run_cycle(world, folder / f"cycle{number}", count, plan, whole))
        print(cycles[-1], flush=True)
    return cycles


def draw_kills(draw: random.Random, count: int, ranks: int) -> list[Kill]:
    """Kills in the order in which they come; the first half are of sources."""
    steps = sorted(draw.sample(range(1, STEPS - 2), count))
    victims = ["source"] * (count - count // 2) + ["trainer"] * (count // 2)
    draw.shuffle(victims)
    return [
        Kill(victim, draw.randrange(ranks), step, draw.random() * PAUSE_S)
        for victim, step in zip(victims, steps, strict=True)
    ]


def run_cycle(
    world: Path, folder: Path, ranks: int, plan: list[Kill], whole: Path | None
) -> OnlineCycle:
    """Train in `folder` under the kills of a plan, and compare with the run in `whole`."""
    (folder / "tmp").mkdir(parents=True)
    out = folder / "run"
    done: list[Kill] = []
    left = list(plan)
    seen: dict[int, str] = {}
    running = 0
    codes: list[int | None] = []
    calls = 0
    while calls <= len(plan):
        calls += 1
        job = Ranks(lambda _: _train(world, out), ranks, folder / f"log{calls}-")
        interrupted = _disturb(job, out, left, done, seen)
        codes = job.wait(PATIENCE_S)
        running += _running_after(seen)
        if not interrupted:
            break

    steps = [row["step"] for row in rows(out / "metrics.jsonl")]
    equal = not any(codes) and (whole is None or same_end(out, whole, STEPS))
    cycle = OnlineCycle(
        ranks=ranks,
        kills=done,
        calls=calls,
        equal=equal,
        lost=len(set(range(1, STEPS + 1)) - set(steps)),
        repeated=len(steps) - len(set(steps)),
        left=leftovers(folder),
        running=running,
    )
    if any(codes):
        print(f"{folder}: the last call ended with {codes}", flush=True)
    elif whole is not None and equal:
        shutil.rmtree(folder)
    return cycle


def _train(world: Path, out: Path) -> int:
    """What a rank does: the command, slowed down so that sources start before it has ended."""
    tempfile.tempdir = str(out.parent / "tmp")
    online.GIB = 2**20  # the buffer holds a few updates
    append_row = loop.append_row

    def slowly(*arguments: Any) -> None:
        append_row(*arguments)
        time.sleep(PAUSE_S)

    loop.append_row = slowly
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    line: list[object] = ["train", "--target", world / "target", "--online", world / "many.jsonl"]
    line += ["--vocab", world / "vocab.safetensors", "--out", out, "--max-length", 128]
    line += ["--engine", "transformers", "--check", "logits", "--sources", SOURCES[ranks]]
    line += ["--dtype", "float32", "--buffer", 0.1, "--threads", 1]
    for setting in _SETTINGS:
        line += ["--set", setting]
    return cli.main([str(part) for part in line]) or 0


def _disturb(
    job: Ranks, out: Path, plan: list[Kill], done: list[Kill], seen: dict[int, str]
) -> bool:
    """Carry out what is left of a plan, up to the first kill of a trainer.

    Kills that were carried out are moved to `done`; the sources go to `seen`, with the time at
    which they began.

    Returns:
        True if a trainer was killed.
    """
    while job.running():
        for pid in job.pids:
            seen.update(sources_of(pid))
        if plan and _steps_of(out) >= plan[0].step:
            kill = plan.pop(0)
            time.sleep(kill.wait)
            trainer = job.pids[kill.rank]
            victims = [trainer] if kill.victim == "trainer" else sorted(sources_of(trainer))
            if not victims or not job.running():
                continue
            if kill.victim == "trainer":
                job.send(kill.rank, signal.SIGKILL)
                done.append(kill)
                return True
            os.kill(victims[kill.step % len(victims)], signal.SIGKILL)
            done.append(kill)
        time.sleep(POLL_S)
    return False


def _steps_of(out: Path) -> int:
    """How many rows a run has."""
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def sources_of(trainer: int) -> dict[int, str]:
    """The processes of a trainer's sources that live, and the time at which each began."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        fields = _stat(int(folder.name))
        if fields and int(fields[1]) == trainer and _PROGRAM in _command(folder):
            found[int(folder.name)] = fields[19]
    return found


def _stat(pid: int) -> list[str]:
    """What Linux says of a process that lives, from its state on; nothing of another."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except OSError:
        return []
    return [] if fields[0] == "Z" else fields


def _command(folder: Path) -> str:
    try:
        return (folder / "cmdline").read_text()
    except OSError:
        return ""


def _running_after(seen: dict[int, str]) -> int:
    """How many sources are still there once those whose trainer has ended had time to end."""
    end = time.monotonic() + ENDS_S
    while time.monotonic() < end:
        alive = [pid for pid, began in seen.items() if began in _stat(pid)[19:20]]
        if not alive:
            return 0
        time.sleep(POLL_S)
    return len(alive)


def count(cycles: list[OnlineCycle]) -> dict[str, Any]:
    """Counts over all cycles; a kill is equal if its run's end is."""
    kills = [kill for cycle in cycles for kill in cycle.kills]
    return {
        "kills": len(kills),
        "equal": sum(len(cycle.kills) for cycle in cycles if cycle.equal),
        "of_trainers": sum(kill.victim == "trainer" for kill in kills),
        "of_sources": sum(kill.victim == "source" for kill in kills),
        "runs": len(cycles),
        "calls": sum(cycle.calls for cycle in cycles),
        "lost": sum(cycle.lost for cycle in cycles),
        "repeated": sum(cycle.repeated for cycle in cycles),
        "left_temporary_files": sum(bool(cycle.left) for cycle in cycles),
        "left_processes": sum(cycle.running for cycle in cycles),
        "ranks": dict(sorted(Counter(str(cycle.ranks) for cycle in cycles).items())),
    }

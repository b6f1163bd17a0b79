"""Kills a tiny stage with SIGKILL, calls it again, and compares it with one that was left alone.

    scripts/kill_resume.py --kills 3 --ranks 2,1 1,4
    scripts/kill_resume.py --kills 3 --stage extract
    scripts/kill_resume.py --kills 20 --stage online --ranks 1 2

Of a training, a cycle starts it on R ranks and kills one rank or all of them at a place drawn by
the seed: between two micro-batches, in the rest of a step, or in a save. It resumes the training on
R2 ranks, and compares the last state and the metrics by equality. The training is the package's own
loop in real processes; only the notes of where each process is come from here. Ranks are forked
from this process, which has imported everything and computed nothing. The other stages are in
`tests/kill_stages.py`, online training in `tests/kill_online.py`.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from multiprocessing.sharedctypes import RawArray
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

import eagle3fn as e3
from eagle3fn.base.launch import ranks as joined
from eagle3fn.data.features import open_features
from eagle3fn.train import bind, loop
from eagle3fn.train import step as step_file
from eagle3fn.train.checkpoint import checkpoints
from tests import kill_online, kill_stages
from tests.factories import make_draft, make_map, make_target, supervised_sample, write_folder
from tests.train.forked import Ranks
from tests.train.run_files import rows, same_end

STEPS = 8
SAMPLES = 40
LONGEST = 40  # tokens of a sample
VOCAB = 96
DRAFT_VOCAB = 61
HIDDEN = 32
PATIENCE_S = 240.0
POLL_S = 0.0005
WRONG = ("lost", "repeated", "left_temporary_files", "left_processes")  # counts that must be 0
PLACES = ("elsewhere", "step", "accumulation", "save")


class Note:
    """Where one rank is, in memory that all processes share."""

    size = 2 + len(PLACES)  # numbers: the place, the step from 1, and the seconds in each place

    def __init__(self, notes: Any, rank: int) -> None:
        whole = memoryview(notes).cast("B").cast("d")
        self._own = whole[rank * self.size : (rank + 1) * self.size]

    @property
    def place(self) -> int:
        """Index into `PLACES`."""
        return int(self._own[0])

    @place.setter
    def place(self, index: int) -> None:
        self._own[0] = index

    @property
    def step(self) -> int:
        """The step that the rank is in, or was in last, from 1."""
        return int(self._own[1])

    @step.setter
    def step(self, number: int) -> None:
        self._own[1] = number

    def seconds(self, index: int) -> float:
        """How long the place took when it was last left."""
        return self._own[2 + index]

    def set_seconds(self, index: int, seconds: float) -> None:
        self._own[2 + index] = seconds


def shared_notes(ranks: int) -> Any:
    """Memory for the notes of so many ranks."""
    return RawArray("d", Note.size * ranks)


def write_features(folder: Path) -> None:
    """Write a feature folder of `SAMPLES` random samples of 24 to 40 tokens."""
    samples = [supervised_sample(24 + i % 17, i, VOCAB, HIDDEN) for i in range(SAMPLES)]
    write_folder(folder, samples, VOCAB, HIDDEN, per_shard=SAMPLES)


def make_config(pack: int = 0) -> e3.Config:
    """A run of `STEPS` steps of 8 micro-batches, or of rows of `pack` tokens, summed by the tree.

    Leaves have odd numbers of rows, so that shards are uneven.
    """
    draft = make_draft(HIDDEN, VOCAB, DRAFT_VOCAB, intermediate_size=51, head_dim=8)
    train = e3.TrainConfig(steps=STEPS, reduce="tree", eval_every=5, checkpoint_every=2)
    return e3.Config(
        draft=draft,
        objective=e3.ObjectiveConfig(ttt_length=3, survival=0.7),
        optimizer=e3.OptimizerConfig(learning_rate=1e-3),
        data=e3.DataConfig(global_batch=8, held_out=2, max_length=LONGEST, pack_tokens=pack),
        train=train,
    )


def train(pack: int, features: Path, out: Path, notes: Any, rank: int) -> None:
    """What a rank does; it notes in `notes` where it is."""
    note = Note(notes, rank)
    bind.step = noted(bind.step, note, "step")
    step_file.accumulate = noted(step_file.accumulate, note, "accumulation")
    loop.save_checkpoint = noted(loop.save_checkpoint, note, "save")

    vocab_map = make_map(VOCAB, DRAFT_VOCAB, torch.Generator().manual_seed(1))
    target = make_target(VOCAB, HIDDEN)
    config = make_config(pack)
    with joined() as world:
        loop.train(config, open_features(features), vocab_map, target, out, world=world)


def noted(function: Callable, note: Note, place: str) -> Callable:
    """The same function, which notes the place while it runs, and afterwards how long it took."""
    index = PLACES.index(place)

    def call(*args: Any, **kwargs: Any) -> Any:
        outer = note.place
        begin = time.perf_counter()
        if place == "step":
            note.step = int(args[0].step) + 1
        note.place = index
        try:
            return function(*args, **kwargs)
        finally:
            note.place = outer
            note.set_seconds(index, time.perf_counter() - begin)

    return call


class Aim(NamedTuple):
    """Where to kill."""

    place: str
    step: int  # the first step that it may be in
    share: float  # of the place's time that has passed
    victims: list[int]  # ranks


def draw_aim(draw: random.Random, ranks: int, places: tuple[str, ...]) -> Aim:
    """One of the places; nine times of ten after the first checkpoint; one rank, or all."""
    if draw.random() < 0.9:
        step = draw.randint(3, STEPS - 2)
    else:
        step = draw.randint(1, 2)
    victims = list(range(ranks))
    if draw.random() < 0.5:
        victims = [draw.randrange(ranks)]
    return Aim(draw.choice(places), step, draw.random(), victims)


def kill(aim: Aim, job: Ranks, notes: Any) -> str | None:
    """Kill the victims at the place aimed at.

    Returns:
        The place in which the first victim died; None if it got to the last step alive.
    """
    rank = aim.victims[0]
    note = Note(notes, rank)
    wanted = PLACES.index(aim.place)

    # The rest of a step is reached through the accumulation, which is most of the step.
    accumulation = PLACES.index("accumulation")
    passed = accumulation if aim.place == "step" else wanted
    for place in (passed, wanted):
        while note.place != place or note.step < aim.step:
            if not job.running() or note.step >= STEPS:
                job.wait(PATIENCE_S)
                return None
            time.sleep(POLL_S)

    # The place takes as long as it took the last time.
    length = note.seconds(wanted)
    if aim.place == "step":
        length -= note.seconds(accumulation)
    time.sleep(aim.share * max(length, 0.0))

    for victim in aim.victims:
        job.send(victim, signal.SIGKILL)
    code = job.wait(PATIENCE_S)[rank]
    if code != -signal.SIGKILL or note.step >= STEPS:
        return None
    return PLACES[note.place]


def run_on(ranks: int, features: Path, out: Path, pack: int) -> None:
    """Train to the end on so many ranks."""
    log = out.with_name(f"{out.name}.log")
    job = Ranks(partial(train, pack, features, out, shared_notes(ranks)), ranks, log)
    codes = job.wait(PATIENCE_S)
    if any(codes):
        raise SystemExit(f"{out}: the ranks ended with {codes}; see {log}*")


class Cycle(NamedTuple):
    """What one kill and the resumed run gave."""

    place: str
    ranks: list[int]  # those killed, and those that resumed
    equal: bool  # the last state and all rows are those of the run left alone
    lost: int  # steps that its rows don't have
    repeated: int  # rows whose step was there before
    resumed_from: int  # the step of the newest checkpoint, 0 if there was none


def run_cycle(number: int, aim: Aim, ranks: list[int], folder: Path, pack: int) -> Cycle | None:
    """Kill, resume, compare; None if the kill came too late."""
    features = folder / "features"
    out = folder / f"run{number}"
    notes = shared_notes(ranks[0])
    log = folder / f"run{number}.killed"
    job = Ranks(partial(train, pack, features, out, notes), ranks[0], log)
    place = kill(aim, job, notes)
    if place is None or (out / f"checkpoints/step-{STEPS:08d}").exists():
        shutil.rmtree(out, ignore_errors=True)
        return None

    found = checkpoints(out / "checkpoints")
    begun = int(found[-1].name.removeprefix("step-")) if found else 0
    run_on(ranks[-1], features, out, pack)

    equal = same_end(out, folder / "whole", STEPS)
    steps = [row["step"] for row in rows(out / "metrics.jsonl")]
    lost = len(set(range(1, STEPS + 1)) - set(steps))
    repeated = len(steps) - len(set(steps))
    if equal:
        shutil.rmtree(out)
    return Cycle(place, ranks, equal, lost, repeated, begun)


def count(cycles: list[Cycle]) -> dict[str, Any]:
    """Counts over all cycles."""
    counts: dict[str, Any] = {
        "kills": len(cycles),
        "equal": sum(cycle.equal for cycle in cycles),
        "lost": sum(cycle.lost for cycle in cycles),
        "repeated": sum(cycle.repeated for cycle in cycles),
    }
    for place in ("save", "accumulation", "step"):
        counts[f"in_{place}"] = sum(cycle.place == place for cycle in cycles)
    pairs = Counter(" to ".join(map(str, cycle.ranks)) for cycle in cycles)
    resumed = Counter(f"step {cycle.resumed_from}" for cycle in cycles)
    return counts | {
        "ranks": dict(sorted(pairs.items())),
        "resumed_from": dict(sorted(resumed.items())),
    }


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=3, help="kills that count (default 3)")
    parser.add_argument(
        "--stage",
        choices=("train", "online", *kill_stages.STAGES),
        default="train",
        help="default train",
    )
    parser.add_argument(
        "--ranks",
        nargs="+",
        default=["2"],
        metavar="R[,R2]",
        help="of a training: killed on R ranks, resumed on R2 (default 2); of several pairs each "
        "kill draws one; of an online one numbers R, by turns",
    )
    parser.add_argument(
        "--pack", type=int, default=0, metavar="TOKENS", help="of a training: data.pack_tokens"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--place", choices=PLACES[1:], help="aim at this place alone (default: at all three)"
    )
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    return parser


def run_cycles(options: argparse.Namespace, draw: random.Random, folder: Path) -> list[Cycle]:
    """Cycles of a training; kills that come too late don't count, ten tries for each that does."""
    pairs = [[int(number) for number in text.split(",")] for text in options.ranks]
    places = (options.place,) if options.place else PLACES[1:]

    # The run that nothing happens to: the same bits on any number of ranks.
    write_features(folder / "features")
    run_on(pairs[0][0], folder / "features", folder / "whole", options.pack)

    cycles: list[Cycle] = []
    for number in range(10 * options.kills):
        ranks = draw.choice(pairs)
        done = run_cycle(number, draw_aim(draw, ranks[0], places), ranks, folder, options.pack)
        if done:
            cycles.append(done)
        message = f"{len(cycles)} of {options.kills}: {done or 'too late, not counted'}"
        print(message, file=sys.stderr, flush=True)
        if len(cycles) == options.kills:
            break
    return cycles


def main() -> int:
    """Run the cycles; 0 if all were equal and nothing was lost."""
    options = make_parser().parse_args()
    draw = random.Random(options.seed)
    folder = Path(tempfile.mkdtemp(prefix="kill-resume-"))
    if options.stage == "train":
        counts = count(run_cycles(options, draw, folder))
    elif options.stage == "online":
        ranks = tuple(map(int, options.ranks))
        counts = kill_online.count(kill_online.run_cycles(options.kills, draw, folder, ranks))
    else:
        found = kill_stages.run_cycles(options.stage, options.kills, draw, folder)
        counts = kill_stages.count(found)

    if options.json:
        print(json.dumps(counts))
    else:
        for name, value in counts.items():
            print(f"{name:<24}{value}")

    all_equal = counts["kills"] == counts["equal"] == options.kills
    wrong = [counts.get(name, 0) for name in WRONG]
    if not all_equal or any(wrong):
        print(f"what differs is in {folder}", file=sys.stderr)
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())

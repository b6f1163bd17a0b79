"""Kills a tiny training with SIGKILL, resumes it, and compares it with one that was left alone.

Each cycle starts the training on R ranks, kills one rank or all of them at a place drawn by the seed (between two
micro-batches, in the rest of a step, in a save), resumes it on R2 ranks, and compares the last state and the metrics
by equality. The training is the package's own loop on real processes; only the note of where it is comes from here.
Ranks are forked from this process, which has imported everything and computed nothing: a start costs no import.
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
from collections.abc import Callable
from functools import partial
from multiprocessing.sharedctypes import RawArray
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

import eagle3fn as e3
from eagle3fn.data.features import open_features, write_index, write_shard
from eagle3fn.data.target import TargetTensors
from eagle3fn.data.vocab import build_map
from eagle3fn.train import bind, loop
from eagle3fn.train import step as step_file
from eagle3fn.train.checkpoint import checkpoints, read_leaves
from eagle3fn.train.launch import ranks as joined
from tests.train.forked import Ranks

STEPS, SAMPLES, VOCAB, HIDDEN = 8, 40, 96, 32
PLACES = ("elsewhere", "step", "accumulation", "save")
NOTE = 2 + len(
    PLACES
)  # numbers a rank notes: its place, its step from 1, and the seconds each place last took
PATIENCE_S = 240.0


def problem(folder: Path) -> None:
    """Write a feature folder of `SAMPLES` random samples."""
    draw = torch.Generator().manual_seed(1)
    samples = {}
    for number in range(SAMPLES):
        length = 24 + number % 17
        ids = torch.randint(VOCAB, (length,), generator=draw)
        aux, last = (torch.randn(length, n * HIDDEN, generator=draw).bfloat16() for n in (3, 1))
        samples[str(number)] = e3.Sample(ids, torch.ones_like(ids), aux, last)
    entries = [
        {"id": f"s{k}", "key": k, "length": len(s.input_ids), "supervised": 1}
        for k, s in samples.items()
    ]
    sidecar = write_shard(folder, 0, samples, {"samples": entries})
    target = {"name": "random", "hidden_size": HIDDEN, "vocab_size": VOCAB}
    write_index(folder, {"target": target, "dtype": "bfloat16", "max_length": 64}, [sidecar])


def config() -> e3.Config:
    """A run of `STEPS` steps of 8 micro-batches, summed by the tree; odd row counts, so that shards are uneven."""
    draft = e3.DraftConfig(
        hidden_size=HIDDEN,
        intermediate_size=51,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=VOCAB,
        draft_vocab_size=61,
        target_hidden_size=HIDDEN,
        max_position_embeddings=64,
    )
    train = e3.TrainConfig(
        steps=STEPS, reduce="tree", eval_every=5, checkpoint_every=2, dtype="bfloat16"
    )
    data = e3.DataConfig(global_batch=8, held_out=2)
    return e3.Config(
        draft, e3.ObjectiveConfig(ttt_length=3), e3.OptimizerConfig(learning_rate=1e-3), data, train
    )


def train(features: Path, out: Path, notes: Any, rank: int) -> None:
    """What a rank does; `notes` are all ranks' notes of where they are."""
    own = memoryview(notes).cast("B").cast("d")[rank * NOTE : (rank + 1) * NOTE]
    bind.step = marked(bind.step, own, "step")
    step_file.accumulate = marked(step_file.accumulate, own, "accumulation")
    loop.save_checkpoint = marked(loop.save_checkpoint, own, "save")
    draw = torch.Generator().manual_seed(2)
    embed, head = (torch.randn(VOCAB, HIDDEN, generator=draw) for _ in range(2))
    target, vocab_map = (
        TargetTensors(embed, head, torch.ones(HIDDEN)),
        build_map(torch.arange(VOCAB), 61),
    )
    with joined() as world:
        loop.train(config(), open_features(features), vocab_map, target, out, world=world)


def marked(function: Callable, own: Any, place: str) -> Callable:
    """The same function; it notes where the rank is while it runs, and how long it took."""
    number = PLACES.index(place)

    def call(*args: Any, **kwargs: Any) -> Any:
        before, begin = own[0], time.perf_counter()
        if place == "step":
            own[1] = int(args[0].step) + 1
        own[0] = number
        try:
            return function(*args, **kwargs)
        finally:
            own[0], own[2 + number] = before, time.perf_counter() - begin

    return call


class Wish(NamedTuple):
    """Where to kill: a place, the first step it may be in, a share of the place's time, and which ranks."""

    place: str
    step: int
    share: float
    victims: list[int]


def draw_wish(draw: random.Random, ranks: int, places: tuple[str, ...]) -> Wish:
    """One of the places; behind the first checkpoint nine times of ten; one rank, or all."""
    step = draw.randint(3, STEPS - 2) if draw.random() < 0.9 else draw.randint(1, 2)
    victims = [draw.randrange(ranks)] if draw.random() < 0.5 else list(range(ranks))
    return Wish(draw.choice(places), step, draw.random(), victims)


def kill(wish: Wish, job: Ranks, notes: Any) -> str | None:
    """Kill the victims in the wished place; the place the first one died in, None if it got to the last step alive."""
    rank = wish.victims[0]
    own, wanted = (
        memoryview(notes).cast("B").cast("d")[rank * NOTE : (rank + 1) * NOTE],
        PLACES.index(wish.place),
    )
    before = (
        PLACES.index("accumulation") if wish.place == "step" else wanted
    )  # most of a step lies behind it
    for place in (before, wanted):
        while not (own[0] == place and own[1] >= wish.step):
            if not job.running() or own[1] >= STEPS:
                job.wait(PATIENCE_S)
                return None
            time.sleep(0.0005)
    inner = own[2 + before] if wish.place == "step" else 0.0
    time.sleep(wish.share * max(own[2 + wanted] - inner, 0.0))  # what it took the last time
    for victim in wish.victims:
        job.send(victim, signal.SIGKILL)
    code = job.wait(PATIENCE_S)[rank]
    return PLACES[int(own[0])] if code == -signal.SIGKILL and own[1] < STEPS else None


def differences(out: Path, whole: Path) -> tuple[bool, int, int]:
    """Whether the last state and all rows are those of the run left alone; and steps lost and repeated in its rows."""
    last = f"checkpoints/step-{STEPS:08d}"
    one, two = read_leaves(out / last), read_leaves(whole / last)
    equal = one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    for name in ("metrics.jsonl", "eval.jsonl"):
        equal = equal and rows(out / name) == rows(whole / name)
    steps = [row["step"] for row in rows(out / "metrics.jsonl")]
    return equal, len(set(range(1, STEPS + 1)) - set(steps)), len(steps) - len(set(steps))


def rows(path: Path) -> list[dict[str, Any]]:
    """A file's rows without the times."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in found]


def run_on(ranks: int, features: Path, out: Path) -> None:
    """Train to the end on so many ranks."""
    job = Ranks(
        partial(train, features, out, RawArray("d", NOTE * ranks)),
        ranks,
        out.with_name(f"{out.name}.log"),
    )
    codes = job.wait(PATIENCE_S)
    if any(codes):
        raise SystemExit(f"{out}: the ranks ended with {codes}; see {out}.log*")


def cycle(number: int, wish: Wish, ranks: list[int], folder: Path) -> dict[str, Any] | None:
    """Kill, resume, compare; None if the kill came too late."""
    out, notes = folder / f"run{number}", RawArray("d", NOTE * ranks[0])
    job = Ranks(
        partial(train, folder / "features", out, notes), ranks[0], folder / f"run{number}.killed"
    )
    place = kill(wish, job, notes)
    if place is None or (out / f"checkpoints/step-{STEPS:08d}").exists():
        shutil.rmtree(out, ignore_errors=True)
        return None
    found = checkpoints(out / "checkpoints")
    run_on(ranks[-1], folder / "features", out)
    equal, lost, repeated = differences(out, folder / "whole")
    if equal:
        shutil.rmtree(out)
    begun = int(found[-1].name.removeprefix("step-")) if found else 0
    return {
        "place": place,
        "equal": equal,
        "lost": lost,
        "repeated": repeated,
        "resumed_from": begun,
    }


def gather(cycles: list[dict[str, Any]]) -> dict[str, Any]:
    """The last line: counts over all cycles."""
    total = {"kills": len(cycles)} | {
        k: sum(int(c[k]) for c in cycles) for k in ("equal", "lost", "repeated")
    }
    total |= {
        f"in_{place}": sum(c["place"] == place for c in cycles)
        for place in ("save", "accumulation", "step")
    }
    return total | {"resumed_from": [c["resumed_from"] for c in cycles]}


def main() -> int:
    """Parse the options and run the cycles; 0 if all were equal."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=3, help="kills that count (default 3)")
    parser.add_argument(
        "--ranks", default="2", help="ranks killed, or R,R2: killed on R, resumed on R2 (default 2)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--place", choices=PLACES[1:], help="aim at this place alone (default: at all three)"
    )
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args()
    ranks, draw, cycles = (
        [int(text) for text in options.ranks.split(",")],
        random.Random(options.seed),
        [],
    )
    places = (options.place,) if options.place else PLACES[1:]
    folder = Path(tempfile.mkdtemp(prefix="kill-resume-"))
    problem(folder / "features")
    run_on(ranks[0], folder / "features", folder / "whole")
    for number in range(10 * options.kills):
        done = cycle(number, draw_wish(draw, ranks[0], places), ranks, folder)
        cycles += [done] if done else []
        print(
            f"{len(cycles)} of {options.kills}: {done or 'too late, not counted'}",
            file=sys.stderr,
            flush=True,
        )
        if len(cycles) == options.kills:
            break
    total = gather(cycles)
    print(json.dumps(total) if options.json else "\n".join(f"{k:<14}{v}" for k, v in total.items()))
    good = (
        total["kills"] == total["equal"] == options.kills
        and total["lost"] == total["repeated"] == 0
    )
    if good:
        shutil.rmtree(folder)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())

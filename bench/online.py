"""Training whose features come as it goes, against extraction and training one after the other.

    python -m bench.online --target FOLDER --conversations FILE --vocab MAP --engine-python PYTHON

All sides train the same updates of the same samples, in turns, each from a fresh state:

- `offline`: `extract` writes a feature folder, `train` reads it; timed apart and together;
- `here`, `transformers`, `vllm`: `train --online`; the target in this process, by transformers in a
  process of its own, or in vLLM's, with room for 1 GiB of features;
- `... narrow`: the same source with room for one update and `data.prefetch = 0`, so that nothing is
  computed ahead;
- `... writes`: with `--generate`: the target answers the prompts of the conversations,
  greedily, as vLLM loses the temperature on CPUs.

Sides of vLLM need `--engine-python`. Sources are opened, and asked for one sample, before anything
is timed. A run is timed from when its first batch is asked for to the end of its last update, so
that all its features are computed within; what is not spent in updates is waiting.

After each round the result is written; the last line is JSON. `ratio` has a side's tokens a second
over those of `extract` and `train` together, and over `train` alone: of each round, and their
median.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from bench.launch import settle

    settle()

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from statistics import median
from typing import Any, NamedTuple

import torch

from bench import common
from bench.extraction import OURS_ALONE, timed
from bench.launch import add_arguments
from bench.online_sides import SIDES, Opened, on_demand_of, open_source
from eagle3fn.base.config import Config
from eagle3fn.base.provenance import provenance
from eagle3fn.data.extract import extract
from eagle3fn.data.features import FeatureSet, open_features, tensors_of
from eagle3fn.data.online import STORED
from eagle3fn.data.target import stop_ids
from eagle3fn.data.target_loading import load_tokenizer
from eagle3fn.data.target_tensors import read_target_tensors
from eagle3fn.data.template import ChatTemplate
from eagle3fn.data.vocab import load_map
from eagle3fn.train.events import Events
from eagle3fn.train.loop import train

ROUNDS = 3
WIDE = 2**30  # bytes of room
NARROW = 1  # then one update is admitted at a time


class Trained(NamedTuple):
    """A training's time, from when its first batch is asked for to the end of its last update."""

    tokens: int
    seconds: float
    updating: float  # seconds in updates
    first_wait: float  # seconds until the first update could begin

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds

    @property
    def waited(self) -> float:
        """The share of the time outside of updates."""
        return 1 - self.updating / self.seconds


def parse() -> argparse.Namespace:
    parser = common.parser_of(__doc__)
    add = parser.add_argument
    add("--target", required=True)
    add("--conversations", required=True)
    add("--vocab", required=True, help="a vocabulary map of the target")
    add("--engine-python", help="the Python of vLLM's environment (without it: no side of vLLM)")
    about = "argument of vLLM's own, as in gpu_memory_utilization=0.3"
    add("--engine-arg", action="append", default=[], metavar="NAME=VALUE", help=about)
    add("--sides", nargs="+", choices=SIDES, help="besides offline (default all)")
    add("--limit", type=int, default=32, help="conversations that are read (default 32)")
    add("--batch", type=int, default=4, help="samples of an update (default 4)")
    add("--max-length", type=int, default=128, help="tokens of a sample (default 128)")
    add("--max-new", type=int, default=48, help="tokens of an answer that is written (default 48)")
    common.add_dtype(parser)
    add_arguments(parser)
    options = parser.parse_args()
    options.rounds = options.rounds or ROUNDS
    if options.sides is None:
        with_vllm = bool(options.engine_python)
        options.sides = [name for name in SIDES if with_vllm or SIDES[name].source != "vllm"]
    return options


# What is timed


def timed_training(
    options: argparse.Namespace, features: FeatureSet, config: Config, out: Path
) -> Trained:
    """One training, from a fresh state."""
    vocab_map = load_map(options.vocab)
    dtype = getattr(torch, config.train.dtype)
    target = read_target_tensors(options.target, dtype, tensors_of(features))
    began: list[float] = []
    ended: list[float] = []
    rows: list[dict[str, Any]] = []

    def begin(row: dict[str, Any]) -> None:
        began.append(time.perf_counter())

    def step(row: dict[str, Any], total: int) -> None:
        ended.append(time.perf_counter())
        rows.append(row)

    # The untrained draft is evaluated right before the first batch is asked for.
    events = Events(on_step=step, on_eval=begin, on_notice=lambda line: None)
    train(config, features, vocab_map, target, out, events=events)
    assert len(rows) == config.train.steps
    return Trained(
        tokens=sum(row["tokens"] for row in rows),
        seconds=ended[-1] - began[0],
        updating=sum(row["seconds"] for row in rows),
        first_wait=ended[0] - rows[0]["seconds"] - began[0],
    )


def timed_extraction(options: argparse.Namespace, opened: Opened, out: Path) -> float:
    """Tokens a second of `extract` by a source that is open; the folder is then in `out`."""
    tokenizer = load_tokenizer(options.target)
    template = ChatTemplate(tokenizer, stop_ids(options.target, tokenizer))
    pool = on_demand_of(opened.features).pool
    assert pool is not None
    index, seconds = timed(
        lambda: extract(
            pool.first(),
            template,
            options.conversations,
            out,
            max_length=options.max_length,
            limit=options.limit,
            stored=STORED,
        )
    )
    return index["totals"]["tokens"] / seconds


class Rounds(NamedTuple):
    """What the rounds gave."""

    extracting: list[float]  # tokens a second
    trained: dict[str, list[Trained]]  # by side; "offline" is `train` alone


def run_rounds(
    options: argparse.Namespace, opened: dict[str, Opened], folder: Path
) -> Iterator[Rounds]:
    """Every side once a round, and what all rounds so far gave; which side begins changes."""
    found = Rounds([], {name: [] for name in ("offline", *options.sides)})
    names = list(found.trained)
    for number in range(options.rounds):
        begin = number % len(names)
        for name in names[begin:] + names[:begin]:
            out = folder / f"{number}-{name.replace(' ', '-')}"
            if name == "offline":
                rate = timed_extraction(options, opened["here"], out / "features")
                found.extracting.append(rate)
                features = open_features(out / "features")
                config = opened["here"].config
            else:
                side = SIDES[name]
                features, config, _ = opened[side.opened]
                on_demand_of(features).buffer = NARROW if side.narrow else WIDE
                if side.narrow:
                    config = replace(config, data=replace(config.data, prefetch=0))
            one = timed_training(options, features, config, out / "run")
            found.trained[name].append(one)
            line = f"round {number}: {name} {one.rate:.0f} tokens/s, {one.waited:.0%} waiting"
            print(line, file=sys.stderr, flush=True)
        yield found


def summary(found: Rounds) -> dict[str, Any]:
    """Rates, shares of waiting and ratios, by side."""
    alone = [one.rate for one in found.trained["offline"]]
    pairs = zip(found.extracting, alone, strict=True)
    together = [1 / (1 / extracting + 1 / training) for extracting, training in pairs]

    sides: dict[str, Any] = {}
    for name, trained in found.trained.items():
        rates = [one.rate for one in trained]
        sides[name] = {
            "tokens": [one.tokens for one in trained],
            "seconds": [one.seconds for one in trained],
            "tokens_per_second": _with_median(rates),
            "waited": _with_median([one.waited for one in trained]),
            "first_wait": _with_median([one.first_wait for one in trained]),
            "ratio": {
                "extract_and_train": _with_median(_ratios(rates, together)),
                "train": _with_median(_ratios(rates, alone)),
            },
        }
    return {
        "tokens_per_second": {
            "extract": _with_median(found.extracting),
            "train": _with_median(alone),
            "extract_and_train": _with_median(together),
        },
        "sides": sides,
    }


def _with_median(values: list[float]) -> dict[str, Any]:
    return {"by_round": values, "median": median(values)}


def _ratios(over: list[float], under: list[float]) -> list[float]:
    return [a / b for a, b in zip(over, under, strict=True)]


def result_of(
    options: argparse.Namespace, opened: dict[str, Opened], found: Rounds
) -> dict[str, Any]:
    """The result after some rounds."""
    names = ("dtype", "threads", "engine_arg", "max_length", "limit", "batch", "max_new")
    named = {name: getattr(options, name) for name in names}
    return {
        "settings": named | {"rounds": len(found.extracting)},
        "target": Path(options.target).name,
        "unroll": opened["here"].config.objective.ttt_length,
        "updates": {name: one.config.train.steps for name, one in opened.items()},
        "seconds_until_ready": {name: one.seconds for name, one in opened.items()},
        **summary(found),
        **provenance(),
    }


def main() -> int:
    options = parse()
    torch.set_num_threads(options.threads)
    for name in OURS_ALONE:
        os.environ.pop(name, None)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        opened = {}
        for name in ("here", *options.sides):
            side = SIDES[name]
            if side.opened not in opened:
                opened[side.opened] = open_source(options, side, folder, stack)
        for found in run_rounds(options, opened, folder):
            result = result_of(options, opened, found)
            common.finish(result, options.out, "online")
    common.finish(result, options.out, "online")  # the last line: sources have said theirs
    return 0


if __name__ == "__main__":
    sys.exit(common.program("bench.online", main))

"""Training whose features come as it goes, against extraction and training one after the other.

    python -m bench.online --target FOLDER --conversations FILE --vocab MAP --engine-python PYTHON

All sides train the same updates of the same samples, in turns, each from a fresh state:

- `offline`: `extract` writes a feature folder, `train` reads it; timed apart and together;
- `here`, `transformers`, `vllm`: `train --online`; the target in this process, by transformers in a
  process of its own, or in vLLM's, with room for 1 GiB of features;
- `... narrow`: the same source with room for one update, so that nothing is computed ahead;
- `... writes`: with `--generate`: the target answers the prompts of the conversations.

Sides of vLLM need `--engine-python`. Sources are opened once; that is timed apart. A run is timed
from when its first batch is asked for until its last update is made. What is not spent in updates
is waiting. Memory is that of a training's own process, in a run of `bench.online_memory`.

The last line is JSON. `ratio` has a side's tokens a second over those of `extract` and `train`
together, and over `train` alone: of each round, and their median.
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
from contextlib import ExitStack
from statistics import median
from typing import Any, NamedTuple, cast

import torch

from bench import common
from bench.extraction import OURS_ALONE, timed
from bench.launch import add_arguments
from bench.online_memory import memory_of_a_run
from eagle3fn import cli
from eagle3fn.base.config import Config, load_config
from eagle3fn.base.draft_config import aux_layers
from eagle3fn.base.draft_keys import draft_config_from_target
from eagle3fn.base.errors import UserError
from eagle3fn.base.launch import World
from eagle3fn.base.provenance import provenance
from eagle3fn.commands.online import begin_online, check_online_options, online_features
from eagle3fn.data.extract import extract
from eagle3fn.data.features import FeatureSet, open_features, tensors_of
from eagle3fn.data.on_demand import OnlineSamples
from eagle3fn.data.online import STORED
from eagle3fn.data.target import stop_ids
from eagle3fn.data.target_loading import load_tokenizer
from eagle3fn.data.target_source import target_config
from eagle3fn.data.target_tensors import read_target_tensors
from eagle3fn.data.template import ChatTemplate
from eagle3fn.data.vocab import load_map, map_size
from eagle3fn.train.defaults import by_section, chosen_defaults
from eagle3fn.train.events import Events
from eagle3fn.train.loop import train

ROUNDS = 3
NARROW = 1  # byte of room: then one update is admitted at a time


class Side(NamedTuple):
    """A training with `--online`, by its further options."""

    source: str
    writes: bool = False
    narrow: bool = False


SIDES = {
    "here": Side("here"),
    "here narrow": Side("here", narrow=True),
    "transformers": Side("transformers"),
    "transformers narrow": Side("transformers", narrow=True),
    "transformers writes": Side("transformers", writes=True),
    "vllm": Side("vllm"),
    "vllm narrow": Side("vllm", narrow=True),
    "vllm writes": Side("vllm", writes=True),
}


class Opened(NamedTuple):
    """Samples whose source is open."""

    features: FeatureSet
    config: Config
    seconds: float  # until the source was ready


class Trained(NamedTuple):
    """A training's time."""

    tokens: int
    seconds: float  # from when the first batch was asked for until the last update was made
    updating: float  # seconds in updates

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
    add("--sides", nargs="+", choices=SIDES, help="besides offline (default all)")
    add("--limit", type=int, default=32, help="conversations that are read (default 32)")
    add("--batch", type=int, default=4, help="samples of an update (default 4)")
    add("--max-length", type=int, default=128, help="tokens of a sample (default 128)")
    add("--max-new", type=int, default=48, help="tokens of an answer that is written (default 48)")
    about = "samples of the run whose memory is looked at; 0: none (default 2000)"
    add("--memory-samples", type=int, default=2000, help=about)
    common.add_dtype(parser)
    add_arguments(parser)
    options = parser.parse_args()
    options.rounds = options.rounds or ROUNDS
    sides = options.sides or list(SIDES)
    options.sides = [name for name in sides if options.engine_python or "vllm" not in name]
    return options


# What is opened


def command_of(options: argparse.Namespace, side: Side, out: Path) -> list[str]:
    """The command line whose samples and sources a side has."""
    words = ["train", "--target", options.target, "--online", options.conversations]
    words += ["--vocab", options.vocab, "--out", str(out), "--limit", str(options.limit)]
    words += ["--max-length", str(options.max_length), "--dtype", options.dtype]
    words += ["--threads", str(options.threads)]
    if side.source != "here":
        words += ["--engine", side.source]
    if side.source == "vllm":
        words += ["--engine-python", options.engine_python, "--check", "logits"]
    if side.writes:
        words += ["--generate", "--max-new", str(options.max_new), "--temperature", "1"]
    return words


def config_of(options: argparse.Namespace, features: FeatureSet) -> Config:
    """The settings that `train` chooses, over one pass of the samples."""
    tree = target_config(options.target)
    draft = draft_config_from_target(tree, options.target, map_size(options.vocab))
    samples = len(features.samples)
    updates = samples // options.batch
    if updates < 2:
        raise UserError(f"--limit {options.limit}: {samples} samples; two updates need more")
    overrides = [
        f"train.steps={updates}",
        f"train.dtype={options.dtype}",
        f"data.global_batch={options.batch}",
        "data.held_out=0",
    ]
    return load_config(None, overrides, draft, by_section(chosen_defaults(draft, samples)))


def open_side(options: argparse.Namespace, name: str, folder: Path, stack: ExitStack) -> Opened:
    """A side's samples and its sources, which are ready."""
    side = SIDES[name]
    command = command_of(options, side, folder / name.replace(" ", "-"))
    given = cli.parser().parse_args(command)
    given.arguments = command
    check_online_options(given)
    tree = target_config(options.target)
    draft = draft_config_from_target(tree, options.target, None)
    layers = aux_layers(draft, tree["num_hidden_layers"])
    found = online_features(given, tree, layers, World())
    features, seconds = timed(lambda: stack.enter_context(found))
    config = config_of(options, features)
    begin_online(features, given, config, World())
    if side.narrow:
        on_demand_of(features).buffer = NARROW
    return Opened(features, config, seconds)


def on_demand_of(features: FeatureSet) -> OnlineSamples:
    """A side's samples as they come from its sources."""
    return cast("OnlineSamples", features.on_demand)


# What is timed


def timed_training(
    options: argparse.Namespace, features: FeatureSet, config: Config, out: Path
) -> Trained:
    """One training, from a fresh state."""
    vocab_map = load_map(options.vocab)
    dtype = getattr(torch, config.train.dtype)
    target = read_target_tensors(options.target, dtype, tensors_of(features))
    began = 0.0
    ended = 0.0
    rows: list[dict[str, Any]] = []

    def begin(row: dict[str, Any]) -> None:
        nonlocal began
        if row["step"] == 0:
            began = time.perf_counter()

    def step(row: dict[str, Any], total: int) -> None:
        nonlocal ended
        ended = time.perf_counter()
        rows.append(row)

    events = Events(on_step=step, on_eval=begin, on_notice=lambda line: None)
    train(config, features, vocab_map, target, out, events=events)
    assert len(rows) == config.train.steps
    tokens = sum(row["tokens"] for row in rows)
    return Trained(tokens, ended - began, sum(row["seconds"] for row in rows))


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


def run_rounds(options: argparse.Namespace, opened: dict[str, Opened], folder: Path) -> Rounds:
    """Every side once a round; which one begins changes."""
    found = Rounds([], {name: [] for name in ("offline", *opened)})
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
                features, config, _ = opened[name]
            one = timed_training(options, features, config, out / "run")
            found.trained[name].append(one)
            line = f"round {number}: {name} {one.rate:.0f} tokens/s, {one.waited:.0%} waiting"
            print(line, file=sys.stderr, flush=True)
    return found


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


def main() -> int:
    options = parse()
    torch.set_num_threads(options.threads)
    for name in OURS_ALONE:
        os.environ.pop(name, None)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        opened = {name: open_side(options, name, folder, stack) for name in options.sides}
        if "here" not in opened:
            opened = {"here": open_side(options, "here", folder, stack), **opened}
        found = run_rounds(options, opened, folder)

    memory = memory_of_a_run(options) if options.memory_samples else None
    names = ("dtype", "threads", "max_length", "limit", "batch", "max_new", "rounds")
    some = opened["here"].config
    result = {
        "settings": {name: getattr(options, name) for name in names},
        "target": Path(options.target).name,
        "unroll": some.objective.ttt_length,
        "updates": {name: one.config.train.steps for name, one in opened.items()},
        "seconds_until_ready": {name: one.seconds for name, one in opened.items()},
        **summary(found),
        "memory": memory,
        **provenance(),
    }
    common.finish(result, options.out, "online")
    return 0


if __name__ == "__main__":
    sys.exit(common.program("bench.online", main))

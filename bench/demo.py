"""Training tokens a second of the demo's own settings and features: plain against fast.

    python -m bench.demo --target runs/cache/TARGET --features runs/demo/features --vocab
    runs/demo/vocab.safetensors

Both start from the run's first parameters and train on the same samples in the same order, each
sample once; `scripts/demo.toml` has the settings of an update. The last line is JSON: `ratio` is
plain over fast time, `tokens_per_s` the tokens a second of each, `accepted_length` the simulated
one on the samples held out, after the last update.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from bench.launch import settle

    settle()

import argparse
from dataclasses import replace
from typing import Any

import torch

from bench import common
from bench.launch import add_arguments
from eagle3fn.base.config import load_config, to_dict, with_steps
from eagle3fn.base.device import to_device
from eagle3fn.base.draft_keys import draft_config_from_target
from eagle3fn.base.launch import World
from eagle3fn.base.provenance import provenance
from eagle3fn.base.sections import require
from eagle3fn.base.types import Batch, Params
from eagle3fn.data.features import open_features, tensors_of
from eagle3fn.data.pipeline import batches
from eagle3fn.data.target_source import config_hashes, target_config
from eagle3fn.data.target_tensors import read_target_tensors
from eagle3fn.data.vocab import load_map, map_size
from eagle3fn.model.table import HEAD, init_params, start_from_target
from eagle3fn.train.held_out import evaluate_held_out
from eagle3fn.train.run import Run, prepare

SETTINGS = common.ROOT / "scripts" / "demo.toml"
STEPS = 40
WARM = 2  # updates before the timed ones
NUMERICS = ("plain", "fast")


def parse() -> argparse.Namespace:
    parser = common.parser_of(__doc__)
    add = parser.add_argument
    add("--target", required=True, help="the demo's target, as in its cache")
    add("--features", required=True, help="the demo's feature folder")
    add("--vocab", required=True, help="the demo's vocabulary map")
    about = "samples at the end that are left out (default 24, the demo's)"
    add("--held-out", type=int, default=24, help=about)
    common.add_dtype(parser)
    add("--steps", type=int, default=STEPS, help=f"timed updates of each side (default {STEPS})")
    add_arguments(parser)
    return parser.parse_args()


def prepared(options: argparse.Namespace) -> tuple[dict[str, Run], Params]:
    """The demo's run under both numerics, and its first parameters."""
    tree = target_config(options.target)
    features = open_features(options.features, tree["vocab_size"], tree["hidden_size"])
    draft = draft_config_from_target(tree, options.target, map_size(options.vocab))
    overrides = [
        f"data.held_out={options.held_out}",
        f"train.device={options.device}",
        f"train.seed={options.seed}",
        f"train.dtype={options.dtype}",
    ]
    config = with_steps(load_config(SETTINGS, overrides, draft), options.steps + WARM)
    hashes = config_hashes(options.target)
    vocab = load_map(options.vocab, draft.vocab_size, draft.draft_vocab_size, hashes)
    dtype = getattr(torch, config.train.dtype)
    target = read_target_tensors(options.target, dtype, tensors_of(features))

    runs = {}
    for name in NUMERICS:
        own = replace(config, objective=replace(config.objective, numerics=name))
        runs[name] = prepare(own, features, vocab, target, "unused")
    params = init_params(draft, config.train.seed, dtype, options.device)
    return runs, start_from_target(params, runs["fast"].frozen)


class Trainer:
    """One side: its state, and the updates that are left."""

    def __init__(self, run: Run, params: Params, updates: list[tuple[Batch, ...]]) -> None:
        self.fns = run.fns
        self.left = iter(updates)
        self.losses: list[float] = []
        self.state = run.fns.init_state(params)

    def __call__(self) -> None:
        """One update."""
        self.state, metrics = self.fns.step(self.state, next(self.left), donate=True)
        self.losses.append(float(metrics["loss"]))


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Train both sides in turns on the same batches, read beforehand."""
    require(options.steps >= 1, "--steps", options.steps, "at least 1")
    runs, params = prepared(options)
    one = runs["fast"]
    updates = []
    for micro in batches(one.features, one.train, one.config, 0, options.steps + WARM):
        updates.append(tuple(to_device(batch, options.device) for batch in micro))

    trainers = {name: Trainer(runs[name], params, updates) for name in NUMERICS}
    timing = common.in_turns(
        trainers, options.steps, params[HEAD].dtype, options.device, World(), WARM
    )

    # What the timed updates trained on.
    timed = [batch for micro in updates[WARM:] for batch in micro]
    tokens = sum(int(batch.attention_mask.sum()) for batch in timed)
    rows = sum(batch.attention_mask.numel() for batch in timed)
    needed = sum(float(common.needed_rows(batch.row_mask)[0].sum()) for batch in timed)

    lengths = {}
    if one.held_out:
        for name, trainer in trainers.items():
            found = evaluate_held_out(runs[name], trainer.state.params)
            lengths[name] = found["accepted_length"]

    seconds = {name: sum(timing.seconds[name]) for name in NUMERICS}
    counts = {"timed_updates": options.steps, "samples": len(one.train)}
    return {
        "ratio": seconds["plain"] / seconds["fast"],
        "ratio_median": timing.ratio("plain", "fast"),
        "tokens_per_s": {name: tokens / took for name, took in seconds.items()},
        "tokens": tokens,
        "share_needed": needed / rows,
        "accepted_length": lengths,
        "last_losses": {name: trainer.losses[-5:] for name, trainer in trainers.items()},
        "settings": to_dict(one.config) | counts,
        **timing.summary(),
        **provenance(),
    }


def main() -> None:
    options = parse()
    result = run(options)
    for name, rate in result["tokens_per_s"].items():
        losses = result["last_losses"][name]
        common.show(options, f"{name:7} {rate:8.1f} tokens/s, last losses {losses}")
    name = f"demo-step-{options.dtype}-{options.device}-{options.allocator}"
    common.finish(result, options.out, name)


if __name__ == "__main__":
    sys.exit(common.program("bench.demo", main))

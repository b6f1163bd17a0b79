"""Training tokens a second of the demo's own settings and features: fast against legacy numerics, in turns.

Both start from the run's start and train on the same samples in the same order, every sample once as the other side
does; what an update is, is `scripts/demo.toml`'s. Ends with one line of JSON: `ratio` is legacy over fast time,
`accepted_length` the simulated one on the samples held out, after the last update.
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
from eagle3fn.base.config import load_config, require, to_dict, with_steps
from eagle3fn.base.draft_config import draft_config_from_target
from eagle3fn.base.types import Batch, Params
from eagle3fn.data.features import open_features
from eagle3fn.data.pipeline import batches
from eagle3fn.data.target import config_hash, read_target_tensors, target_config
from eagle3fn.data.vocab import load_map, map_size
from eagle3fn.model.table import HEAD, init_params, start_from_target
from eagle3fn.testing.provenance import provenance
from eagle3fn.train.held_out import evaluate_held_out
from eagle3fn.train.launch import World
from eagle3fn.train.run import Run, prepare, to_device

SETTINGS = common.ROOT / "scripts" / "demo.toml"
STEPS, WARM = 40, 2
NUMERICS = ("plain", "fast")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--target", required=True, help="the demo's target, as in its cache")
    add("--features", required=True, help="the demo's feature folder")
    add("--vocab", required=True, help="the demo's vocabulary map")
    add(
        "--held-out",
        type=int,
        default=24,
        help="samples at the end that are left out (default 24, the demo's)",
    )
    add(
        "--dtype",
        choices=("bfloat16", "float32"),
        default="bfloat16",
        help="compute dtype (default bfloat16)",
    )
    add("--steps", type=int, default=STEPS, help=f"timed updates of each side (default {STEPS})")
    add_arguments(parser)
    return parser.parse_args()


def prepared(options: argparse.Namespace) -> tuple[dict[str, Run], Params]:
    """The demo's run under both numerics, and the start of its parameters."""
    tree = target_config(options.target)
    features = open_features(options.features, tree["vocab_size"], tree["hidden_size"])
    draft = draft_config_from_target(tree, options.target, map_size(options.vocab))
    overrides = [
        f"data.held_out={options.held_out}",
        f"train.device={options.device}",
        f"train.seed={options.seed}",
    ]
    overrides.append(f"train.dtype={options.dtype}")
    config = with_steps(load_config(SETTINGS, overrides, draft), options.steps + WARM)
    vocab = load_map(options.vocab, draft.vocab_size, draft.draft_vocab_size, config_hash(tree))
    dtype = getattr(torch, config.train.dtype)
    target = read_target_tensors(options.target, dtype)
    kinds = {
        name: replace(config, objective=replace(config.objective, numerics=name))
        for name in NUMERICS
    }
    runs = {name: prepare(own, features, vocab, target, "unused") for name, own in kinds.items()}
    params = init_params(draft, config.train.seed, dtype, options.device)
    return runs, start_from_target(params, runs["fast"].frozen, target.norm.to(options.device))


class Trainer:
    """One side: its state, and the updates that are left."""

    def __init__(self, run: Run, params: Params, updates: list[tuple[Batch, ...]]) -> None:
        self.fns, self.left, self.losses = run.fns, iter(updates), []
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
    updates = [
        tuple(to_device(batch, options.device) for batch in micro)
        for micro in batches(one.features, one.train, one.config, 0, options.steps + WARM)
    ]
    trainers = {name: Trainer(runs[name], params, updates) for name in NUMERICS}
    timing = common.in_turns(
        trainers, options.steps, params[HEAD].dtype, options.device, World(), WARM
    )
    tokens = sum(int(batch.attention_mask.sum()) for micro in updates[WARM:] for batch in micro)
    masks = [batch.row_mask for micro in updates[WARM:] for batch in micro]
    needed = [
        float(common.needed_rows(mask, one.config.objective.ttt_length)[0].sum()) for mask in masks
    ]
    seconds = {name: sum(timing.seconds[name]) for name in NUMERICS}
    return {
        "ratio": seconds["plain"] / seconds["fast"],
        "ratio_median": timing.ratio("plain", "fast"),
        "tokens_per_s": {name: tokens / took for name, took in seconds.items()},
        "tokens": tokens,
        "share_needed": sum(needed) / sum(mask.numel() for mask in masks),
        "accepted_length": {
            name: evaluate_held_out(runs[name], trainer.state.params)["accepted_length"]
            for name, trainer in (trainers.items() if one.held_out else ())
        },
        "last_losses": {name: trainer.losses[-5:] for name, trainer in trainers.items()},
        "settings": to_dict(one.config)
        | {"timed_updates": options.steps, "samples": len(one.train)},
        **timing.told(),
        **provenance(),
    }


def main() -> None:
    options = parse()
    result = run(options)
    for name, rate in result["tokens_per_s"].items():
        common.say(
            options, f"{name:7} {rate:8.1f} tokens/s, last losses {result['last_losses'][name]}"
        )
    common.finish(
        result, options.out, f"demo-step-{options.dtype}-{options.device}-{options.allocator}"
    )


if __name__ == "__main__":
    common.guarded(main)

"""Accepted length by the number of supervised tokens: ours next to SpecForge's model.

    SPECFORGE_SRC=CHECKOUT python -m bench.learning_curve --target FOLDER --features FOLDER \
        --vocab FILE --prompts JSONL --out FOLDER [--sizes 10000 40000 160000] [--seeds 0 1 2]

A size is the first samples of the features that have so many supervised tokens; the last
`--held-out` samples of the folder are held out of all sizes. For each size and seed both sides are
trained anew, with a schedule of their own length: the same samples in the same order, `--epochs`
times, each side one update a sample.

- ours: the settings that `eagle3fn train` chooses for so many samples
- SpecForge: its pull request 600, as `bench.specforge_training` runs it: model, unroll length, loss
  weights, mask rule, optimizer and schedule, from a random start, at our learning rate or
  `--specforge-rate`

Measured is the draft after the last update of each: the simulated accepted length on the held-out
samples (under the mask of serving and seven unroll steps, on both sides), and the accepted length
in decoding the prompts greedily.

Every finished run is kept in `OUT/SIZE-SEED/SIDE` and not repeated, so a call that was cut off goes
on, and more sizes or seeds can be added. `OUT/result.json` and `OUT/curve.png` are written anew
after every run, of the runs that the call asks for. Two calls with one of `--sides` each may work
at once; a last one without it puts their runs together.
"""

import os

if __name__ == "__main__":
    # Before torch is loaded; who imports this file has set them.
    os.environ.update(TRITON_INTERPRET="1", TORCHDYNAMO_DISABLE="1")

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

from bench import common
from bench.curve_runs import Inputs, one_run, part_of
from bench.specforge_training import about
from eagle3fn.base.draft_keys import draft_config_from_target
from eagle3fn.base.errors import UserError
from eagle3fn.base.files import whole_file, write_json
from eagle3fn.base.provenance import provenance
from eagle3fn.base.read import read_object
from eagle3fn.base.sections import require
from eagle3fn.data.features import open_features
from eagle3fn.data.target_source import config_hashes, target_config
from eagle3fn.data.vocab import load_map, map_size
from eagle3fn.specforge.oracle import Oracle, load_oracle
from eagle3fn.train.run import fingerprints
from eagle3fn.use.prompts import read_prompts

SIZES = (10_000, 40_000, 160_000)
SIDES = ("ours", "specforge")
MEASURES = {"held_out": "held-out conversations, simulated", "decoded": "prompts, decoded"}
NOTES = (
    "SpecForge's loss kernel replaced by the equal eager expression; dynamo off (CPU)",
    "both drafts are those after the last update; seconds are no comparison of speed",
)
KEPT = ("epochs", "held_out", "tasks", "max_new", "draft_length", "init", "specforge_rate")


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = common.parser_of(__doc__)
    add = parser.add_argument
    add("--target", required=True)
    add("--features", required=True, help="feature folder; its last samples are held out")
    add("--vocab", required=True, help="vocabulary map")
    add("--prompts", required=True, nargs="+", help="rows with a prompt, which the drafts decode")
    add("--out", type=Path, required=True, help="folder of runs, result.json and curve.png")
    about = "supervised tokens (default 10000 40000 160000)"
    add("--sizes", type=int, nargs="+", default=list(SIZES), help=about)
    add("--seeds", type=int, nargs="+", default=[0])
    add("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    add("--epochs", type=int, default=3, help="times that a sample is trained on (default 3)")
    add("--held-out", type=int, default=24, help="samples (default 24)")
    add("--tasks", type=int, default=10, help="prompts of each file (default 10)")
    add("--max-new", type=int, default=128, help="tokens decoded a prompt (default 128)")
    add("--draft-length", type=int, default=7, help="tokens drafted in a round (default 7)")
    about = "SpecForge's start: matrices from normal(0, 0.02), or as its layers draw them"
    add("--init", choices=("normal", "module"), default="normal", help=about)
    add("--specforge-rate", type=float, help="SpecForge's learning rate (default: ours)")
    return parser.parse_args(words)


# The curve


def curve(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """For each side and measure: supervised tokens, and mean, least and largest over the seeds."""
    found: dict[str, Any] = {}
    for side in SIDES:
        own = [row for row in rows if row["side"] == side]
        sizes = sorted({row["size"] for row in own})
        for measure_name in MEASURES if own else ():
            points = []
            for size in sizes:
                at = [row for row in own if row["size"] == size]
                values = [row[measure_name] for row in at]
                points.append(
                    {
                        "supervised_tokens": at[0]["supervised_tokens"],
                        "mean": mean(values),
                        "least": min(values),
                        "largest": max(values),
                    }
                )
            found.setdefault(side, {})[measure_name] = points
    return found


def draw(curves: dict[str, Any], path: Path) -> None:
    """Draw both measures by supervised tokens, a line a side; the seeds' range as bars."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(MEASURES), figsize=(10, 4), layout="constrained")
    for axes, (name, title) in zip(panels, MEASURES.items(), strict=True):
        for side, measures in curves.items():
            points = measures[name]
            means = [point["mean"] for point in points]
            below = [point["mean"] - point["least"] for point in points]
            above = [point["largest"] - point["mean"] for point in points]
            tokens = [point["supervised_tokens"] for point in points]
            label = "SpecForge" if side == "specforge" else "eagle3fn"
            axes.errorbar(tokens, means, (below, above), marker="o", capsize=3, label=label)
        places = sorted(
            {point["supervised_tokens"] for one in curves.values() for point in one[name]}
        )
        axes.set(xscale="log", xlabel="supervised tokens", ylabel="accepted length", title=title)
        axes.set_xticks(places, [f"{place:,}" for place in places])
        axes.set_xticks([], minor=True)
        axes.grid(alpha=0.3)
        axes.legend()
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    plt.close(figure)


# The whole


def open_inputs(options: argparse.Namespace) -> Inputs:
    """Everything that is read, checked before the first run.

    Raises:
        UserError: a size that the features do not have; an `--out` with runs of other settings.
    """
    for name in ("epochs", "held_out", "tasks"):
        require(getattr(options, name) >= 1, f"--{name}", getattr(options, name), "at least 1")
    tree = target_config(options.target)
    features = open_features(options.features, tree["vocab_size"], tree["hidden_size"])
    for size in options.sizes:
        part_of(features, size, options.held_out)
    draft = draft_config_from_target(tree, options.target, map_size(options.vocab))
    hashes = config_hashes(options.target)
    vocab = load_map(options.vocab, draft.vocab_size, draft.draft_vocab_size, hashes)
    prompts = read_prompts(*options.prompts, first=options.tasks)

    # A folder holds runs of one kind.
    settings = {name: getattr(options, name) for name in KEPT}
    settings |= {"prompts": prompts.name, **fingerprints(features, vocab)}
    path = options.out / "settings.json"
    if path.exists() and read_object(path) != settings:
        raise UserError(f"{path}: the folder holds runs with other settings; name another --out")
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(path, settings)
    return Inputs(options, tree, features, vocab, prompts)


def run_all(
    inputs: Inputs, oracle: Oracle | None, on_row: Callable[[list[dict[str, Any]]], None]
) -> None:
    """All runs, small sizes first; `on_row` gets the rows so far after each."""
    rows: list[dict[str, Any]] = []
    for size in sorted(inputs.options.sizes):
        part = part_of(inputs.features, size, inputs.options.held_out)
        for seed in inputs.options.seeds:
            for side in inputs.options.sides:
                rows.append(one_run(inputs, part, size, seed, side, oracle))
                on_row(rows)


def main() -> None:
    options = parse()
    oracle = load_oracle(commit=True) if "specforge" in options.sides else None
    inputs = open_inputs(options)
    origin = provenance() if oracle is None else about(oracle)

    def on_row(rows: list[dict[str, Any]]) -> None:
        settings = {name: getattr(options, name) for name in (*KEPT, "sizes", "seeds", "sides")}
        curves = curve(rows)
        result = {**origin, "notes": NOTES, "settings": settings, "curve": curves, "runs": rows}
        write_json(options.out / "result.json", result)
        draw(curves, options.out / "curve.png")
        row = rows[-1]
        print(
            f"{row['size']:>8} tokens  seed {row['seed']}  {row['side']:10} held out "
            f"{row['held_out']:.3f}  decoded {row['decoded']:.3f}",
            flush=True,
        )

    run_all(inputs, oracle, on_row)
    print(json.dumps(read_object(options.out / "result.json")["curve"]))


if __name__ == "__main__":
    sys.exit(common.program("bench.learning_curve", main))

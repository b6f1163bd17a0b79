"""Which choices train the better draft in equal time: switches, losses, optimizers, micro-batches.

    python -m bench.choices switches --target FOLDER --features FOLDER --vocab FILE --work FOLDER

Each choice of the group is a few settings on top of those that `eagle3fn train` takes by itself. It
gets as many steps as fit into the time of `--steps` steps of the first one: processor seconds of
steps on the same samples are compared in turns, in this process, before anything is trained. All
choices see the samples in the same order, and the learning-rate schedule of each spans its own
steps.

The value is the accepted length on the held-out samples, simulated, after the last step, with the
same number of unroll steps for all. Finished runs in `--work` are kept, so a call that was cut off
goes on; another call with more `--seeds` adds theirs.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from bench.launch import settle

    settle()

import argparse
import time
from statistics import mean, median
from typing import Any, NamedTuple

import torch

from bench import common
from bench.launch import add_arguments
from eagle3fn.base.config import Config, load_config
from eagle3fn.base.draft_keys import draft_config_from_target
from eagle3fn.base.files import write_json
from eagle3fn.base.provenance import provenance
from eagle3fn.base.read import read_json, read_jsonl
from eagle3fn.base.types import VocabMap
from eagle3fn.data.features import FeatureSet, open_features, tensors_of
from eagle3fn.data.target_source import config_hashes, target_config
from eagle3fn.data.target_tensors import TargetTensors, read_target_tensors
from eagle3fn.data.vocab import load_map, map_size
from eagle3fn.train.defaults import by_section, chosen_defaults
from eagle3fn.train.loop import Events, train
from eagle3fn.train.run import Run, prepare, training_batches

_TIMED = 20  # steps of each choice, after one that warms up
_CLOSE = 0.03  # of the best: more seeds decide

EAGLE_31 = ["draft.fc_norm=true", "draft.norm_output=true"]

GROUPS: dict[str, dict[str, list[str]]] = {
    "switches": {
        "none": [],
        "norm_before_fc": ["draft.norm_before_fc=true"],
        "fc_norm": ["draft.fc_norm=true"],
        "norm_output": ["draft.norm_output=true"],
        "norm_before_residual": ["draft.norm_before_residual=true"],
        "attention_bias": ["draft.attention_bias=true"],
        "qk_norm": ["draft.qk_norm=true"],
        "two layers": ["draft.num_hidden_layers=2"],
        "window 128": ["draft.draft_window=128"],
        "train_embedding": ["draft.train_embedding=true"],
        "EAGLE-3.1": EAGLE_31,
        "EAGLE-3.1, norm_before_residual": [*EAGLE_31, "draft.norm_before_residual=true"],
    },
    "sizes": {
        "none": [],
        "half as wide": [
            "draft.hidden_size=288",
            "draft.intermediate_size=768",
            "train.init=random",
        ],
    },
    "batches": {
        "one sample after another": ["data.global_batch=8"],
        "padded": ["data.global_batch=8", "data.micro_batch=8"],
        "packed": ["data.global_batch=8", "data.pack_tokens=4096"],
    },
    "losses": {
        "kl": [],
        "rkl": ["objective.loss=rkl"],
        "jsd": ["objective.loss=jsd"],
        "ce": ["objective.loss=ce"],
        "tv": ["objective.loss=tv"],
        "nla": ["objective.loss=nla"],
        "lk": ["objective.loss=lk"],
        "ce 0.1, tv 0.9": ["objective.loss={ce=0.1,tv=0.9}"],
        "kl 0.5, tv 0.5": ["objective.loss={kl=0.5,tv=0.5}"],
        "kl 0.5, nla 0.5": ["objective.loss={kl=0.5,nla=0.5}"],
    },
    "optimizers": {
        "muon": [],
        "adamw": ["optimizer.name=adamw"],
        "lion 1e-4": ["optimizer.name=lion", "optimizer.learning_rate=1e-4"],
        "lion 3e-4": ["optimizer.name=lion", "optimizer.learning_rate=3e-4"],
        "sgd 0.03": ["optimizer.name=sgd", "optimizer.learning_rate=0.03"],
        "sgd 0.1": ["optimizer.name=sgd", "optimizer.learning_rate=0.1"],
        "sgd 0.3": ["optimizer.name=sgd", "optimizer.learning_rate=0.3"],
        "sgd 1": ["optimizer.name=sgd", "optimizer.learning_rate=1.0"],
    },
    "schedules": {
        "cosine": [],
        "linear": ["optimizer.schedule=linear"],
        "constant": ["optimizer.schedule=constant"],
        "wsd": ["optimizer.schedule=wsd"],
    },
}
"""By group: each choice's settings, of which the first one's time is that of the others. Sizes are
those of SmolLM2-135M.
"""


class Data(NamedTuple):
    """What every run reads."""

    features: FeatureSet
    vocab: VocabMap
    target: TargetTensors
    tree: dict[str, Any]  # the target's configuration


def parse() -> argparse.Namespace:
    parser = common.parser_of(__doc__)
    add = parser.add_argument
    add("group", choices=GROUPS)
    add("--target", required=True)
    add("--features", required=True)
    add("--vocab", required=True)
    add("--work", type=Path, required=True, help="folder of the runs; finished ones are kept")
    add("--only", nargs="+", help="these choices of the group, besides the first")
    add("--steps", type=int, default=300, help="of the first choice (default 300)")
    add("--held-out", type=int, default=64)
    add("--max-length", type=int, default=1024)
    add("--eval-every", type=int, help="steps between evaluations (default: at the end alone)")
    add("--seeds", type=int, nargs="+", default=[0])
    add_arguments(parser)
    return parser.parse_args()


def read_data(options: argparse.Namespace) -> Data:
    tree = target_config(options.target)
    features = open_features(options.features, tree["vocab_size"], tree["hidden_size"])
    size = map_size(options.vocab)
    assert size is not None
    vocab = load_map(options.vocab, tree["vocab_size"], size, config_hashes(options.target))
    dtype = common_dtype(options)
    target = read_target_tensors(options.target, dtype, tensors_of(features))
    return Data(features, vocab, target, tree)


def common_dtype(options: argparse.Namespace) -> torch.dtype:
    """The dtype that `eagle3fn train` takes."""
    draft = draft_config_from_target(target_config(options.target), options.target)
    chosen = by_section(chosen_defaults(draft, 600, options.device))
    return getattr(torch, chosen["train"]["dtype"])


def config_of(
    options: argparse.Namespace, data: Data, settings: list[str], seed: int, steps: int
) -> Config:
    """The settings that `eagle3fn train` takes by itself, with these ones and so many steps."""
    size = len(data.vocab.d2t)
    draft = draft_config_from_target(data.tree, options.target, size)
    chosen = by_section(chosen_defaults(draft, len(data.features.samples), options.device))
    common_ones = [
        f"train.steps={steps}",
        f"train.seed={seed}",
        f"train.eval_every={options.eval_every or steps}",
        f"train.checkpoint_every={steps}",
        f"train.device={options.device}",
        f"data.held_out={options.held_out}",
        f"data.max_length={options.max_length}",
    ]
    return load_config(None, [*common_ones, *settings], draft, chosen)


class Stepper:
    """Steps of one choice, timed by the processor."""

    def __init__(self, run: Run) -> None:
        self.fns = run.fns
        self.state = run.fns.init_state(run.fns.init(0))
        self.batches = training_batches(run, 0, _TIMED + 1)

    def seconds(self) -> float:
        """Processor seconds of the next step."""
        begin = time.process_time()
        self.state, _ = self.fns.step(self.state, next(self.batches), donate=True)
        return time.process_time() - begin


def relative_time(
    options: argparse.Namespace, data: Data, first: list[str], settings: list[str]
) -> float:
    """Processor seconds of a choice's step over the first one's: the median of steps in turns."""
    sides = []
    for given in (first, settings):
        config = config_of(options, data, given, 0, options.steps)
        sides.append(Stepper(prepare(config, *data[:3], options.work / "unused")))
    ratios = []
    for number in range(_TIMED + 1):
        # Either is the first one in turn: what runs second finds a warmer cache, or a cooler core.
        order = (0, 1) if number % 2 else (1, 0)
        spent = {side: sides[side].seconds() for side in order}
        if number:
            ratios.append(spent[1] / spent[0])
    return median(ratios)


def trained(
    options: argparse.Namespace, data: Data, name: str, settings: list[str], seed: int
) -> dict[str, Any]:
    """The result of one run, kept in its folder."""
    folder = options.work / options.group / name.replace(" ", "-").replace(",", "")
    times = folder / "time.json"
    if not times.exists():
        first = next(iter(GROUPS[options.group].values()))
        is_first = settings == first
        ratio = 1.0 if is_first else relative_time(options, data, first, settings)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(times, {"relative_time": ratio})
    ratio = read_json(times)["relative_time"]
    steps = max(1, round(options.steps / ratio))

    run = folder / f"seed-{seed}"
    if not (run / "done.json").exists():
        config = config_of(options, data, settings, seed, steps)
        begin = time.process_time()
        train(config, *data[:3], run, events=Events())
        rows = read_jsonl(run / "eval.jsonl")
        write_json(
            run / "done.json",
            {
                "seconds": time.process_time() - begin,
                "held_out": rows[-1],
                "by_step": {row["step"]: row["accepted_length"] for row in rows},
            },
        )
    done = read_json(run / "done.json")
    value = done["held_out"]["accepted_length"]
    line = f"{options.group}: {name}, seed {seed}: {steps} steps, accepted length {value:.3f}"
    print(f"{line}, {done['seconds']:.0f} s", flush=True)
    return {
        "steps": steps,
        "relative_time": ratio,
        "accepted_length": value,
        "accepted_length_sampled": done["held_out"]["accepted_length_sampled"],
        "processor_seconds": done["seconds"],
        "by_step": done["by_step"],
    }


def steps_to(found: dict[str, list[dict[str, Any]]], name: str) -> dict[str, list[int | None]]:
    """By choice and seed: steps to the accepted length that the named one has at its end; None: it
    does not get there.
    """
    reached = {}
    for choice, runs in found.items():
        reached[choice] = []
        for run, goal in zip(runs, found[name], strict=True):
            there = [
                int(step)
                for step, value in run["by_step"].items()
                if value >= goal["accepted_length"]
            ]
            reached[choice].append(min(there, default=None))
    return reached


def main() -> int:
    options = parse()
    torch.set_num_threads(1)
    data = read_data(options)
    choices = GROUPS[options.group]
    first = next(iter(choices))
    names = [name for name in choices if not options.only or name in (first, *options.only)]

    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for seed in options.seeds:
        for name in names:
            found[name].append(trained(options, data, name, choices[name], seed))

    means = {name: mean(row["accepted_length"] for row in rows) for name, rows in found.items()}
    best = max(means.values())
    result = {
        "settings": {
            "group": options.group,
            "steps": options.steps,
            "held_out": options.held_out,
            "max_length": options.max_length,
            "seeds": options.seeds,
            "samples": len(data.features.samples),
        },
        "choices": {name: choices[name] for name in names},
        "runs": found,
        "mean": means,
        "steps_to": steps_to(found, "adamw") if "adamw" in found else None,
        "close": [name for name, value in means.items() if value >= best - _CLOSE],
        **provenance(),
    }
    common.finish(result, options.out, f"choices-{options.group}")
    return 0


if __name__ == "__main__":
    sys.exit(common.program("bench.choices", main))

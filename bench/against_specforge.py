"""SpecForge's script against ours on the same arguments, and why pull request 600's table differs.

    python -m bench.against_specforge --out FOLDER --json RESULT [--causes] -- ARGS

`ARGS` are SpecForge's, without `--output-dir`; both sides get them unchanged. Its side is its own
`main()` (bench/replacements.py lists what replaces a GPU), ours is the `run` of
`scripts/train_eagle3_fn.py`; both in this process, one after the other. Compared by exact value
after every update: loss, accuracy, acceptance, gradient norm, each unroll step's loss and the rate;
at the end by `torch.equal`: weights, masters, both moments. `RESULT` has `equal` and the first
difference. Exit code 0: equal; 1: not; 2: bad input, or SpecForge is missing.

`--causes` runs both launchers of the pull request on ARGS, and the old one with one difference at a
time.
"""

import os

if __name__ == "__main__":
    # Before torch is loaded.
    os.environ.update(TRITON_INTERPRET="1", TORCHDYNAMO_DISABLE="1")

import argparse
import hashlib
import json
import shlex
import sys
import time
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch

from bench import common
from bench.specforge_script import SCRIPTS, LeafState, Recorded, run_dataflow, run_script
from eagle3fn.base.errors import UserError
from eagle3fn.base.files import write_json
from eagle3fn.base.provenance import provenance
from eagle3fn.base.types import TrainState
from eagle3fn.specforge import compare_runs, script
from eagle3fn.specforge.oracle import COMMIT, Oracle, load_oracle

COMPARED = ("loss", "grad_norm", "learning_rate", "losses", "accuracy", "acceptance")
SHOWN = (1, 100, 200)  # steps whose values are in the result, and the last
WINDOW = 50  # both launchers log every 50th step
FALLBACK = 10_000  # what the new launcher's schedule spans where --total-steps is not given
FILES = (  # of SpecForge, beyond the oracle's own; what a run uses
    "data/utils.py",
    "data/preprocessing.py",
    "runtime/launch.py",
    "runtime/training/trainer.py",
    "runtime/training/strategy.py",
    "runtime/training/backend.py",
    "runtime/data_plane/feature_dataloader.py",
)


class Compared(NamedTuple):
    """Both sides on the same arguments."""

    result: dict[str, Any]
    specforge: Recorded


def same_state(state: TrainState, specforge: dict[str, LeafState]) -> dict[str, bool]:
    """By `torch.equal`: are all leaves of weights, masters and both moments SpecForge's?

    Raises:
        UserError: the sides train different leaves.
    """
    if list(state.params) != list(specforge):
        different = sorted(set(state.params) ^ set(specforge))
        raise UserError(f"the sides train different leaves: {different}")

    trees = {
        "weights": state.params,
        "masters": state.masters,
        "mu": state.opt.mu,
        "nu": state.opt.nu,
    }
    equal = {}
    for name, tree in trees.items():
        equal[name] = all(
            torch.equal(tree[leaf], getattr(found, name)) for leaf, found in specforge.items()
        )
    return equal


def against(oracle: Oracle, arguments: list[str], out: Path, device: str = "cpu") -> Compared:
    """Train both sides on the same arguments and compare them; rows go below `out`."""
    specforge = run_script(oracle, arguments, out / "specforge", device=device)
    options = script.parser().parse_args([*arguments, "--output-dir", str(out / "ours")])
    state = script.run(options, device=device)

    their_rows = compare_runs.read_run(out / "specforge")
    our_rows = compare_runs.read_run(out / "ours")
    result = compare_rows(their_rows, our_rows)
    result["state_equal"] = same_state(state, specforge.state)
    result["equal"] = result["rows_equal"] and all(result["state_equal"].values())
    return Compared(result, specforge)


def compare_rows(specforge: list[dict[str, Any]], ours: list[dict[str, Any]]) -> dict[str, Any]:
    """Every value of every update, by exact value; in lists SpecForge's comes first."""
    unequal = 0
    for theirs, own in zip(specforge, ours, strict=False):
        unequal += sum(theirs[name] != own[name] for name in COMPARED)
    found = compare_runs.first_difference(specforge, ours)

    both = min(len(specforge), len(ours))
    steps = sorted({*SHOWN, len(specforge)})
    return {
        "steps": [len(specforge), len(ours)],
        "compared": COMPARED,
        "first_difference": None if found is None else str(found),
        "unequal_values": unequal,
        "rows_equal": found is None and not unequal,
        "sha256_of_rows": [digest(specforge), digest(ours)],
        "shown": {
            str(step): [shown(specforge[step - 1]), shown(ours[step - 1])]
            for step in steps
            if 0 < step <= both
        },
    }


def shown(row: dict[str, Any]) -> dict[str, float]:
    """A row's values for a table; of the lists the first unroll step."""
    values = {}
    for name in compare_runs.COLUMNS:
        value = row[name]
        values[name] = value[0] if isinstance(value, list) else value
    return values


def digest(rows: list[dict[str, Any]]) -> str:
    """One hash over all compared values, which JSON writes in full."""
    return hashlib.sha256(json.dumps(values_of(rows)).encode()).hexdigest()


def values_of(rows: list[dict[str, Any]]) -> list[list[Any]]:
    """The compared values of every update."""
    return [[row[name] for name in COMPARED] for row in rows]


def causes(oracle: Oracle, arguments: list[str], out: Path, old: Recorded) -> dict[str, Any]:
    """Both launchers of the pull request, and the old one with one difference at a time.

    Args:
        oracle: SpecForge at its commit.
        arguments: the launchers', without `--output-dir`.
        out: the folder of the runs.
        old: the old launcher's run on these arguments.
    """
    long = [*arguments, "--total-steps", str(FALLBACK)]
    runs = {
        "old launcher": old,
        "sample order alone": run_script(oracle, arguments, out / "order", stored=True),
        "schedule length alone": run_script(oracle, long, out / "length"),
        "order and length": run_script(oracle, long, out / "both", stored=True),
        "new launcher": run_dataflow(oracle, arguments, out / "dataflow"),
    }
    both = runs["order and length"]
    new = runs["new launcher"]

    steps = range(WINDOW, len(old.rows) + 1, WINDOW)
    means = {}
    for name, run in runs.items():
        means[name] = {str(step): unweighted(run, step) for step in steps}
    return {
        "order_and_length_are_all": values_of(new.rows) == values_of(both.rows),
        "mean_loss_at_step": means,
        "reports_of_one_run": {str(step): reports(old, step) for step in steps},
        "reports_of_the_new_one": {str(step): new.shown[step - 1] for step in steps},
    }


def unweighted(run: Recorded, step: int) -> float:
    """The mean of the losses over unroll steps.

    The old launcher's progress bar shows it, and the new one's log has it as `plosses`.
    """
    return mean(run.rows[step - 1]["losses"])


def reports(old: Recorded, step: int) -> dict[str, float | None]:
    """The same numbers of one run as each launcher reports them at `step`."""
    row = old.rows[step - 1]
    log = next((log for log in old.logged if log["step"] == step), None)
    mean_loss = mean_accuracy = None
    if log:
        places = range(len(row["losses"]))
        mean_loss = mean(log[f"train/ploss_{i}"] for i in places)
        mean_accuracy = mean(log[f"train/acc_{i}"] for i in places)
    return {
        "old bar, loss": old.shown[step - 1]["loss"],
        "old log, mean of ploss_i over the window": mean_loss,
        "new log, loss (weighted sum, last batch)": row["loss"],
        "new log, plosses (mean, last batch)": mean(row["losses"]),
        "old bar, acc": old.shown[step - 1]["acc"],
        "old log, mean of acc_i over the window": mean_accuracy,
        "new log, acc (mean, last batch)": mean(row["accuracy"]),
    }


def about(oracle: Oracle, options: argparse.Namespace, replaced: tuple[str, ...]) -> dict[str, Any]:
    """Where and with what the result was made, SpecForge's files by hash."""
    words = ["python", "-m", "bench.against_specforge"]
    words += ["--out", str(options.out), "--json", str(options.json)]
    if options.causes:
        words.append("--causes")
    command = shlex.join([*words, "--", *options.arguments])
    more = {"oracle": identity(oracle), "level": 2, "replaced": replaced}
    return provenance(command) | more


def identity(oracle: Oracle) -> dict[str, Any]:
    """SpecForge by its commit and the hashes of the files that a run uses."""
    root = Path(str(oracle.optimizer.__file__)).parent
    more = {name: hashlib.sha256((root / name).read_bytes()).hexdigest() for name in FILES}
    hashes = oracle.hashes | SCRIPTS | more
    return {"name": "SpecForge", "kind": oracle.kind, "commit": COMMIT, "hashes": hashes}


def parse() -> argparse.Namespace:
    parser = common.parser_of(__doc__)
    add = parser.add_argument
    about = "folder of the runs; must not hold an earlier one"
    add("--out", type=Path, required=True, help=about)
    add("--json", type=Path, required=True, help="the result")
    about = "also what makes the pull request's own table differ"
    add("--causes", action="store_true", help=about)
    add("arguments", nargs="+", help="SpecForge's script's, after --")
    return parser.parse_args()


def main() -> int:
    options = parse()
    begin = time.perf_counter()
    oracle = load_oracle(commit=True)
    print(oracle.describe())
    if (options.out / "ours").exists():
        raise UserError(
            f"{options.out}: holds an earlier run; name another folder, or delete that one"
        )

    # The comparison is written before the causes, which take much longer.
    result, specforge = against(oracle, options.arguments, options.out)
    print(json.dumps(result, indent=2))
    whole = about(oracle, options, specforge.replaced) | result
    write_json(options.json, whole)
    if options.causes:
        whole["causes"] = causes(oracle, options.arguments, options.out, specforge)
    write_json(options.json, whole | {"seconds": round(time.perf_counter() - begin)})
    return 0 if result["equal"] else 1


if __name__ == "__main__":
    sys.exit(common.program("bench.against_specforge", main))

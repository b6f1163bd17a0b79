"""SpecForge's script against ours on the same arguments, and why pull request 600's table differs.

    python -m bench.against_specforge --out FOLDER --json RESULT [--causes] -- ARGS

`ARGS` are SpecForge's, without `--output-dir`, handed to both sides as they stand. Its side is its own `main()`
(bench/replacements.py says what stands in for a GPU), ours is the `run` of `scripts/train_eagle3_fn.py`; both in this
process, one after the other. Compared by exact value after every update: loss, accuracy, acceptance, gradient norm,
each unroll step's loss and the rate; at the end by `torch.equal`: weights, masters, both moments. Exit code 0: equal;
1: not.

`--causes` runs both launchers of the pull request on ARGS, and the old one with one difference at a time.
"""

import os

if __name__ == "__main__":
    os.environ.update(TRITON_INTERPRET="1", TORCHDYNAMO_DISABLE="1")  # before torch is loaded

import argparse
import hashlib
import json
import shlex
import sys
import time
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from bench import specforge_script as old_side
from eagle3fn.base.errors import UserError
from eagle3fn.base.files import write_json
from eagle3fn.base.types import TrainState
from eagle3fn.specforge import compare_runs, script
from eagle3fn.specforge.oracle import COMMIT, Oracle, OracleMissingError, load_oracle
from eagle3fn.testing.provenance import provenance

COMPARED = ("loss", "grad_norm", "learning_rate", "losses", "accuracy", "acceptance")
SHOWN = (1, 100, 200)
WINDOW = 50  # both launchers log every 50th step
FALLBACK = 10_000  # what the new launcher's schedule spans where --total-steps is not given
FILES = (
    *("data/utils.py", "data/preprocessing.py", "runtime/launch.py", "runtime/training/trainer.py"),
    *(
        "runtime/training/strategy.py",
        "runtime/training/backend.py",
        "runtime/data_plane/feature_dataloader.py",
    ),
)


def same_state(state: TrainState, old: dict[str, tuple[torch.Tensor, ...]]) -> dict[str, bool]:
    """By `torch.equal`: are all leaves of the weights, masters and both moments the old side's?"""
    trees = {
        "weights": state.params,
        "masters": state.masters,
        "mu": state.opt.mu,
        "nu": state.opt.nu,
    }
    if list(state.params) != list(old):
        raise UserError(f"the sides train different leaves: {sorted(set(state.params) ^ set(old))}")
    return {
        name: all(torch.equal(tree[leaf], old[leaf][place]) for leaf in old)
        for place, (name, tree) in enumerate(trees.items())
    }


def against(
    oracle: Oracle, arguments: list[str], out: Path, device: str = "cpu"
) -> tuple[dict[str, Any], old_side.Recorded]:
    """Both sides on the same arguments; the comparison, and SpecForge's record."""
    old = old_side.run_old(oracle, arguments, out / "old", device=device)
    options = script.parser().parse_args([*arguments, "--output-dir", str(out / "new")])
    state = script.run(options, device=device)

    rows = [compare_runs.read_run(out / side) for side in ("old", "new")]
    result = compare_rows(*rows) | {"state_equal": same_state(state, old.state)}
    result["equal"] = result["rows_equal"] and all(result["state_equal"].values())
    return result, old


def compare_rows(rows: list[dict[str, Any]], new: list[dict[str, Any]]) -> dict[str, Any]:
    """Every value of every update, by exact value; SpecForge's rows first."""
    unequal = [
        name for a, b in zip(rows, new, strict=False) for name in COMPARED if a[name] != b[name]
    ]
    found = compare_runs.first_difference(rows, new)
    return {
        "steps": [len(rows), len(new)],
        "compared": COMPARED,
        "first_difference": None if found is None else str(found),
        "unequal_values": len(unequal),
        "rows_equal": found is None and not unequal,
        "sha256_of_rows": [digest(side) for side in (rows, new)],
        "shown": {
            str(step): [shown(side[step - 1]) for side in (rows, new)]
            for step in sorted({*SHOWN, len(rows)})
            if 0 < step <= min(len(rows), len(new))
        },
    }


def shown(row: dict[str, Any]) -> dict[str, float]:
    """A row's values for a table; of the lists the first unroll step."""
    return {
        name: row[name][0] if isinstance(row[name], list) else row[name]
        for name in compare_runs.COLUMNS
    }


def digest(rows: list[dict[str, Any]]) -> str:
    """One hash over all compared values, which JSON writes in full."""
    return hashlib.sha256(
        json.dumps([[row[name] for name in COMPARED] for row in rows]).encode()
    ).hexdigest()


def causes(
    oracle: Oracle, arguments: list[str], out: Path, old: old_side.Recorded
) -> dict[str, Any]:
    """The new launcher beside the old one, and the old one with one difference at a time."""
    long = [*arguments, "--total-steps", str(FALLBACK)]
    runs = {
        "old launcher": old,
        "sample order alone": old_side.run_old(oracle, arguments, out / "order", stored=True),
        "schedule length alone": old_side.run_old(oracle, long, out / "length"),
        "order and length": old_side.run_old(oracle, long, out / "both", stored=True),
        "new launcher": old_side.run_dataflow(oracle, arguments, out / "dataflow"),
    }
    new, both = runs["new launcher"].rows, runs["order and length"].rows
    steps = range(WINDOW, len(old.rows) + 1, WINDOW)
    return {
        "order_and_length_are_all": [row[name] for row in new for name in COMPARED]
        == [row[name] for row in both for name in COMPARED],
        "mean_loss_at_step": {
            name: {str(s): unweighted(run, s) for s in steps} for name, run in runs.items()
        },
        "reports_of_one_run": {str(step): reports(old, step) for step in steps},
        "reports_of_the_new_one": {str(s): runs["new launcher"].shown[s - 1] for s in steps},
    }


def unweighted(run: old_side.Recorded, step: int) -> float:
    """The mean over unroll steps of their losses: what the old progress bar shows, and the new log's `plosses`."""
    return mean(run.rows[step - 1]["losses"])


def reports(old: old_side.Recorded, step: int) -> dict[str, float | None]:
    """The same numbers of one run as each launcher tells them at `step`."""
    row, log = old.rows[step - 1], next((log for log in old.logged if log["step"] == step), {})
    window = [log[f"train/ploss_{i}"] for i in range(len(row["losses"]))] if log else []
    hits = [log[f"train/acc_{i}"] for i in range(len(row["losses"]))] if log else []
    return {
        "old bar, loss": old.shown[step - 1]["loss"],
        "old log, mean of ploss_i over the window": mean(window) if window else None,
        "new log, loss (weighted sum, last batch)": row["loss"],
        "new log, plosses (mean, last batch)": mean(row["losses"]),
        "old bar, acc": old.shown[step - 1]["acc"],
        "old log, mean of acc_i over the window": mean(hits) if hits else None,
        "new log, acc (mean, last batch)": mean(row["accuracy"]),
    }


def about(oracle: Oracle, options: argparse.Namespace, replaced: tuple[str, ...]) -> dict[str, Any]:
    """Where and with what the result was got, the old tool's files by hash."""
    flags = [
        "--out",
        str(options.out),
        "--json",
        str(options.json),
        *(["--causes"] if options.causes else []),
    ]
    return provenance(
        shlex.join(["python", "-m", "bench.against_specforge", *flags, "--", *options.arguments])
    ) | {
        "oracle": identity(oracle),
        "level": 2,
        "replaced": replaced,
    }


def identity(oracle: Oracle) -> dict[str, Any]:
    """SpecForge by its commit and the hashes of the files that a run uses."""
    root = Path(str(oracle.optimizer.__file__)).parent
    more = {name: hashlib.sha256((root / name).read_bytes()).hexdigest() for name in FILES}
    hashes = oracle.hashes | old_side.SCRIPTS | more
    return {"name": "SpecForge", "kind": oracle.kind, "commit": COMMIT, "hashes": hashes}


def main() -> int:
    parser = common.parser_of(__doc__)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the runs; must not hold an earlier one"
    )
    parser.add_argument("--json", type=Path, required=True, help="the result")
    parser.add_argument(
        "--causes", action="store_true", help="also what makes the pull request's own table differ"
    )
    parser.add_argument("arguments", nargs="+", help="the old script's, behind --")
    options = parser.parse_args()
    begin = time.perf_counter()
    try:
        oracle = load_oracle(commit=True)
        print(oracle.describe())
        if (options.out / "new").exists():
            raise UserError(
                f"{options.out}: holds an earlier run; name another folder, or delete that one"
            )
        result, old = against(oracle, options.arguments, options.out)
        print(json.dumps(result, indent=2))
        write_json(options.json, head := about(oracle, options, old.replaced) | result)
        if options.causes:
            head["causes"] = causes(oracle, options.arguments, options.out, old)
    except (UserError, OracleMissingError) as error:
        print(f"bench.against_specforge: {error}", file=sys.stderr)
        return 2
    write_json(options.json, head | {"seconds": round(time.perf_counter() - begin)})
    return 0 if result["equal"] else 1


if __name__ == "__main__":
    sys.exit(main())

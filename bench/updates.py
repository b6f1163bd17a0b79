"""Updates of SpecForge's script against ours, at a real draft's shapes, on seeded random features.

    python -m bench.updates --device cuda --seconds 90 --out RESULT [--updates 20]

A temporary folder gets all that both scripts read: a target of random weights, feature files, a
vocabulary map and a draft's configuration. SpecForge's own `main()` and the `run` of
`scripts/train_eagle3_fn.py` then train on the same arguments in this process: `sdpa`, deterministic
algorithms, no dynamo. On CUDA they train Qwen2.5-7B's draft, each side with its own Triton loss
(level 1). On the CPU, a rehearsal, they train a tiny one with the same eager loss (level 2).

Every number of every update and the last state are compared by exact value: `equal` in RESULT. It
is written after each stage; a stage that fails, or is unfinished when time is up, leaves its
traceback under `faults`. Exit code 0: equal; 1: a difference or a fault; 2: nothing was compared,
and one line names the reason.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from bench import launch

    launch.settle(launch.exact)

import argparse
import gc
import json
import math
import os
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict
from typing import Any
from unittest.mock import patch

import torch

from bench import common, specforge_script
from bench.against_specforge import compare_rows, identity, same_state
from bench.problem import SHAPES, draft_of
from bench.random_run import BATCH, SAMPLES, UNROLL, Sizes, write_problem
from bench.replacements import replacements
from bench.stages import Stages
from eagle3fn.base.errors import UserError
from eagle3fn.base.provenance import provenance
from eagle3fn.base.read import read_jsonl
from eagle3fn.base.types import TrainState
from eagle3fn.specforge import script
from eagle3fn.specforge.oracle import Oracle, load_oracle
from eagle3fn.train.events import Events
from eagle3fn.train.memory import GIB

NEEDED = 44 * GIB  # of a card's memory, for the largest shapes
LEAST = {"seconds": 0, "updates": 0, "length": 15}  # of options; they must be above
OUR_FILES = "our checkpoints and drafts are not written"

SIZES = {"cuda": Sizes("qwen2.5-7b", 512, 1e-4), "cpu": Sizes("tiny", 40, 1e-3)}
SMALLER = Sizes("smollm2", 512, 1e-4)  # for a card with less memory


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = common.parser_of(__doc__)
    add = parser.add_argument
    add("--device", choices=("cuda", "cpu"), required=True)
    add("--seconds", type=float, default=90, help="all must end within these (default 90)")
    add("--out", type=Path, required=True, help="the result's file")
    add("--updates", type=int, default=20, help="optimizer updates on each side (default 20)")
    add("--shape", choices=SHAPES, help="the draft's shape (default: by the device)")
    add("--length", type=int, help="tokens of the longest sample (default: by the device)")
    add("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    for name, least in LEAST.items():
        value = getattr(options, name)
        if value is not None and not least < value < math.inf:
            raise UserError(f"--{name} {value}: must be above {least}")
    return options


def sizes_of(options: argparse.Namespace) -> tuple[Sizes, str | None]:
    """What to train, and why it is less than it should be, if it is."""
    sizes = SIZES[options.device]
    why = None
    if options.device == "cuda":
        free_bytes = torch.cuda.mem_get_info()[0]
        if free_bytes < NEEDED:
            why = (
                f"the card has {free_bytes / GIB:.0f} GiB free, {sizes.shape} takes {NEEDED // GIB}"
            )
            sizes = SMALLER

    shape = options.shape or sizes.shape
    length = options.length or sizes.length
    return sizes._replace(shape=shape, length=length), why


def judged(result: dict[str, Any], root: Path) -> dict[str, Any]:
    """The comparison as far as both sides have come.

    `equal` is claimed of whole runs alone, and only where every loss is another one.
    """
    theirs = rows_of(root / "specforge")
    found = compare_rows(theirs, rows_of(root / "ours"))
    count = result["updates"]
    losses = {row["loss"] for row in theirs}
    moving = len(losses) == len(theirs) > 0
    found["nontrivial"] = moving and all(row["grad_norm"] > 0 for row in theirs)
    found["equal"] = (
        not result["faults"]
        and found["nontrivial"]
        and found["steps"] == [count, count]
        and found["rows_equal"]
        and all(result["state_equal"].values())
    )
    return found


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The rows that a side has written so far."""
    path = folder / "metrics.jsonl"
    return read_jsonl(path) if path.is_file() else []


def train_ours(arguments: Sequence[str], out: Path, device: str) -> TrainState:
    """Our script's `run`, whose checkpoints and drafts are not written."""
    options = script.parser().parse_args([*arguments, "--output-dir", str(out)])
    with ExitStack() as stack:
        stack.enter_context(patch.object(script, "run_events", lambda *_: Events()))
        stack.enter_context(patch("eagle3fn.train.loop.save_checkpoint", lambda *_: None))
        return script.run(options, device=device)


def measure(
    oracle: Oracle,
    options: argparse.Namespace,
    change: Sequence[str] = (),
    spent: float = 0.0,
) -> dict[str, Any]:
    """Both sides and the comparison.

    Args:
        oracle: SpecForge at its commit.
        options: as parsed.
        change: more arguments for ours alone: a control, which must be seen.
        spent: seconds of `options.seconds` that have gone by.
    """
    sizes, why = sizes_of(options)
    replaced = [one.about for one in replacements(oracle, options.device, None)]
    head = provenance() | {
        "oracle": identity(oracle),
        "device": options.device,
        "level": 1 if options.device == "cuda" else 2,
        "updates": options.updates,
        "draft": asdict(draft_of(sizes.shape, None, sizes.length)),
        "settings": sizes._asdict() | {"batch": BATCH, "samples": SAMPLES, "ttt_length": UNROLL},
        "smaller_because": why,
        "seed": options.seed,
        "flags": {
            "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
            "CUBLAS_WORKSPACE_CONFIG": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
            "attention": "sdpa",
        },
        "state_equal": {"compared": False},
        "replaced": [*replaced, specforge_script.NOT_SAVED, OUR_FILES],
    }
    with tempfile.TemporaryDirectory(prefix="updates-") as folder:
        root = Path(folder)
        stages = Stages(
            options.out,
            head,
            seconds=options.seconds,
            spent=spent,
            more=lambda result: judged(result, root),
            report=report,
            remove=root,
            logs={"SpecForge": root / "specforge" / "log.txt"},
        )
        with closing(stages):
            train_both(oracle, options, sizes, root, change, stages)
            return stages.end()


def train_both(
    oracle: Oracle,
    options: argparse.Namespace,
    sizes: Sizes,
    root: Path,
    change: Sequence[str],
    stages: Stages,
) -> None:
    """The problem, one side after the other, and the comparison of their last states."""
    arguments: list[str] = []
    theirs = None
    state = None
    with stages.stage("problem"):
        arguments = write_problem(root, sizes, options.updates, options.device, options.seed)
        free()
    if not arguments:
        return

    # A side that fails does not keep the other from its rows.
    with stages.stage("SpecForge"):
        theirs = specforge_script.run_script(
            oracle,
            arguments,
            root / "specforge",
            device=options.device,
            conversations=False,
            saves=False,
        )
        stages.result["replaced"] = [*theirs.replaced, OUR_FILES]
    with stages.stage("ours"):
        free()
        state = train_ours([*arguments, *change], root / "ours", options.device)

    if theirs is not None and state is not None:
        with stages.stage("state"):
            stages.result["state_equal"] = same_state(state, theirs.state)


def report(result: dict[str, Any]) -> None:
    """Faults on stderr and a line of JSON on stdout, the process's own ones."""
    for fault in result["faults"]:
        print(f"{fault['where']}:\n{fault['traceback']}", file=sys.__stderr__)
    names = ("equal", "steps", "unequal_values", "first_difference", "seconds")
    summary = {name: result[name] for name in names} | {"faults": len(result["faults"])}
    print(json.dumps(summary), file=sys.__stdout__, flush=True)


def free() -> None:
    """Free what the side before has left, on the card too."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main(arguments: list[str] | None = None, begin: float | None = None) -> int:
    """The exit code; the last line on stdout is a summary in JSON.

    `begin` is when the process began, by `time.monotonic`.
    """
    if begin is None:
        begin = time.monotonic()
    return common.program("bench.updates", lambda: run(arguments, begin))


def run(arguments: list[str] | None, begin: float) -> int:
    """Parse, compare, report."""
    options = parse(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device here; --device cpu is a rehearsal")
    oracle = load_oracle(commit=True, native=options.device == "cuda")
    specforge_script.script_path(oracle, "train_eagle3.py")
    torch.use_deterministic_algorithms(True)
    result = measure(oracle, options, spent=time.monotonic() - begin)
    report(result)
    return 0 if result["equal"] else 1


if __name__ == "__main__":
    sys.exit(main(begin=launch.BEGIN))

"""Do the parity tests catch faults?

Small faults are drawn by seed over SpecForge's arithmetic and tried one at a time. A line belongs
to that arithmetic if it runs, in a function of `FILES`, while drawn cases train by SpecForge's
recipe. Left out is what parity cannot mean: refusals (`raise`, the condition of an `if` that only
raises, functions `check_…` and their calls), `assert`, texts, annotations, and `device` arguments.

A fault is put into a temporary copy, never into the working tree. It is caught if a parity test
fails on it, cannot load it, or does not end.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

if __name__ == "__main__":  # before torch is loaded; who imports this has done it
    os.environ |= {"TRITON_INTERPRET": "1", "TORCHDYNAMO_DISABLE": "1"}

import eagle3fn as e3
from eagle3fn import specforge
from eagle3fn.base.files import write_json
from eagle3fn.base.sections import OptimizerConfig
from eagle3fn.specforge.cases import for_specforge
from eagle3fn.testing.builders import tiny_batch, tiny_frozen, tiny_params
from eagle3fn.testing.strategies import drawn
from tests.specforge.mutations import Mutation, find_mutations

ROOT = Path(__file__).resolve().parents[2]
FILES = (
    "eagle3fn/base/grad.py",
    "eagle3fn/base/rows.py",
    "eagle3fn/base/tree.py",
    "eagle3fn/data/collate.py",
    "eagle3fn/model/forward.py",
    "eagle3fn/model/losses.py",
    "eagle3fn/model/plain.py",
    "eagle3fn/model/rope.py",
    "eagle3fn/model/table.py",
    "eagle3fn/model/teacher.py",
    "eagle3fn/model/unroll.py",
    "eagle3fn/model/visibility.py",
    "eagle3fn/specforge/arithmetic.py",
    "eagle3fn/specforge/recipes.py",
    "eagle3fn/train/optimizer.py",
    "eagle3fn/train/step.py",
)
TESTS = (
    "tests/model/test_reference_parity.py",
    "tests/specforge/test_parity_command.py::test_our_objective_is_equivalent_to_specforge",
    "tests/specforge/test_oracle_training.py",
)
OPTIMIZER = OptimizerConfig(accumulation="params", learning_rate=1e-2, warmup_ratio=0.3)


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0: all caught; 1: some survived; 2: nothing was tried."""
    return run(parse(arguments), candidates())


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="the same mutations for the same seed (default 0)"
    )
    parser.add_argument(
        "--count", type=int, default=20, help="mutations, each on another line (default 20)"
    )
    parser.add_argument(
        "--limit", type=int, default=300, help="CPU seconds a test run may take (default 300)"
    )
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--out", type=Path, help="JSON file")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace, found: list[Mutation]) -> int:
    """Try `options.count` of the mutations found; returns the exit code of `main`."""
    lines = len({(mutation.file, mutation.line) for mutation in found})
    if not 1 <= options.count <= lines:
        print(
            f"mutate: --count {options.count}: must be between 1 and {lines}, the lines",
            file=sys.stderr,
        )
        return 2
    chosen = draw(found, options.count, options.seed)
    print(f"{len(found)} mutations on {lines} lines of SpecForge's arithmetic", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        copy_to(place)

        # The tests must pass on the copy as it is.
        unchanged = run_tests(place, options.limit)
        if unchanged["result"] != "survived":
            raise SystemExit(f"mutate: the parity tests do not pass as it is: {unchanged['by']}")
        print(f"unchanged: passes in {unchanged['seconds']} s", flush=True)

        rows = [attempt(place, mutation, options.limit) for mutation in chosen]

    caught = sum(row["result"] == "caught" for row in rows)
    result = {
        "seed": options.seed,
        "count": len(rows),
        "caught": caught,
        "candidates": len(found),
        "mutations": rows,
        "tests": list(TESTS),
        "specforge_src": "SPECFORGE_SRC" in os.environ,
        "unchanged": unchanged,
    }
    if options.out:
        write_json(options.out, result)
    print(f"{caught} of {len(rows)} caught")
    if options.json:
        print(json.dumps(result))
    return int(caught < len(rows))


# What can be drawn


def candidates() -> list[Mutation]:
    """All mutations that can be drawn."""
    lines = executed()
    found = []
    for file in FILES:
        found += find_mutations(file, (ROOT / file).read_bytes(), lines[file])
    return found


def executed() -> dict[str, set[int]]:
    """Lines of each file that run while drawn cases train by SpecForge's recipe."""
    seen: dict[str, set[int]] = {file: set() for file in FILES}
    names = {str(ROOT / file): file for file in FILES}

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        file = names.get(frame.f_code.co_filename)
        if file is None:
            return None
        if event == "line":
            seen[file].add(frame.f_lineno)
        return trace

    sys.settrace(trace)
    for drawn_case in drawn(40, 0):
        case = for_specforge(drawn_case)
        config = case.config(OPTIMIZER, 4)
        functions = e3.bind(config, tiny_frozen(case), recipe=specforge.RECIPE)
        state = functions.init_state(tiny_params(case))
        for index in range(6):
            # Losses by acceptance are for one micro-batch an update.
            batches = (tiny_batch(case, index), tiny_batch(case, index + 1))
            state, _ = functions.step(state, batches if case.loss == "kl" else batches[0])
    sys.settrace(None)
    return seen


def draw(found: list[Mutation], count: int, seed: int) -> list[Mutation]:
    """`count` lines, each as likely as another, and one mutation of each."""
    random = Random(seed)
    lines = sorted({(mutation.file, mutation.line) for mutation in found})
    chosen = []
    for line in random.sample(lines, count):
        of_line = [mutation for mutation in found if (mutation.file, mutation.line) == line]
        chosen.append(random.choice(of_line))
    return chosen


# One attempt


def copy_to(place: Path) -> None:
    """Copy what the tests need."""
    leave_out = shutil.ignore_patterns("__pycache__", ".hypothesis")
    for name in ("eagle3fn", "tests"):
        shutil.copytree(ROOT / name, place / name, ignore=leave_out)
    shutil.copy(ROOT / "pyproject.toml", place)


def attempt(place: Path, mutation: Mutation, limit: int) -> dict[str, Any]:
    """Run the parity tests with one mutation in the copy."""
    target = place / mutation.file
    whole = (ROOT / mutation.file).read_bytes()
    changed = mutation.apply(whole)
    before, after = changed_lines(whole, changed)

    target.write_bytes(changed)
    row = {
        "file": mutation.file,
        "line": mutation.line,
        "kind": mutation.kind,
        "before": before,
        "after": after,
        **run_tests(place, limit),
    }
    target.write_bytes(whole)

    print(f"{row['result']:8}  {mutation.file}:{mutation.line}  {mutation.kind}")
    print(f"    - {before}\n    + {after}\n    {row['by']}, {row['seconds']} s", flush=True)
    return row


def changed_lines(before: bytes, after: bytes) -> tuple[str, str]:
    """The lines that differ, joined, before and after."""
    old = before.decode().splitlines()
    new = after.decode().splitlines()
    first = _common(old, new)
    last = _common(old[::-1], new[::-1])
    return _joined(old[first : len(old) - last]), _joined(new[first : len(new) - last])


def _common(a: list[str], b: list[str]) -> int:
    """How many lines are equal from the beginning on."""
    return next(i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)


def _joined(lines: list[str]) -> str:
    return " ".join(line.strip() for line in lines)


def run_tests(place: Path, limit: int) -> dict[str, Any]:
    """`result`, `by` which test, and how many `seconds` it took."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *TESTS]
    begun = time.perf_counter()
    done = subprocess.run(
        ["bash", "-c", f'ulimit -t {limit}; exec "$@"', "bash", *command],
        cwd=place,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = round(time.perf_counter() - begun, 1)
    if done.returncode == 0:
        return {"result": "survived", "by": "no test", "seconds": seconds}

    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    by = failed[0] if failed else f"exit code {done.returncode}: {done.stdout[-200:]}"
    return {"result": "caught", "by": by, "seconds": seconds}


def environment() -> dict[str, str]:
    """The environment of the tests, which run in another folder: paths in it are absolute."""
    found = os.environ | {"HYPOTHESIS_PROFILE": "catch", "PYTHONDONTWRITEBYTECODE": "1"}
    source = found.get("SPECFORGE_SRC")
    if source:
        found["SPECFORGE_SRC"] = str(Path(source).absolute())
    return found


if __name__ == "__main__":
    sys.exit(main())

"""Do the parity tests catch faults? Small faults drawn by seed over the lines of the legacy path, one at a time.

A line is of the legacy path if it runs, in a function of `FILES`, while drawn cases train under the settings that
reproduce the old tool. Left out is what parity cannot mean: refusals (`raise`, the condition of an `if` that only
raises, functions `check_…` and their calls), `assert`, texts, annotations, and `device` arguments. A fault is put into
a temporary copy, never into the working tree; it is caught if a parity test fails on it, cannot load it, or does not
end.
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

if __name__ == "__main__":  # before torch is loaded; who imports this has settled it
    os.environ |= {"TRITON_INTERPRET": "1", "TORCHDYNAMO_DISABLE": "1"}

import eagle3fn as e3
from eagle3fn.base.config import OptimizerConfig
from eagle3fn.base.files import write_json
from eagle3fn.specforge.cases import for_specforge
from eagle3fn.testing.builders import tiny_batch, tiny_frozen, tiny_params
from eagle3fn.testing.strategies import drawn
from tests.specforge.mutations import Mutation, find_mutations

ROOT = Path(__file__).resolve().parents[2]
FILES = (
    *(f"eagle3fn/base/{name}.py" for name in ("grad", "rows", "tree")),
    *(
        f"eagle3fn/model/{name}.py"
        for name in ("attention", "forward", "layers", "losses", "rope", "table", "teacher")
    ),
    *(f"eagle3fn/train/{name}.py" for name in ("optimizer", "step")),
)
TESTS = (
    "tests/model/test_reference_parity.py",
    "tests/specforge/test_parity_command.py::test_our_objective_is_equivalent_to_specforge",
    "tests/specforge/test_oracle_training.py",
)
OLD = OptimizerConfig(
    schedule="legacy", accumulation="legacy", learning_rate=1e-2, warmup_ratio=0.3
)


def main() -> int:
    """Exit code 0: all caught; 1: some survived; 2: nothing was tried."""
    options = arguments()
    found = mutations()
    lines = len({(m.file, m.line) for m in found})
    if not 1 <= options.count <= lines:
        print(
            f"mutate: --count {options.count}: must be between 1 and {lines}, the lines",
            file=sys.stderr,
        )
        return 2
    chosen = draw(found, options.count, options.seed)
    print(f"{len(found)} mutations on {lines} lines of the legacy path", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for name in ("eagle3fn", "tests"):
            shutil.copytree(
                ROOT / name,
                place / name,
                ignore=shutil.ignore_patterns("__pycache__", ".hypothesis"),
            )
        shutil.copy(ROOT / "pyproject.toml", place)
        whole = passes(place, options.limit)
        if whole["result"] != "survived":
            raise SystemExit(f"mutate: the parity tests do not pass as it is: {whole['by']}")
        print(f"unchanged: passes in {whole['seconds']} s", flush=True)
        rows = [attempt(place, mutation, options.limit) for mutation in chosen]
    caught = sum(row["result"] == "caught" for row in rows)
    result = {
        "seed": options.seed,
        "count": len(rows),
        "caught": caught,
        "candidates": len(found),
        "mutations": rows,
    }
    result |= {
        "tests": list(TESTS),
        "specforge_src": "SPECFORGE_SRC" in os.environ,
        "unchanged": whole,
    }
    if options.out:
        write_json(options.out, result)
    print(f"{caught} of {len(rows)} caught")
    if options.json:
        print(json.dumps(result))
    return int(caught < len(rows))


def arguments() -> argparse.Namespace:
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
    return parser.parse_args()


def mutations() -> list[Mutation]:
    """All that can be drawn."""
    lines = executed()
    return [
        m for file in FILES for m in find_mutations(file, (ROOT / file).read_bytes(), lines[file])
    ]


def executed() -> dict[str, set[int]]:
    """Lines of each file that run while drawn cases train as the old tool does."""
    seen: dict[str, set[int]] = {file: set() for file in FILES}
    names = {str(ROOT / file): file for file in FILES}

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        file = names.get(frame.f_code.co_filename)
        if file and event == "line":
            seen[file].add(frame.f_lineno)
        return trace if file else None

    sys.settrace(trace)
    for case in map(for_specforge, drawn(40, 0)):
        functions = e3.bind(case.config(OLD, 4), tiny_frozen(case))
        state = functions.init_state(tiny_params(case))
        for index in range(6):
            pair = (tiny_batch(case, index), tiny_batch(case, index + 1))
            state, _ = functions.step(state, pair if case.loss == "kl" else pair[0])
    sys.settrace(None)
    return seen


def draw(found: list[Mutation], count: int, seed: int) -> list[Mutation]:
    """`count` lines, all alike, and one mutation of each."""
    random = Random(seed)
    lines = random.sample(sorted({(m.file, m.line) for m in found}), count)
    return [random.choice([m for m in found if (m.file, m.line) == line]) for line in lines]


def attempt(place: Path, mutation: Mutation, limit: int) -> dict[str, Any]:
    """Run the parity tests with one mutation in the copy."""
    target, whole = place / mutation.file, (ROOT / mutation.file).read_bytes()
    changed = mutation.apply(whole)
    target.write_bytes(changed)
    row = {"file": mutation.file, "line": mutation.line, "kind": mutation.kind}
    row |= dict(zip(("before", "after"), changed_lines(whole, changed), strict=True)) | passes(
        place, limit
    )
    target.write_bytes(whole)
    print(f"{row['result']:8}  {mutation.file}:{mutation.line}  {mutation.kind}", flush=True)
    print(
        f"    - {row['before']}\n    + {row['after']}\n    {row['by']}, {row['seconds']} s",
        flush=True,
    )
    return row


def changed_lines(before: bytes, after: bytes) -> tuple[str, str]:
    """The lines that are not the same, joined."""
    old, new = before.decode().splitlines(), after.decode().splitlines()
    first = next(i for i, pair in enumerate(zip(old, new, strict=False)) if pair[0] != pair[1])
    end = next(
        i
        for i, pair in enumerate(zip(reversed(old), reversed(new), strict=False))
        if pair[0] != pair[1]
    )
    return tuple(
        " ".join(x.strip() for x in lines[first : len(lines) - end]) for lines in (old, new)
    )  # pyright: ignore


def passes(place: Path, limit: int) -> dict[str, Any]:
    """`result`, by which test, and how long it took."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *TESTS]
    environment = os.environ | {"HYPOTHESIS_PROFILE": "catch", "PYTHONDONTWRITEBYTECODE": "1"}
    if source := os.environ.get(
        "SPECFORGE_SRC"
    ):  # the tests run in the copy, where a relative path leads nowhere
        environment["SPECFORGE_SRC"] = str(Path(source).absolute())
    begun = time.perf_counter()
    done = subprocess.run(
        ["bash", "-c", f'ulimit -t {limit}; exec "$@"', "bash", *command],
        cwd=place, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    by = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    result = "caught" if done.returncode else "survived"
    told = (
        [*by, f"exit code {done.returncode}: {done.stdout[-200:]}"][0]
        if done.returncode
        else "no test"
    )
    return {"result": result, "by": told, "seconds": round(time.perf_counter() - begun, 1)}


if __name__ == "__main__":
    sys.exit(main())

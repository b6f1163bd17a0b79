"""Compare two runs' `metrics.jsonl`, step by step and by exact value, and name the first step where they part.

    python scripts/compare_runs.py OLD NEW

OLD and NEW are such files, or folders that hold one. Printed for each step, the old run's first: the loss, the first
unroll step's accuracy and acceptance rate, the gradient norm. Compared are these, and of all unroll steps.
Exit code 0: equal at every step; 1: a step differs, or one run is shorter; 2: a file that cannot be compared.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

from eagle3fn.base.errors import UserError
from eagle3fn.base.files import read_jsonl

NUMBERS, LISTS = ("loss", "grad_norm"), ("accuracy", "acceptance")
COLUMNS = ("loss", "accuracy", "acceptance", "grad_norm")


class Difference(NamedTuple):
    """Where two runs part."""

    step: int
    name: str  # as in "acceptance[3]"; "" where one run has no such step
    old: float | None
    new: float | None

    def __str__(self) -> str:
        """One line."""
        if not self.name:
            return f"first unequal step: {self.step}, which the {'old' if self.old is None else 'new'} run does not have"
        return f"first unequal step: {self.step}, {self.name} {self.old!r} against {self.new!r}"


def read_run(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`, or of the one in a folder, checked.

    Raises:
        UserError: missing, empty, cut off, a field missing, a value that is no finite number, or steps out of order.
    """
    path = Path(path)
    path = path / "metrics.jsonl" if path.is_dir() else path
    rows = read_jsonl(path)
    if not rows:
        raise UserError(f"{path}: no rows; name the metrics of a finished run")
    for number, row in enumerate(rows, 1):
        _check(row, number, f"{path}:{number}")
    return rows


def _check(row: Any, step: int, where: str) -> None:
    if not isinstance(row, dict) or row.get("step") != step:
        found = row.get("step") if isinstance(row, dict) else row
        raise UserError(
            f"{where}: step {found!r}: must be {step}, rows are numbered from 1; name a whole run's metrics"
        )
    for name in COLUMNS:
        values = row.get(name)
        if (name in LISTS) != isinstance(values, list) or values in (None, []):
            raise UserError(
                f"{where}: {name} is {values!r:.40}: must be a {'list' if name in LISTS else 'number'}"
            )
        for value in values if isinstance(values, list) else [values]:
            if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:
                raise UserError(
                    f"{where}: {name} holds {value!r:.40}, which cannot be compared; look into that run"
                )


def values_of(row: dict[str, Any]) -> dict[str, float]:
    """Everything that is compared of a row, by name."""
    lists = {f"{name}[{i}]": value for name in LISTS for i, value in enumerate(row[name])}
    return {name: row[name] for name in NUMBERS} | lists


def first_difference(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> Difference | None:
    """The first step and value that differ; None if all are equal."""
    for left, right in zip(old, new, strict=False):
        a, b = values_of(left), values_of(right)
        for name in dict.fromkeys([*a, *b]):
            if a.get(name) != b.get(name):
                return Difference(left["step"], name, a.get(name), b.get(name))
    if len(old) == len(new):
        return None
    step = min(len(old), len(new)) + 1
    return Difference(step, "", *((1.0, None) if len(old) > len(new) else (None, 1.0)))


def table(old: list[dict[str, Any]], new: list[dict[str, Any]], steps: list[int]) -> str:
    """Markdown: the steps that both have, or those of `steps`, both sides of every value."""
    head = ["step", *(f"{side} {name}" for name in COLUMNS for side in ("old", "new"))]
    lines = [head, ["---"] * len(head)]
    for left, right in zip(old, new, strict=False):
        if not steps or left["step"] in steps:
            lines.append(
                [
                    str(left["step"]),
                    *(_shown(row[name]) for name in COLUMNS for row in (left, right)),
                ]
            )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _shown(value: Any) -> str:
    return f"{value[0] if isinstance(value, list) else value:.8g}"


def main(arguments: list[str] | None = None) -> int:
    """Print the table and the first difference; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", help="metrics.jsonl of the one run, or its folder")
    parser.add_argument("new", help="of the other")
    parser.add_argument(
        "--steps", type=int, nargs="+", default=[], help="print these alone; all are compared"
    )
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args(arguments)
    try:
        old, new = read_run(options.old), read_run(options.new)
    except UserError as error:
        print(f"compare_runs: {error}", file=sys.stderr)
        return 2
    found = first_difference(old, new)
    print(table(old, new, options.steps))
    print(found or f"equal at every step: {len(old)} of {len(old)}")
    if options.json:
        first = found and found._asdict()
        print(
            json.dumps(
                {"steps": [len(old), len(new)], "equal": found is None, "first_difference": first}
            )
        )
    return 0 if found is None else 1


if __name__ == "__main__":
    sys.exit(main())

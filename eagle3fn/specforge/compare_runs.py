"""Compare two runs' `metrics.jsonl` by exact value, and name the first step that differs.

    python scripts/compare_runs.py LEFT RIGHT

LEFT and RIGHT are such files, or folders that hold one. The output calls them old and new.

For each step, both runs' loss, accuracy and acceptance rate of the first unroll step, and gradient
norm are printed. These are compared, and accuracy and acceptance rate of all other unroll steps.

Exit code 0: equal at every step. 1: a step differs, or one run is shorter. 2: a file that cannot be
compared.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

from eagle3fn.base.errors import UserError
from eagle3fn.base.read import read_jsonl

NUMBERS = ("loss", "grad_norm")
"""Fields of a row that are a number."""

LISTS = ("accuracy", "acceptance")
"""Fields of a row that have a number for each unroll step."""

COLUMNS = ("loss", "accuracy", "acceptance", "grad_norm")
"""All of them, in the order in which they are checked and printed."""


class Difference(NamedTuple):
    """The first value that two runs do not share."""

    step: int
    name: str  # as in "acceptance[3]"; "" where one run has no such step
    old: float | None  # None: not there
    new: float | None

    def __str__(self) -> str:
        """One line."""
        where = f"first unequal step: {self.step}"
        if self.name:
            return f"{where}, {self.name} {self.old!r} against {self.new!r}"
        missing = "old" if self.old is None else "new"
        return f"{where}, which the {missing} run does not have"


def read_run(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`, or of the one in a folder, checked.

    Raises:
        UserError: missing, empty, cut off, a field missing, a value that is no finite number, or
            steps out of order.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "metrics.jsonl"

    rows = read_jsonl(path)
    if not rows:
        raise UserError(f"{path}: no rows; name the metrics of a finished run")
    for number, row in enumerate(rows, 1):
        _check(row, number, f"{path}:{number}")
    return rows


def _check(row: Any, step: int, where: str) -> None:
    """Refuse a row that is not the metrics of `step`."""
    found = row.get("step") if isinstance(row, dict) else row
    if not isinstance(row, dict) or found != step:
        raise UserError(
            f"{where}: step {found!r}: must be {step}, rows are numbered from 1; "
            "name a whole run's metrics"
        )

    for name in COLUMNS:
        value = row.get(name)
        is_list = isinstance(value, list)
        if is_list != (name in LISTS) or value is None or value == []:
            kind = "list" if name in LISTS else "number"
            raise UserError(f"{where}: {name} is {value!r:.40}: must be a {kind}")

        for number in value if is_list else [value]:
            if type(number) not in (int, float) or not abs(number) <= sys.float_info.max:
                raise UserError(
                    f"{where}: {name} holds {number!r:.40}, which cannot be compared; "
                    "look into that run"
                )


def values_of(row: dict[str, Any]) -> dict[str, float]:
    """Everything that is compared of a row, by name."""
    values = {name: row[name] for name in NUMBERS}
    for name in LISTS:
        for step, value in enumerate(row[name]):
            values[f"{name}[{step}]"] = value
    return values


def first_difference(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> Difference | None:
    """The first step and value that differ; None if all are equal."""
    for left, right in zip(old, new, strict=False):
        a = values_of(left)
        b = values_of(right)
        for name in dict.fromkeys([*a, *b]):
            if a.get(name) != b.get(name):
                return Difference(left["step"], name, a.get(name), b.get(name))

    # All steps that both have are equal.
    if len(old) > len(new):
        return Difference(len(new) + 1, "", old=1.0, new=None)
    if len(new) > len(old):
        return Difference(len(old) + 1, "", old=None, new=1.0)
    return None


def table(old: list[dict[str, Any]], new: list[dict[str, Any]], steps: list[int]) -> str:
    """Markdown of the steps that both runs have, or of those in `steps`, if any are given."""
    head = ["step"]
    for name in COLUMNS:
        head += [f"old {name}", f"new {name}"]

    lines = [head, ["---"] * len(head)]
    for left, right in zip(old, new, strict=False):
        if steps and left["step"] not in steps:
            continue
        line = [str(left["step"])]
        for name in COLUMNS:
            line += [_shown(left[name]), _shown(right[name])]
        lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _shown(value: Any) -> str:
    """A number, or the first unroll step's."""
    first = value[0] if isinstance(value, list) else value
    return f"{first:.8g}"


def main(arguments: list[str] | None = None) -> int:
    """Print the table and the first difference; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("left", metavar="LEFT", help="metrics.jsonl of one run, or its folder")
    parser.add_argument("right", metavar="RIGHT", help="of the other run")
    parser.add_argument(
        "--steps", type=int, nargs="+", default=[], help="print these alone; all are compared"
    )
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args(arguments)

    try:
        old = read_run(options.left)
        new = read_run(options.right)
    except UserError as error:
        print(f"compare_runs: {error}", file=sys.stderr)
        return 2

    found = first_difference(old, new)
    print(table(old, new, options.steps))
    print(found or f"equal at every step: {len(old)} of {len(old)}")
    if options.json:
        summary = {
            "steps": [len(old), len(new)],
            "equal": found is None,
            "first_difference": found._asdict() if found else None,
        }
        print(json.dumps(summary))
    return 0 if found is None else 1


if __name__ == "__main__":
    sys.exit(main())

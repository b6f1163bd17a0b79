"""What a run records: one JSON line a step, made from the sums of `Aux`."""

import json
import math
import os
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from eagle3fn.base.files import append_line, write_text
from eagle3fn.base.kinds import Check, is_amount, is_count, is_number, is_rates, or_none
from eagle3fn.base.read import Rows, read_rows
from eagle3fn.base.types import Aux

_SHOWN = 3  # lines that a message names


class RowKind(NamedTuple):
    """What a row of a file must hold, and of which kind other values are where they are there."""

    needed: dict[str, Check]
    optional: dict[str, Check]

    def fault(self, row: Any) -> str | None:
        """Why a value is no such row; None if it is one."""
        if not isinstance(row, dict):
            return "no object"
        wrong = [key for key, good in self.needed.items() if key not in row or not good(row[key])]
        wrong += [key for key, good in self.optional.items() if key in row and not good(row[key])]
        if wrong:
            return f"no number under {wrong[0]}"
        positions = {len(row[key]) for key in _BY_POSITION if key in row}
        return f"{' and '.join(_BY_POSITION)} of different lengths" if len(positions) > 1 else None


_BY_POSITION = ("accuracy", "conditional_accuracy")

_RATES: dict[str, Check] = {
    "accuracy": is_rates,
    "conditional_accuracy": is_rates,
    "counted": is_amount,
    "rows": is_count,
}
"""Of `readable`, what a report and advice read."""

STEPS = RowKind(
    {"step": is_count, "tokens": is_count, "seconds": is_amount},
    {
        "loss": or_none(is_number),
        "grad_norm": or_none(is_amount),
        "learning_rate": is_number,
        "accepted_length": or_none(is_amount),
    }
    | _RATES,
)
"""Of `metrics.jsonl`: the row of a skipped update has neither loss nor gradient norm."""

HELD_OUT = RowKind(
    {"step": is_count},
    {"accepted_length": or_none(is_amount), "loss": or_none(is_number)} | _RATES,
)
"""Of `eval.jsonl`: the row of a run that holds no samples out has no accepted length."""


def readable(aux: Aux) -> dict[str, Any]:
    """Rates of a batch's, or several batches', summed metrics; `docs/monitoring.md` names them all.

    By unroll step `i`, the position of a drafted token:

        accuracy[i]              correct_i / rows_i
        conditional_accuracy[i]  the same of rows whose earlier drafted tokens were all right
        counted                  Σ_i known rows / Σ_i trained rows

    `accepted_length` is the greedy simulated one: 1 + accepted draft tokens per trained row. Where
    there is no row a rate is 0.
    """
    rows = aux.rows.clamp_min(1e-6)
    acceptance = aux.accept / aux.accept_rows.clamp_min(1e-8)
    first = max(int(aux.rows[0]), 1)
    return {
        "losses": aux.losses.tolist(),
        "accuracy": (aux.correct / rows).tolist(),
        "conditional_accuracy": (aux.chain_correct / aux.chain_rows.clamp_min(1)).tolist(),
        "acceptance": acceptance.tolist(),
        "accepted_length": 1 + float(aux.greedy) / first,
        "accepted_length_sampled": 1 + float(aux.sampled) / first,
        "rows": int(aux.rows[0]),
        "counted": counted_share(aux),
    }


def counted_share(aux: Aux) -> float:
    """The share of trained rows that the loss counts: those whose label's token is in the draft
    vocabulary; 0 where no row is trained.
    """
    return float(aux.accept_rows.sum()) / max(int(aux.rows.sum()), 1)


def metrics_row(
    step: int, metrics: dict[str, Any], seconds: float, skipped: int = 0
) -> dict[str, Any]:
    """One line of `metrics.jsonl`: deterministic values first, then `seconds`, which are the
    machine's.

    On a device the seconds include what the next batch took to read. `skipped` counts the updates
    dropped so far; this step's own, if it is one, has neither loss nor rates.
    """
    row: dict[str, Any] = {"step": step, "loss": None, "grad_norm": None, "learning_rate": 0.0}
    if not metrics["skipped"]:
        row |= {name: float(metrics[name]) for name in ("loss", "grad_norm", "learning_rate")}
        row |= readable(metrics["aux"])
    tokens = int(metrics["tokens"])
    return row | {"tokens": tokens, "skipped": skipped, "seconds": round(seconds, 4)}


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Append one JSON line; a number that is not finite, which JSON has not, is null there."""
    append_line(path, json.dumps(_with_nulls(row), allow_nan=False))


def _with_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _with_nulls(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_with_nulls(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def cut_rows(path: Path, step: int, kind: RowKind) -> str:
    """Keep the rows up to `step`, in the order of their steps: a resumed run writes the others
    again. The file is made if it is not there.

    Of two rows of a step the first is kept. Damaged lines are said, the last one too: it may be a
    row that was not written to its end, or one that was changed.

    Args:
        path: of `metrics.jsonl` or `eval.jsonl`.
        step: the last one kept; -1 keeps none.
        kind: of the rows; of `STEPS` there must be one for each step from 1 on.

    Returns:
        What was left out or is lost, in one line; "" if nothing is.

    Raises:
        UserError: `path` is no regular file, or cannot be written.
    """
    seen: set[int] = set()
    rows = Rows([], [])
    if os.path.lexists(path):
        rows = read_rows(path, partial(_fault, kind, seen))
    kept = sorted((row for row in rows.good if row["step"] <= step), key=lambda row: row["step"])
    write_text(path, "".join(json.dumps(row) + "\n" for row in kept))

    if step < 0:
        lines = len(rows.good) + len(rows.bad)
        return (
            f"{path}: begun again without its {lines} rows, no checkpoint is there" if lines else ""
        )

    # What is damaged, and what is missing.
    faults = [f"line {number} ({reason})" for number, reason in rows.bad]
    said = []
    if faults:
        more = f" and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        said.append(f"{', '.join(faults[:_SHOWN])}{more} left out")
    lost = sorted({*range(1, step + 1)} - seen) if kind is STEPS else []
    if lost:
        said.append(f"{len(lost)} rows are lost, of step {lost[0]} first")
    elif not kept:
        said.append(f"no row up to step {step} is there")
    if said and kept:
        said.append("all others are kept")
    return f"{path}: {'; '.join(said)}" if said else ""


def _fault(kind: RowKind, seen: set[int], row: Any) -> str | None:
    """Why a value is no row; the steps of rows are added to `seen`."""
    reason = kind.fault(row)
    if reason is None and row["step"] in seen:
        reason = f"step {row['step']} once more"
    if reason is None:
        seen.add(row["step"])
    return reason

"""What a run records: one JSON line a step, made from the sums of `Aux`."""

import json
from pathlib import Path
from typing import Any

import torch

from eagle3fn.base.files import write_text
from eagle3fn.base.types import Aux


def readable(aux: Aux) -> dict[str, Any]:
    """Rates of a batch's, or several batches', summed metrics.

    `accepted_length` is the greedy simulated one: 1 + accepted draft tokens per trained row.
    """
    rows = aux.rows.clamp_min(1e-6)
    acceptance = aux.accept / aux.accept_rows.clamp_min(1e-8)
    first = max(int(aux.rows[0]), 1)
    return {
        "losses": aux.losses.tolist(),
        "accuracy": (aux.correct / rows).tolist(),
        "acceptance": acceptance.tolist(),
        "accepted_length": 1 + float(aux.greedy) / first,
        "accepted_length_sampled": 1 + float(aux.sampled) / first,
        "rows": int(aux.rows[0]),
    }


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


def nonfinite(metrics: dict[str, Any]) -> bool:
    """True if the loss or the gradient norm is not a finite number."""
    return not bool(torch.isfinite(metrics["loss"]) & torch.isfinite(metrics["grad_norm"]))


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Append one JSON line and flush it."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def cut_rows(path: Path, step: int) -> None:
    """Drop the lines after `step`, and a line half written: a resumed run writes them again."""
    if not path.exists():
        return

    kept = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        if not isinstance(row, dict) or row.get("step", step + 1) > step:
            break
        kept += line + "\n"
    write_text(path, kept)

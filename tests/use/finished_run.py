"""The files of a finished run that a report reads."""

import json
from pathlib import Path
from typing import Any

STEP = {"step": 1, "loss": 2.0, "tokens": 30, "seconds": 0.5}
FILES: dict[str, Any] = {
    "evaluation.json": {
        "draft_length": 5,
        "accepted_length": 1.5,
        "acceptance_by_position": [0.5, 0.25],
    },
    "features/index.json": {"totals": {"supervised": 40}},
    "train/metrics.jsonl": [STEP],
    "train/eval.jsonl": [{"step": 1, "accepted_length": 1.25}],
}


def write_run(folder: Path, files: dict[str, Any] | None = None) -> None:
    """A finished run; `files` are added or take the place of those above."""
    for name, value in {**FILES, **(files or {})}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(value)
        if path.suffix == ".jsonl":
            text = "".join(json.dumps(row) + "\n" for row in value)
        path.write_text(text)

"""What a training run publishes: progress, held-out lines, and the best draft as an exported folder."""

import shlex
import sys
from pathlib import Path
from typing import Any

import torch

from eagle3fn.base import progress
from eagle3fn.base.config import Config
from eagle3fn.base.errors import UserError
from eagle3fn.base.files import read_json
from eagle3fn.base.types import Frozen, Params
from eagle3fn.train.loop import Events
from eagle3fn.use.export import export


def check_published(out: str | Path, step: int, ranks: int) -> str:
    """What to say of a run that returned at `step`: where its draft is, or how to go on.

    Raises:
        UserError: it has ended, but its draft is gone.
    """
    out, total = Path(out), read_json(Path(out) / "horizon.json")["steps"]
    if step < total:
        start = f"torchrun --nproc-per-node {ranks} -m eagle3fn.cli" if ranks > 1 else "eagle3fn"
        return f"stopped by SIGTERM, step {step} of {total} is saved; resume with {start} {shlex.join(sys.argv[1:])}"
    if not (out / "draft").is_dir():
        raise UserError(
            f"{out}/draft: gone since the run ended at step {step}; train into another folder"
        )
    return f"{out}/draft: the best draft of {total} steps"


def run_events(out: str | Path, config: Config, target_layers: int) -> Events:
    """Events that export `out/untrained` before the first step and `out/draft` whenever the held-out length grows.

    `target_layers` is the target's number of decoder layers. Every RoPE variant is exported.
    """
    show, dtype = progress.bar("step"), getattr(torch, config.train.dtype)

    def on_best(params: Params, frozen: Frozen, row: dict[str, Any]) -> None:
        folder = Path(out) / ("draft" if row["step"] else "untrained")
        export(params, frozen, config.draft, folder, target_layers, dtype, any_rope=True)

    def on_eval(row: dict[str, Any]) -> None:
        if "accepted_length" in row:
            length, rate = row["accepted_length"], row["accuracy"][0]
            print(
                f"\nstep {row['step']}: held-out accepted length {length:.3f}, first-step accuracy {rate:.3f}"
            )

    return Events(lambda row, total: show(row["step"], total), on_eval, on_best)

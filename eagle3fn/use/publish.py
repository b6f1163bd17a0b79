"""What a training run publishes: progress, held-out lines, and the best draft as an exported folder."""

from pathlib import Path
from typing import Any

import torch

from eagle3fn.base import progress
from eagle3fn.base.config import Config
from eagle3fn.base.types import Frozen, Params
from eagle3fn.train.loop import Events
from eagle3fn.use.export import export


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
            print(f"\nstep {row['step']}: held-out accepted length {length:.3f}, first-step accuracy {rate:.3f}")

    return Events(lambda row, total: show(row["step"], total), on_eval, on_best)

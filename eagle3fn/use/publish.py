"""What a training run shows and publishes: progress, held-out results, drafts exported."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from eagle3fn.base import progress
from eagle3fn.base.config import Config
from eagle3fn.base.errors import UserError, printable
from eagle3fn.base.places import check_own_folder
from eagle3fn.base.program import called_as
from eagle3fn.base.sections import STARTS
from eagle3fn.base.signals import name_of, received
from eagle3fn.base.temporary import clear
from eagle3fn.base.types import Frozen, Params
from eagle3fn.train.branch import read_branch
from eagle3fn.train.events import End, Events
from eagle3fn.use.advising import with_advice
from eagle3fn.use.export import check_out_draft, export
from eagle3fn.use.model_card import Facts


def check_published(out: str | Path, end: End, ranks: int, arguments: Sequence[str]) -> str:
    """The line to print after a run: where its draft is, or how to resume.

    Args:
        out: the run's folder.
        end: how the training ended.
        ranks: processes that trained.
        arguments: those of the command that started the run, such as `["train", "--target", …]`.

    Raises:
        UserError: the run has ended, but its draft is gone.
    """
    out = Path(out)
    if not end.finished:
        number = received()
        by = f" by {name_of(number)}" if number else ""
        return (
            f"stopped{by}, step {end.step} of {end.total} is saved; "
            f"resume with {called_as(arguments, ranks)}"
        )

    _check_draft(out, end.step)
    if not end.compared:
        return (
            f"{out}/draft: the draft after {end.step} steps; no sample was held out "
            "(data.held_out = 0), so it was compared with no other"
        )
    return f"{out}/draft: the best draft of {end.step} steps, by held-out accepted length"


def _check_draft(out: Path, step: int) -> None:
    """Refuse a run whose draft is gone: the parameters of the best one are nowhere else."""
    clear(out / "draft")  # a kill while it was replaced: the one before comes back
    if not (out / "draft").is_dir():
        raise UserError(
            f"{out}/draft: gone, and the run's draft up to step {step} with it; put it back, or go "
            f"on in a new folder with --from {out} --out NEW"
        )


def _origin(out: str | Path) -> str:
    """Where a run went on from and what was changed then, in one line; "" if it began itself."""
    branch = read_branch(out)
    if branch is None:
        return ""
    line = "; ".join([f"step {branch.step} of the run {branch.run}", *branch.changes])
    return printable(line, 2000).replace("|", "/")


def run_events(
    out: str | Path,
    config: Config,
    target_layers: int,
    facts: Facts = Facts(),  # noqa: B008
) -> Events:
    """Events that show progress, print held-out results and advice, and export drafts.

    `out/untrained` is exported before the first step, `out/draft` whenever the held-out accepted
    length grows, or without held-out samples at every evaluation. `target_layers` is the target's
    number of decoder layers, `facts` what the drafts' cards say of target and data. Every RoPE
    variant is exported.

    Raises:
        UserError: one of the two folders is there, and no draft that was exported here, or is a
            link; as `on_ready`, the run's best draft is gone.
    """
    for name in ("draft", "untrained"):
        check_own_folder(Path(out) / name)
        check_out_draft(Path(out) / name)
    show = progress.bar("step", log=True)
    dtype = getattr(torch, config.train.dtype)

    def on_ready(end: End, best: float) -> None:
        # Without held-out samples the next evaluation makes a draft, if there is one.
        if best > 0 or end.finished:
            _check_draft(Path(out), end.step)

    def on_step(row: dict[str, Any], total: int) -> None:
        loss = row["loss"]
        loss = "no loss, the update was dropped" if loss is None else f"loss {loss:.4f}"
        show(row["step"], total, f"{loss}, learning rate {row['learning_rate']:.3g}")

    def on_eval(row: dict[str, Any]) -> None:
        # A run that holds no samples out has no accepted length.
        if "accepted_length" in row:
            progress.say(
                f"step {row['step']}: held-out accepted length {row['accepted_length']:.3f}, "
                f"first-step accuracy {row['accuracy'][0]:.3f}"
            )

    def on_draft(params: Params, frozen: Frozen, row: dict[str, Any]) -> None:
        folder = Path(out) / ("draft" if row["step"] else "untrained")
        length = row.get("accepted_length")
        if length is not None and not math.isfinite(length):
            length = None
        now = facts._replace(
            steps=row["step"],
            accepted_length=length,
            origin=_origin(out),
            unroll=config.objective.ttt_length,
        )
        export(params, frozen, config.draft, folder, target_layers, dtype, True, now)

    events = Events(on_ready=on_ready, on_step=on_step, on_eval=on_eval, on_draft=on_draft)
    return with_advice(events, out, warm=config.train.init not in STARTS)

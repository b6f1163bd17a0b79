"""What a training has come to, as the values that `--json` prints."""

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eagle3fn.train.events import End


def training_values(out: str | Path, end: "End") -> dict[str, Any]:
    """How a run stands: its updates, why it ended, its draft and that one's accepted length.

    `ended` is `steps` (all are made), `patience` (`train.patience` ended it) or `stopped` (a later
    call goes on), then with the signal's name as `signal`, if one came.
    """
    from eagle3fn.base.errors import UserError
    from eagle3fn.base.signals import name_of, received
    from eagle3fn.use.report_files import read_held_out

    why = "stopped"
    if end.finished:
        why = "patience" if end.early else "steps"
    number = received()

    # The best draft's accepted length; step 0 is the untrained draft's.
    held_out = Path(out) / "eval.jsonl"
    lengths = []
    with suppress(UserError):  # the training is done, whatever happens to its rows
        rows = read_held_out(held_out) if held_out.exists() else []
        lengths = [row.get("accepted_length") for row in rows if row["step"] > 0]

    draft = Path(out) / "draft"
    return {
        "out": out,
        "step": end.step,
        "total": end.total,
        "ended": why,
        "signal": name_of(number) if number else None,
        "draft": draft if draft.is_dir() else None,
        "held_out_accepted_length": max(filter(None, lengths), default=None),
    }

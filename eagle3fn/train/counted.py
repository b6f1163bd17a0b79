"""Rows that the loss counts: those whose label's token is in the draft vocabulary.

A label is the target's distribution, and its token the most likely one. Where that is not in the
map, as with the map of another target or of answers that it did not write, a row adds nothing to
the loss. A run whose loss counts none would train nothing, and is refused.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from eagle3fn.base.config import Config
from eagle3fn.base.errors import UserError
from eagle3fn.base.types import Frozen
from eagle3fn.data.collate import AlignMask, collate
from eagle3fn.data.features import FeatureSet, read_sample
from eagle3fn.train.track import counted_share

MOST_UNCOUNTED = 20
"""Updates in a row that count no row end a run, or as many as it has."""

REMEDY = (
    "make the map anew by eagle3fn vocab, with a greater --size, from features of answers that "
    "this target wrote (eagle3fn synthesize)"
)

_SAMPLES = 100  # looked at before the first update, until one label counts
_LABELS = 16  # of each: a product with the target's head is dear where its vocabulary is large


def check_first_labels(
    config: Config,
    frozen: Frozen,
    features: FeatureSet,
    numbers: list[int],
    align_mask: AlignMask,
) -> None:
    """Refuse samples of which no label counts, before the first update.

    Reads samples until one label counts, as a rule one sample.

    Raises:
        UserError: none of the first labels of the first samples.
    """
    looked_at = 0
    for number in numbers[:_SAMPLES]:
        batch = collate([read_sample(features, number)], config, align_mask)
        labels = batch.label_hidden[0][batch.row_mask[0, 0] > 0][:_LABELS]
        looked_at += len(labels)
        if _known(labels, frozen).any():
            return
    if looked_at:
        raise UserError(
            f"{features.folder}: of the first {looked_at} labels none has its most likely token in "
            f"the draft vocabulary, so the loss would count no row; {REMEDY}"
        )


def _known(labels: Tensor, frozen: Frozen) -> Tensor:
    """Whether each label's token is in the draft vocabulary: `(P,)` bool of `(P, Ht)`."""
    head = frozen.target_head
    return frozen.t2d[F.linear(labels.to(head.device, head.dtype), head).argmax(-1)]


def uncounted_after(uncounted: int, metrics: dict[str, Any]) -> int:
    """How many updates in a row counted no row, after one more; one without a trained row says
    nothing, and leaves the number as it is.
    """
    aux = metrics["aux"]
    if not aux.rows.any():
        return uncounted
    return 0 if counted_share(aux) else uncounted + 1


def check_uncounted(config: Config, number: int, uncounted: int) -> None:
    """End a run whose updates count no row, one after the other.

    Raises:
        UserError: `MOST_UNCOUNTED` of them, or as many as the run has.
    """
    if uncounted >= min(MOST_UNCOUNTED, config.train.steps):
        raise UserError(
            f"step {number}: the loss of the last {uncounted} updates counted no row, as their "
            f"labels' most likely tokens are not in the draft vocabulary; {REMEDY}"
        )


def check_counted_held_out(row: dict[str, Any]) -> None:
    """Refuse held-out samples of which no row counts: every draft would have the same value.

    `row` is that of an evaluation; without held-out samples it has no counts.

    Raises:
        UserError: names the remedy.
    """
    if row.get("counted") == 0 and row.get("rows"):
        raise UserError(
            f"step {row['step']}: none of the {row['rows']} held-out rows has its label's most "
            f"likely token in the draft vocabulary, so no draft can be judged; {REMEDY}"
        )

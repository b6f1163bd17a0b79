"""Samples to a batch: cut, padded or packed, and aligned once for every unroll step."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from eagle3fn.base.config import Config
from eagle3fn.base.rows import over_steps, plan_rows, shift, trained_row_counts
from eagle3fn.base.types import Batch, Sample

AlignMask = Callable[[Tensor], Tensor]
"""As `align_mask`: a sample's token mask `(S,)` → its row mask `(S,)`."""


def align_mask(token_mask: Tensor) -> Tensor:
    """Rows to train, `(S,)`, from the mask of assistant tokens, `(S,)`: those that a server drafts
    from.

    Row `t` is trained where tokens `t + 1` (the newest one when drafting) and `t + 2` (the label)
    are both the assistant's: `row_mask[t] = token_mask[t + 1] · token_mask[t + 2]`, zero past the
    end.
    """
    newest = shift(token_mask)
    label = shift(newest)
    return newest * label


def cut(sample: Sample, max_length: int) -> Sample:
    """The first `max_length` tokens of a sample."""
    return Sample(*(field[:max_length] for field in sample))


def collate(
    samples: Sequence[Sample],
    config: Config,
    align_mask: AlignMask = align_mask,
    survives: Sequence[Tensor] | None = None,
) -> Batch:
    """Samples as one batch: cut, padded on the right with zeros, and aligned for every unroll step.

    All that is shifted is shifted here (see `Batch`). Its `row_counts` are left to `data.stages`,
    as they are of the whole global batch.

    Args:
        samples: `B` of them, at least one.
        config: `data.max_length` and `objective.ttt_length` are read.
        align_mask: a sample's token mask → its rows that are trained at step 0.
        survives: for each sample at how many unroll steps its rows take part, `(S,)` int64, as
            `data.survival.draw_survival` draws them; None: at all.
    """
    short = [cut(sample, config.data.max_length) for sample in samples]
    batch = align(
        input_ids=_pad([sample.input_ids for sample in short]),
        attention_mask=_pad([torch.ones_like(sample.input_ids) for sample in short]),
        row_mask=_pad([align_mask(sample.token_mask) for sample in short]),
        aux_hidden=_pad([sample.aux_hidden for sample in short]),
        last_hidden=_pad([sample.last_hidden for sample in short]),
        k=config.objective.ttt_length,
    )
    if survives is not None:
        short_lists = [steps[: config.data.max_length] for steps in survives]
        batch = batch._replace(survives=_pad(short_lists))
    return batch._replace(plan=plan_rows(batch.row_mask, batch.survives))


class FeatureKind(NamedTuple):
    """Widths and dtype of samples' features."""

    aux_width: int  # A·Ht
    last_width: int  # Ht
    dtype: torch.dtype


def collate_packed(
    samples: Sequence[Sample],
    config: Config,
    align_mask: AlignMask = align_mask,
    survives: Sequence[Tensor] | None = None,
    like: FeatureKind | tuple[int, int, torch.dtype] | None = None,
) -> Batch:
    """Samples as one packed row, `B = 1`: cut, and laid one after another without padding.

    Each is aligned for itself before they are joined: labels, trained rows and positions are those
    of the samples alone, and `starts` keeps attention apart. `next_ids` alone are the row's tokens
    shifted: near its sample's end a row reads tokens of the next one, at steps at which it has no
    label.

    Args:
        samples: any number; without one the batch has one place that is not a token, and trains no
            row: for a rank that has nothing left to do.
        config: as in `collate`.
        align_mask: as in `collate`.
        survives: as in `collate`.
        like: what the features of no samples are like; needed there alone.
    """
    k = config.objective.ttt_length
    if not samples:
        assert like is not None, "without samples: name the features' widths and dtype"
        return _no_row(FeatureKind(*like), k)

    short = [cut(sample, config.data.max_length) for sample in samples]
    lengths = torch.tensor([len(sample.input_ids) for sample in short])
    start = lengths.cumsum(0) - lengths
    starts = start.repeat_interleave(lengths)  # (S,)
    tokens = torch.cat([sample.input_ids for sample in short])
    row_masks = [over_steps(align_mask(sample.token_mask), k) for sample in short]
    labels = [shift(sample.last_hidden, dim=0) for sample in short]

    batch = Batch(
        next_ids=F.pad(tokens, (0, k))[None, 1:],
        attention_mask=torch.ones_like(tokens)[None],
        row_mask=torch.cat(row_masks, dim=-1)[None],
        aux_hidden=torch.cat([sample.aux_hidden for sample in short])[None],
        label_hidden=torch.cat(labels)[None],
        position_ids=(torch.arange(len(tokens)) - starts)[None],
        starts=starts[None],
    )
    if survives is not None:
        short_lists = [steps[: config.data.max_length] for steps in survives]
        batch = batch._replace(survives=torch.cat(short_lists)[None])
    return batch._replace(plan=plan_rows(batch.row_mask, batch.survives, batch.starts))


def _no_row(like: FeatureKind, k: int) -> Batch:
    """A packed row of one place that is not a token, and is not trained."""
    place = torch.zeros(1, 1, dtype=torch.int64)
    row_mask = place.new_zeros(1, k, 1)
    return Batch(
        next_ids=place.new_zeros(1, k),
        attention_mask=place,
        row_mask=row_mask,
        aux_hidden=torch.zeros(1, 1, like.aux_width, dtype=like.dtype),
        label_hidden=torch.zeros(1, 1, like.last_width, dtype=like.dtype),
        position_ids=place,
        starts=place,
        plan=plan_rows(row_mask, None, place),
    )


def align(
    input_ids: Tensor,
    attention_mask: Tensor,
    row_mask: Tensor,
    aux_hidden: Tensor,
    last_hidden: Tensor,
    k: int,
    position_ids: Tensor | None = None,
) -> Batch:
    """A batch of padded tensors, each shifted to the row that reads it.

    Args:
        input_ids: `(B, S)` int64.
        attention_mask: `(B, S)` int64, 1 on real tokens.
        row_mask: `(B, S)` int64, 1 where the row is trained at step 0 (`align_mask`).
        aux_hidden: `(B, S, A·Ht)`.
        last_hidden: `(B, S, Ht)`, at the tokens whose last hidden states they are.
        k: unroll steps `K`.
        position_ids: `(B, S)` int64 in `[0, S)`; absent: `0 … S - 1`.
    """
    return Batch(
        next_ids=F.pad(input_ids, (0, k))[:, 1:],
        attention_mask=attention_mask,
        row_mask=over_steps(row_mask, k),
        aux_hidden=aux_hidden,
        label_hidden=shift(last_hidden, dim=1),
        position_ids=position_ids,
    )


def _pad(rows: list[Tensor]) -> Tensor:
    # One alone is not copied: of a stored sample it is the mapped file.
    return rows[0].contiguous()[None] if len(rows) == 1 else pad_sequence(rows, batch_first=True)


def global_row_counts(batches: Sequence[Batch]) -> Tensor:
    """Rows trained at each unroll step by all micro-batches of a global batch together: `(K,)`
    fp32, at least 1.
    """
    return trained_row_counts([batch.row_mask for batch in batches])

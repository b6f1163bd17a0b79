"""Samples to a batch: cut, align the mask, pad on the right, count the rows trained at each unroll
step.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from eagle3fn.base.rows import shift, trained_row_counts
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
    samples: Sequence[Sample], max_length: int, align_mask: AlignMask = align_mask
) -> Batch:
    """Cut each sample, align its mask, then pad all to the longest with zeros on the right."""
    short = [cut(sample, max_length) for sample in samples]
    return Batch(
        input_ids=_pad([sample.input_ids for sample in short]),
        attention_mask=_pad([torch.ones_like(sample.input_ids) for sample in short]),
        row_mask=_pad([align_mask(sample.token_mask) for sample in short]),
        aux_hidden=_pad([sample.aux_hidden for sample in short]),
        last_hidden=_pad([sample.last_hidden for sample in short]),
    )


def _pad(rows: list[Tensor]) -> Tensor:
    return pad_sequence(rows, batch_first=True)


def global_row_counts(batches: Sequence[Batch], steps: int) -> Tensor:
    """Rows trained at each unroll step by all micro-batches of a global batch together: `(K,)`
    fp32, at least 1.
    """
    return trained_row_counts([batch.row_mask for batch in batches], steps)

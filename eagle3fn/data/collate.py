"""Samples to a batch: cut, align the mask, pad on the right, count the rows trained at each unroll step."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from eagle3fn.base.errors import UserError
from eagle3fn.base.rows import shift, step_rows
from eagle3fn.base.types import Batch, Sample


def align_mask(mask: Tensor, mode: str) -> Tensor:
    """Rows to train, `(S,)`, from the mask of assistant tokens, `(S,)`.

    "legacy": the mask with its last entry zeroed, as the older trainer does. "serving": row `t` where tokens
    `t + 1` (the newest when drafting) and `t + 2` (the label) are both the assistant's.

    Raises:
        UserError: an unknown mode.
    """
    if mode == "legacy":
        return torch.cat([mask[:-1], torch.zeros_like(mask[-1:])])
    if mode == "serving":
        return shift(mask) * shift(shift(mask))
    raise UserError(f"data.mask_alignment = {mode!r}: must be 'serving' or 'legacy'")


def cut(sample: Sample, max_length: int) -> Sample:
    """The first `max_length` tokens of a sample."""
    return Sample(*(field[:max_length] for field in sample))


def collate(samples: Sequence[Sample], mode: str, max_length: int) -> Batch:
    """Cut each sample, align its mask, then pad all to the longest with zeros on the right."""
    short = [cut(sample, max_length) for sample in samples]
    return Batch(
        input_ids=_pad([sample.input_ids for sample in short]),
        attention_mask=_pad([torch.ones_like(sample.input_ids) for sample in short]),
        row_mask=_pad([align_mask(sample.token_mask, mode) for sample in short]),
        aux_hidden=_pad([sample.aux_hidden for sample in short]),
        last_hidden=_pad([sample.last_hidden for sample in short]),
    )


def _pad(rows: list[Tensor]) -> Tensor:
    return pad_sequence(rows, batch_first=True)


def global_row_counts(batches: Sequence[Batch], steps: int) -> Tensor:
    """Rows trained at each unroll step by all micro-batches of a global batch together: `(K,)` fp32, at least 1."""
    return step_rows([batch.row_mask for batch in batches], steps)

"""Rows of a batch over the unroll: which ones a mask trains at each step, and lists of them."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class RowLists(NamedTuple):
    """Places `b·S + t` of a batch, ascending. A place may repeat; the first of them counts."""

    rows: Tensor  # (T,) int64: rows that are trained at some step
    labels: Tensor  # (P,) int64: places whose label some row is trained against


def shift(x: Tensor, dim: int = -1) -> Tensor:
    """Move `x` one place left along `dim`; a zero enters at the end."""
    rest = x.narrow(dim, 1, x.shape[dim] - 1)
    return torch.cat([rest, torch.zeros_like(x.narrow(dim, 0, 1))], dim)


def over_steps(row_mask: Tensor, k: int) -> Tensor:
    """A mask `(…, S)` of step 0's rows at each of `k` unroll steps: `(…, k, S)`.

    Row `t` is trained at step `i` if the label at `t + i` is: entry `(i, t)` is `row_mask[t + i]`,
    0 past the end.
    """
    s = row_mask.shape[-1]
    padded = F.pad(row_mask, (0, k - 1))
    return torch.stack([padded[..., i : i + s] for i in range(k)], dim=-2)


def trained_row_counts(row_masks: Sequence[Tensor]) -> Tensor:
    """Rows trained at each unroll step by row masks `(B, K, S)` together: `(K,)` fp32, at least
    1.
    """
    counts = [mask.sum((0, 2)) for mask in row_masks]
    return torch.stack(counts).sum(0).to(torch.float32).clamp(min=1)


def row_lists(row_mask: Tensor, bucket: int = 16) -> RowLists:
    """The rows and labels of a row mask `(B, K, S)`, as a batch carries them.

    Any other row matters only by its step-0 key and value.
    """
    is_label = torch.zeros_like(row_mask[:, 0])
    for i in range(min(row_mask.shape[1:])):
        is_label[:, i:] += row_mask[:, i, : is_label.shape[1] - i]
    return RowLists(listed(row_mask.sum(1) > 0, bucket), listed(is_label > 0, bucket))


def listed(flags: Tensor, bucket: int) -> Tensor:
    """Places `b·S + t` of `flags` `(B, S)` that are set: `(T,)` int64, ascending.

    Each sample's places are rounded up to a multiple of `bucket` by repeating its last one. If
    none is set, the result is place 0, `bucket` times. The number of places is read on the host.
    """
    parts = []
    for sample, row in enumerate(flags.cpu()):
        places = row.nonzero()[:, 0] + sample * flags.shape[1]
        if len(places):
            repeated = places[-1:].expand(-len(places) % bucket)
            parts.append(torch.cat([places, repeated]))
    if not parts:
        parts = [torch.zeros(bucket, dtype=torch.int64)]
    return torch.cat(parts).to(flags.device)


def first_of_repeats(places: Tensor) -> Tensor:
    """Which of ascending places `(T,)` differ from the one before: `(T,)` bool."""
    return torch.cat([torch.ones_like(places[:1], dtype=torch.bool), places[1:] != places[:-1]])

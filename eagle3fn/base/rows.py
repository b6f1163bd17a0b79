"""Rows of a batch over the unroll: the shift that aligns them, and which ones a mask trains at each
step.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def shift(x: Tensor, dim: int = -1) -> Tensor:
    """Move `x` one place left along `dim`; a zero enters at the end."""
    rest = x.narrow(dim, 1, x.shape[dim] - 1)
    return torch.cat([rest, torch.zeros_like(x.narrow(dim, 0, 1))], dim)


def trained_row_counts(row_masks: Sequence[Tensor], k: int) -> Tensor:
    """Rows trained at each of `k` unroll steps by row masks `(B, S)` together: `(K,)` fp32, at
    least 1.

    At step `i` a row is trained if the label `i` places later is: `count_i = Σ_b Σ_{t ≥ i}
    row_mask[b, t]`.
    """
    counts = [torch.stack([mask[:, step:].sum() for step in range(k)]) for mask in row_masks]
    return torch.stack(counts).sum(0).to(torch.float32).clamp(min=1)


def contributing_rows(row_mask: Tensor, k: int, bucket: int = 16) -> Tensor:
    """Rows `t` with a trained label at `t … t + k - 1`, from a row mask `(B, S)`: `(T,)` int64,
    ascending.

    A row is given as `b·S + t`. Any other row matters only by its step-0 key and value. Each
    sample's rows are rounded up to a multiple of `bucket` by repeating its last one; if no row
    contributes, the result is row 0, `bucket` times. `k = 1` gives the trained rows themselves.
    """
    # A row contributes if its mask, or one of the k - 1 masks after it, is set.
    s = row_mask.shape[1]
    later = [F.pad(row_mask[:, i:], (0, i)) for i in range(min(k, s))]
    contributes = torch.stack(later).sum(0) > 0

    # The number of rows is read on the host.
    parts = []
    for sample, flags in enumerate(contributes.cpu()):
        rows = flags.nonzero()[:, 0] + sample * s
        if len(rows):
            repeated = rows[-1:].expand(-len(rows) % bucket)
            parts.append(torch.cat([rows, repeated]))
    if not parts:
        parts = [torch.zeros(bucket, dtype=torch.int64)]
    return torch.cat(parts).to(row_mask.device)


def first_of_repeats(places: Tensor) -> Tensor:
    """Which of ascending places `(T,)` differ from the one before: `(T,)` bool."""
    return torch.cat([torch.ones_like(places[:1], dtype=torch.bool), places[1:] != places[:-1]])


def both_rows(row_mask: Tensor, k: int) -> dict[str, Tensor]:
    """A batch's `rows` and `labels`: contributing rows, and trained ones."""
    return {"rows": contributing_rows(row_mask, k), "labels": contributing_rows(row_mask, 1)}

"""Rows of a batch over the unroll: the shift that aligns them, and how many a mask trains at each step."""

from collections.abc import Sequence

import torch
from torch import Tensor


def shift(x: Tensor, dim: int = -1) -> Tensor:
    """Move `x` one place left along `dim`; a zero enters at the end."""
    rest = x.narrow(dim, 1, x.shape[dim] - 1)
    return torch.cat([rest, torch.zeros_like(x.narrow(dim, 0, 1))], dim)


def step_rows(masks: Sequence[Tensor], k: int) -> Tensor:
    """Rows trained at each of `k` unroll steps by aligned masks `(B, S)` together: `(K,)` fp32, at least 1."""
    counts = [torch.stack([mask[:, step:].sum() for step in range(k)]) for mask in masks]
    return torch.stack(counts).sum(0).to(torch.float32).clamp(min=1)


def contributing_rows(row_mask: Tensor, k: int, bucket: int = 16) -> Tensor:
    """Rows `t` with a trained label at `t … t + k - 1`, from an aligned mask `(B, S)`: `(T,)` int64, ascending.

    A row is `b·S + t`. Any other row matters only by its step-0 key and value. Each sample's rows are rounded up to
    `bucket` by repeating its last one; if no row contributes, row 0 stands `bucket` times. `k = 1` gives the trained
    rows themselves.
    """
    s = row_mask.shape[1]
    steps = range(min(k, s))
    needed = (
        torch.stack([torch.nn.functional.pad(row_mask[:, i:], (0, i)) for i in steps]).sum(0) > 0
    )
    parts = [
        _fill(row.nonzero()[:, 0] + b * s, bucket)
        for b, row in enumerate(needed.cpu())
        if row.any()
    ]
    return torch.cat(parts or [torch.zeros(bucket, dtype=torch.int64)]).to(row_mask.device)


def both_rows(row_mask: Tensor, k: int) -> dict[str, Tensor]:
    """A batch's `rows` and `labels`: contributing rows, and trained ones."""
    return {"rows": contributing_rows(row_mask, k), "labels": contributing_rows(row_mask, 1)}


def _fill(rows: Tensor, bucket: int) -> Tensor:
    return torch.cat([rows, rows[-1:].expand(-len(rows) % bucket)])

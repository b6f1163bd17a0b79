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


def contributing_rows(loss_mask: Tensor, k: int, bucket: int = 16) -> Tensor:
    """Rows `t` with a trained label at `t … t + k - 1`, from an aligned mask `(B, S)`: `(B, R)` int64, ascending.

    Any other row matters only by its step-0 key and value. `R` is the longest sample's count, rounded up to
    `bucket` and at most `S`; shorter samples repeat their last row (row 0 where there is none).
    """
    s = loss_mask.shape[1]
    needed = torch.stack([torch.nn.functional.pad(loss_mask[:, i:], (0, i)) for i in range(min(k, s))]).sum(0) > 0
    longest = int(needed.sum(1).max())
    size = min(s, -(-max(longest, 1) // bucket) * bucket)
    order = torch.where(needed, torch.arange(s, device=loss_mask.device), s).sort(dim=1).values[:, :size]
    last = torch.where(order < s, order, -1).max(dim=1, keepdim=True).values.clamp(min=0)
    return torch.where(order < s, order, last)

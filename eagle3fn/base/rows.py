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

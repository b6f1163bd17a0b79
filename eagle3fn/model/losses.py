"""Per-step loss and metrics of the unroll (objective, section 6)."""

import torch
from torch import Tensor

from eagle3fn.base.types import Frozen


def kl_loss(logits: Tensor, p: Tensor, mask: Tensor, n: Tensor | None) -> Tensor:
    """Soft-label KL of fp32 `(B, S, D)` logits against `p`, up to the teacher's entropy; fp32 scalar.

    Sum over rows with `mask` `(B, S, 1)` divided by `n`, or by all `B·S` rows without it.
    """
    logp = torch.log_softmax(logits, dim=-1)
    row = -(p * logp).sum(-1) * (mask[..., 0] != 0).to(logp.dtype)
    return row.mean() if n is None else row.sum() / n


@torch.no_grad()
def correct_rows(logits: Tensor, token: Tensor, frozen: Frozen) -> Tensor:
    """Rows whose draft argmax, as a target id, is the target's argmax; `(B, S)` bool."""
    said = logits.argmax(-1)
    return said + frozen.d2t[said] == token


@torch.no_grad()
def acceptance(logits: Tensor, q: Tensor) -> Tensor:
    """Chance that a sampled draft token is accepted, `Σ min(q, softmax(logits))`; `(B, S)` fp32."""
    return torch.minimum(q, torch.softmax(logits, dim=-1)).sum(-1)

"""The target's distributions over the draft vocabulary, from its last hidden states."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from eagle3fn.base.config import ObjectiveConfig
from eagle3fn.base.dtypes import at_least_fp32
from eagle3fn.base.types import Frozen, Teacher


class _TargetLogits(NamedTuple):
    """What the teacher needs of the target's logits `z` `(B, S, V)`."""

    draft: Tensor  # (B, S, D): the logits of the draft vocabulary
    log_sum: Tensor  # (B, S, 1): log Σ_v exp(z_v)
    token: Tensor  # (B, S) int64: argmax, the lowest id of equal ones


@torch.no_grad()
def make_teacher(
    target: Tensor, row_mask: Tensor, frozen: Frozen, objective: ObjectiveConfig
) -> Teacher:
    """Teacher of `target` `(B, S, Ht)` (already shifted) and row mask `(B, S)`; no gradient.

    `p_draft = softmax(z over the draft vocabulary)`, `p_full = softmax(z)` at the same tokens.
    `objective.teacher` "full" makes all `(B, S, V)` logits at once, "compact" streams over them and
    gives the same to rounding.
    """
    target = target.to(frozen.target_head.dtype)
    if objective.teacher == "full":
        z = _full_logits(target, frozen)
    else:
        z = _streamed_logits(target, frozen, objective.teacher_chunk)

    # A row counts in acceptance where it is trained and the target's argmax is a token of the
    # draft.
    position_mask = frozen.t2d[z.token][..., None].int() * row_mask[..., None]

    # The unroll reads K rows past the end. Their mask is 0, so the padded values are never used.
    k = objective.ttt_length
    uniform = 1 / z.draft.shape[-1]
    return Teacher(
        p_draft=F.pad(torch.softmax(z.draft, dim=-1), (0, 0, 0, k), value=uniform),
        p_full=F.pad(torch.exp(z.draft - z.log_sum), (0, 0, 0, k)),
        token=F.pad(z.token, (0, k)),
        position_mask=position_mask,
    )


def _full_logits(target: Tensor, frozen: Frozen) -> _TargetLogits:
    z = F.linear(target, frozen.target_head).to(at_least_fp32(target.dtype))
    return _TargetLogits(
        draft=z[..., frozen.t2d],
        log_sum=torch.logsumexp(z, dim=-1, keepdim=True),
        token=z.argmax(-1),
    )


def _streamed_logits(target: Tensor, frozen: Frozen, chunk: int) -> _TargetLogits:
    """As `_full_logits`, by `chunk` columns of the vocabulary at a time.

    `m` is the largest logit so far, `total = Σ exp(z - m)`: `total ← total · exp(m - m') + Σ_chunk
    exp(z - m')`.
    """
    dtype = at_least_fp32(target.dtype)
    draft = F.linear(target, frozen.target_head[frozen.t2d]).to(dtype)

    shape = target.shape[:-1]
    largest = torch.full(shape, -torch.inf, dtype=dtype, device=target.device)
    total = torch.zeros_like(largest)
    token = torch.zeros(shape, dtype=torch.int64, device=target.device)
    for start in range(0, frozen.target_head.shape[0], chunk):
        z = F.linear(target, frozen.target_head[start : start + chunk]).to(dtype)
        best, index = z.max(dim=-1)
        new = torch.maximum(largest, best)
        total = total * torch.exp(largest - new) + torch.exp(z - new[..., None]).sum(-1)
        token = torch.where(best > largest, index + start, token)
        largest = new
    return _TargetLogits(draft, (largest + torch.log(total))[..., None], token)

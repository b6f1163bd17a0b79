"""The target's distributions over the draft vocabulary, from its last hidden states."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from eagle3fn.base.dtypes import at_least_fp32
from eagle3fn.base.sections import ObjectiveConfig
from eagle3fn.base.types import Frozen, Teacher


class _TargetLogits(NamedTuple):
    """What the teacher needs of the target's logits `z` `(B, S, V)`."""

    draft: Tensor  # (B, S, D): the logits of the draft vocabulary
    log_sum: Tensor  # (B, S, 1): log Σ_v exp(z_v)
    token: Tensor  # (B, S) int64: argmax, the lowest id of equal ones


@torch.no_grad()
def make_teacher(label_hidden: Tensor, frozen: Frozen, objective: ObjectiveConfig) -> Teacher:
    """Teacher of a batch's labels, from `label_hidden` `(B, S, Ht)`; no gradient.

    `p_draft = softmax(z over the draft vocabulary)`, `p_full = softmax(z)` at the same tokens.
    `objective.teacher` "full" makes all `(B, S, V)` logits at once, "compact" streams over them and
    gives the same to rounding.
    """
    label_hidden = label_hidden.to(frozen.target_head.dtype)
    if objective.teacher == "full":
        z = _full_logits(label_hidden, frozen)
    else:
        z = _streamed_logits(label_hidden, frozen, objective.teacher_chunk)

    # The unroll reads rows past the end. Their mask is 0, so the padded values are never used.
    k = objective.ttt_length
    uniform = 1 / z.draft.shape[-1]
    return Teacher(
        p_draft=F.pad(torch.softmax(z.draft, dim=-1), (0, 0, 0, k), value=uniform),
        p_full=F.pad(torch.exp(z.draft - z.log_sum), (0, 0, 0, k)),
        token=F.pad(z.token, (0, k)),
        known=F.pad(frozen.t2d[z.token].int(), (0, k)),
    )


def _full_logits(label_hidden: Tensor, frozen: Frozen) -> _TargetLogits:
    z = F.linear(label_hidden, frozen.target_head).to(at_least_fp32(label_hidden.dtype))
    return _TargetLogits(
        draft=z[..., frozen.t2d],
        log_sum=torch.logsumexp(z, dim=-1, keepdim=True),
        token=z.argmax(-1),
    )


def _streamed_logits(label_hidden: Tensor, frozen: Frozen, chunk: int) -> _TargetLogits:
    """As `_full_logits`, by `chunk` columns of the vocabulary at a time.

    `m` is the largest logit so far, `total = Σ exp(z - m)`: `total ← total · exp(m - m') + Σ_chunk
    exp(z - m')`.
    """
    dtype = at_least_fp32(label_hidden.dtype)
    draft = F.linear(label_hidden, frozen.target_head[frozen.t2d]).to(dtype)

    shape = label_hidden.shape[:-1]
    largest = torch.full(shape, -torch.inf, dtype=dtype, device=label_hidden.device)
    total = torch.zeros_like(largest)
    token = torch.zeros(shape, dtype=torch.int64, device=label_hidden.device)
    for start in range(0, frozen.target_head.shape[0], chunk):
        z = F.linear(label_hidden, frozen.target_head[start : start + chunk]).to(dtype)
        best, index = z.max(dim=-1)
        new = torch.maximum(largest, best)
        total = total * torch.exp(largest - new) + torch.exp(z - new[..., None]).sum(-1)
        token = torch.where(best > largest, index + start, token)
        largest = new
    return _TargetLogits(draft, (largest + torch.log(total))[..., None], token)

"""The target's distributions over the draft vocabulary, from its last hidden states (objective, section 3)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from eagle3fn.base.config import ObjectiveConfig
from eagle3fn.base.types import Frozen, Teacher
from eagle3fn.model.layers import at_least_fp32


@torch.no_grad()
def make_teacher(
    target: Tensor, row_mask: Tensor, frozen: Frozen, objective: ObjectiveConfig
) -> Teacher:
    """Teacher of `target` `(B, S, Ht)` (already shifted) and row mask `(B, S)`; no gradient.

    "full" builds all `(B, S, V)` logits; "compact" gives the same quantities to rounding from the draft rows of
    the head and a stream over vocabulary chunks.
    """
    head = frozen.target_head
    target = target.to(head.dtype)
    parts = _full if objective.teacher == "full" else _compact
    draft, log_z, token = parts(target, frozen, objective.teacher_chunk)
    mask = frozen.t2d[token][..., None].int() * row_mask[..., None]
    k, size = objective.ttt_length, draft.shape[-1]
    return Teacher(
        p_draft=F.pad(torch.softmax(draft, dim=-1), (0, 0, 0, k), value=1 / size),
        p_full=F.pad(torch.exp(draft - log_z), (0, 0, 0, k)),
        token=F.pad(token, (0, k)),
        position_mask=mask,
    )


def _full(target: Tensor, frozen: Frozen, _: int) -> tuple[Tensor, Tensor, Tensor]:
    z = F.linear(target, frozen.target_head).to(at_least_fp32(target.dtype))
    return z[..., frozen.t2d], torch.logsumexp(z, dim=-1, keepdim=True), z.argmax(-1)


def _compact(target: Tensor, frozen: Frozen, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
    wide = at_least_fp32(target.dtype)
    draft = F.linear(target, frozen.target_head[frozen.t2d]).to(wide)
    shape = target.shape[:-1]
    top = torch.full(shape, -torch.inf, dtype=wide, device=target.device)
    total = torch.zeros_like(top)
    token = torch.zeros(shape, dtype=torch.int64, device=target.device)
    for start in range(0, frozen.target_head.shape[0], chunk):
        z = F.linear(target, frozen.target_head[start : start + chunk]).to(wide)
        best, index = z.max(dim=-1)
        new = torch.maximum(top, best)
        total = total * torch.exp(top - new) + torch.exp(z - new[..., None]).sum(-1)
        token = torch.where(best > top, index + start, token)
        top = new
    return draft, (top + torch.log(total))[..., None], token

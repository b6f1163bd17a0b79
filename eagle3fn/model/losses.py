"""Losses by row, and one unroll step's loss and metrics.

With `s = softmax(logits)` over the draft vocabulary, `p` the teacher over it (`p_draft`), and
`p_full` the probabilities of the same tokens under the whole vocabulary, a row's loss is:

    kl    -Σ p · log s                           the KL divergence up to the teacher's entropy
    rkl   Σ s · log(s / p)                       the reverse KL divergence
    nla   -log a,  a = Σ min(p_full, s)          a is the row's acceptance rate
    lk    w · kl + (1 - w) · (1 - a),  w = kl_scale · exp(-kl_decay · a), a constant
    jsd   ½ Σ p · log(p / m) + ½ Σ s · log(s / m),  m = (p + s) / 2
    ce    -log s[argmax p]                       cross entropy; of equal ones the lowest id
    tv    ½ Σ |p - s|                            the total variation distance

`nla` and `lk` are the losses of arXiv 2602.23881 with each row's own acceptance rate. So a step's
loss is a sum over rows, and micro-batches and ranks add up. A weighted sum of losses by row is one
too, `Σ weight · loss`.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from eagle3fn.base.dtypes import wide
from eagle3fn.base.sections import ObjectiveConfig
from eagle3fn.base.types import Batch, Frozen


class RowLoss(NamedTuple):
    """A loss as a function of one row's logits; rows do not depend on each other.

    Its functions take the draft's logits `(…, D)` in at least fp32, and what they need besides:
    `p_draft` and `p_full` of the same shape, or a number of `ObjectiveConfig`. They depend on
    nothing else, and write into no argument: by a parameter that they close over the fast numerics
    have no gradient.
    """

    # (logits, *needs) → (…,), differentiable by the logits
    value: Callable[..., Tensor]
    # (logits, softmax(logits), *needs) → the values (…,), and each value's gradient by its logits
    # (…, D), for which the softmax may be written over. It saves the fast numerics a graph; without
    # it they use the vjp of `value`.
    closed: Callable[..., tuple[Tensor, Tensor]] | None = None
    # in order, what follows the logits
    needs: tuple[str, ...] = ("p_draft", "p_full")
    # module of `model.kernels` whose `score` computes this loss on CUDA
    kernel: str | None = None


def survival_rate(objective: ObjectiveConfig, batch: Batch) -> float:
    """With which chance a row of this batch goes on to the next unroll step."""
    return 1.0 if batch.survives is None else objective.survival


def acceptance(logits: Tensor, p_full: Tensor) -> Tensor:
    """Probability that a sampled draft token is accepted, `Σ_v min(p_full[v], softmax(logits)[v])`.

    `(B, S)`, at least fp32, of `(B, S, D)` both.
    """
    draft = torch.softmax(wide(logits), dim=-1)
    return torch.minimum(p_full, draft).sum(-1)


def _log(p: Tensor) -> Tensor:
    """Logarithm of probabilities; those that underflow count as the smallest normal number."""
    return p.clamp_min(torch.finfo(p.dtype).tiny).log()


def _kl(logits: Tensor, p_draft: Tensor) -> Tensor:
    return -(p_draft * torch.log_softmax(logits, dim=-1)).sum(-1)


def _kl_closed(logits: Tensor, draft: Tensor, p_draft: Tensor) -> tuple[Tensor, Tensor]:
    # kl = log Σ exp(l - m) - Σ p · (l - m), with m = max(l) and log Σ exp(l - m) = -log max(s): of
    # large logits nothing is lost in a difference of two large numbers.
    below_top = logits - logits.amax(-1, keepdim=True)
    return -draft.amax(-1).log() - below_top.mul_(p_draft).sum(-1), draft.sub_(p_draft)


def _rkl(logits: Tensor, p_draft: Tensor) -> Tensor:
    log_draft = torch.log_softmax(logits, dim=-1)
    return (log_draft.exp() * (log_draft - _log(p_draft))).sum(-1)


def _rkl_closed(logits: Tensor, draft: Tensor, p_draft: Tensor) -> tuple[Tensor, Tensor]:
    # gradient = s · (log(s / p) - rkl)
    ratio = torch.log_softmax(logits, dim=-1) - _log(p_draft)
    values = (draft * ratio).sum(-1)
    return values, draft * (ratio - values[..., None])


def _nla(logits: Tensor, p_full: Tensor) -> Tensor:
    # By logarithms: an acceptance rate that underflows still has its value and its gradient.
    log_draft = torch.log_softmax(logits, dim=-1)
    return -torch.minimum(p_full.log(), log_draft).logsumexp(-1)


def _nla_closed(logits: Tensor, draft: Tensor, p_full: Tensor) -> tuple[Tensor, Tensor]:
    # With b(v) = min(p_full, s)(v) / a where the draft's is the lesser one, half of it where both
    # are equal, else 0: gradient = s · Σ b - b
    log_draft = torch.log_softmax(logits, dim=-1)
    log_full = p_full.log()
    least = torch.minimum(log_full, log_draft)
    log_accept = least.logsumexp(-1)
    share = least.sub_(log_accept[..., None]).exp_()
    share.mul_(_below(log_draft, log_full))
    return -log_accept, draft * share.sum(-1, keepdim=True) - share


def _below(draft: Tensor, full: Tensor) -> Tensor:
    """1 where the draft is below, ½ where both are equal, else 0: the slope of their minimum."""
    return (draft < full).to(draft.dtype) + 0.5 * (draft == full)


def _lk(logits: Tensor, p_draft: Tensor, p_full: Tensor, scale: float, decay: float) -> Tensor:
    accept = acceptance(logits, p_full)
    weight = scale * torch.exp(-decay * accept.detach())
    return weight * _kl(logits, p_draft) + (1 - weight) * (1 - accept)


def _lk_closed(
    logits: Tensor, draft: Tensor, p_draft: Tensor, p_full: Tensor, scale: float, decay: float
) -> tuple[Tensor, Tensor]:
    # The acceptance rate, and its gradient: c - s · Σ c, with c = s where s is below p_full.
    accept = torch.minimum(p_full, draft).sum(-1)
    share = draft * _below(draft, p_full)
    slope = share - draft * share.sum(-1, keepdim=True)

    weight = scale * torch.exp(-decay * accept)
    kl, kl_slope = _kl_closed(logits, draft, p_draft)
    values = weight * kl + (1 - weight) * (1 - accept)
    return values, weight[..., None] * kl_slope - (1 - weight)[..., None] * slope


def _jsd(logits: Tensor, p_draft: Tensor) -> Tensor:
    draft = torch.softmax(logits, dim=-1)
    middle = _middle(p_draft, draft)
    terms = p_draft * _log(p_draft / middle) + draft * _log(draft / middle)
    return terms.sum(-1) / 2


def _jsd_closed(logits: Tensor, draft: Tensor, p_draft: Tensor) -> tuple[Tensor, Tensor]:
    # gradient = ½ s · (log(s / m) - Σ s · log(s / m)): what m changes cancels
    middle = _middle(p_draft, draft)
    ratio = _log(draft / middle)
    reverse = (draft * ratio).sum(-1)
    values = ((p_draft * _log(p_draft / middle)).sum(-1) + reverse) / 2
    return values, draft * (ratio - reverse[..., None]) / 2


def _middle(p_draft: Tensor, draft: Tensor) -> Tensor:
    """The mean of two distributions, where it may divide: 0 / 0 would be NaN."""
    return ((p_draft + draft) / 2).clamp_min(torch.finfo(draft.dtype).tiny)


def _ce(logits: Tensor, p_draft: Tensor) -> Tensor:
    token = p_draft.argmax(-1, keepdim=True)
    return -torch.log_softmax(logits, dim=-1).gather(-1, token)[..., 0]


def _ce_closed(logits: Tensor, draft: Tensor, p_draft: Tensor) -> tuple[Tensor, Tensor]:
    # As in `_kl_closed`, with p = 1 at the token.
    token = p_draft.argmax(-1, keepdim=True)
    below_top = logits.gather(-1, token)[..., 0] - logits.amax(-1)
    values = -draft.amax(-1).log() - below_top
    return values, draft.scatter_add_(-1, token, -torch.ones_like(draft[..., :1]))


def _tv(logits: Tensor, p_draft: Tensor) -> Tensor:
    return (p_draft - torch.softmax(logits, dim=-1)).abs().sum(-1) / 2


def _tv_closed(logits: Tensor, draft: Tensor, p_draft: Tensor) -> tuple[Tensor, Tensor]:
    # gradient = s · (σ - Σ s · σ), σ = ½ sign(s - p)
    apart = draft - p_draft
    values = apart.abs().sum(-1) / 2
    share = draft * apart.sign_() / 2
    return values, share - draft * share.sum(-1, keepdim=True)


LOSSES = {
    "kl": RowLoss(_kl, _kl_closed, needs=("p_draft",), kernel="score"),
    "rkl": RowLoss(_rkl, _rkl_closed, needs=("p_draft",)),
    "nla": RowLoss(_nla, _nla_closed, needs=("p_full",)),
    "lk": RowLoss(_lk, _lk_closed, needs=("p_draft", "p_full", "kl_scale", "kl_decay")),
    "jsd": RowLoss(_jsd, _jsd_closed, needs=("p_draft",)),
    "ce": RowLoss(_ce, _ce_closed, needs=("p_draft",)),
    "tv": RowLoss(_tv, _tv_closed, needs=("p_draft",)),
}
"""What `objective.loss` names. A new loss is a line at the end of this table, and covered by its
tests; the first one is what drawn test cases shrink to."""


def step_loss(
    logits: Tensor,
    p_draft: Tensor,
    p_full: Tensor,
    mask: Tensor,
    count: Tensor | None,
    loss: RowLoss,
) -> Tensor:
    """One unroll step's loss: the sum over rows with `mask`, divided by `count`.

    A row without `mask` adds exactly nothing to the loss and to the gradient, whatever its value.

    Args:
        logits: the draft's, `(B, S, D)`, compute dtype.
        p_draft: the teacher's softmax over the draft vocabulary, `(B, S, D)`.
        p_full: the same tokens' probabilities under the full vocabulary, `(B, S, D)`.
        mask: `position_mask`, `(B, S, 1)`.
        count: how many rows the sum is divided by; None: all `B·S`.
        loss: as `named_loss.find_loss` returns it.

    Returns:
        Scalar, fp32 (fp64 in fp64).
    """
    # Logits of other rows are replaced, not only their values: a gradient there may be infinite,
    # and zero times infinity is not zero.
    counts = mask != 0
    rows = loss.value(torch.where(counts, wide(logits), 0.0), p_draft, p_full)
    rows = torch.where(counts[..., 0], rows, 0.0)  # (B, S)
    return rows.mean() if count is None else rows.sum() / count


@torch.no_grad()
def correct_rows(logits: Tensor, token: Tensor, frozen: Frozen) -> Tensor:
    """Rows whose draft argmax, as a target id, is the target's argmax `token`; `(B, S)` bool."""
    best = logits.argmax(-1)
    return best + frozen.d2t[best] == token

"""Losses by row, and one unroll step's loss and metrics.

With `s = softmax(logits)` over the draft vocabulary, `p` the teacher over it (`p_draft`), and
`p_full` the probabilities of the same tokens under the whole vocabulary, a row's loss is:

    kl    -Σ p · log s                           the KL divergence up to the teacher's entropy
    rkl   Σ s · log(s / p)                       the reverse KL divergence
    nla   -log a,  a = Σ min(p_full, s)          a is the row's acceptance rate
    lk    w · kl + (1 - w) · (1 - a),  w = kl_scale · exp(-kl_decay · a), a constant

`nla` and `lk` are the losses of arXiv 2602.23881 with each row's own acceptance rate. So a step's
loss is a sum over rows, and micro-batches and ranks add up.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eagle3fn.base.config import ObjectiveConfig
from eagle3fn.base.dtypes import wide
from eagle3fn.base.errors import UserError
from eagle3fn.base.named import check_arguments, find
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


Loss = RowLoss | Callable[..., Tensor]
"""A loss, or its `value` alone: a function of `(logits, p_draft, p_full)`."""


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


def _lk(logits: Tensor, p_draft: Tensor, p_full: Tensor, scale: float, decay: float) -> Tensor:
    accept = acceptance(logits, p_full)
    weight = scale * torch.exp(-decay * accept.detach())
    return weight * _kl(logits, p_draft) + (1 - weight) * (1 - accept)


LOSSES = {
    "kl": RowLoss(_kl, _kl_closed, needs=("p_draft",), kernel="score"),
    "rkl": RowLoss(_rkl, _rkl_closed, needs=("p_draft",)),
    "nla": RowLoss(_nla, needs=("p_full",)),
    "lk": RowLoss(_lk, needs=("p_draft", "p_full", "kl_scale", "kl_decay")),
}
"""What `objective.loss` names. A new loss is a line at the end of this table, and covered by its
tests; the first one is what drawn test cases shrink to."""


def find_loss(objective: ObjectiveConfig, own: Loss | None = None) -> RowLoss:
    """The loss that `objective.loss` names, or a user's `own`, with its settings filled in.

    Args:
        objective: `loss` is a name of `LOSSES`, or "module:function" for a function
            `(logits, p_draft, p_full) → (…,)`, all three `(…, D)` in at least fp32.
        own: a loss, or such a function, in place of the named one.

    Returns:
        A loss whose functions take `p_draft` and `p_full` after the logits (and their softmax).

    Raises:
        UserError: no such loss, or a user's function of other arguments; or, when it is called, one
            that does not return one value a row.
    """
    arguments = ("logits", "p_draft", "p_full")
    loss = own
    if loss is None:
        loss = find(objective.loss, LOSSES, "objective.loss", arguments)
    for name in loss.needs if isinstance(loss, RowLoss) else ():
        if name not in {"p_draft", "p_full"} | vars(objective).keys():
            raise UserError(
                f"the loss needs {name!r}; it must be p_draft, p_full or a setting of [objective]"
            )
    if not isinstance(loss, RowLoss):
        check_arguments(loss, arguments, f"loss = {loss!r}")
        loss = RowLoss(loss)

    def needed(p_draft: Tensor, p_full: Tensor) -> list:
        given = vars(objective) | {"p_draft": p_draft, "p_full": p_full}
        return [given[name] for name in loss.needs]

    def value(logits: Tensor, p_draft: Tensor, p_full: Tensor) -> Tensor:
        before = _versions(p_draft, p_full)
        rows = loss.value(logits, *needed(p_draft, p_full))
        _check_rows(rows, logits.shape[:-1], "one value a row")
        if _versions(p_draft, p_full) != before:
            raise UserError("the loss wrote into p_draft or p_full, which others read; copy them")
        return rows

    def closed(logits: Tensor, draft: Tensor, *teacher: Tensor) -> tuple[Tensor, Tensor]:
        assert loss.closed is not None
        pair = loss.closed(logits, draft, *needed(*teacher))
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise UserError(
                f"the loss's closed form returned {type(pair).__name__}; it must be a pair"
            )
        _check_rows(pair[0], logits.shape[:-1], "one value a row")
        _check_rows(pair[1], logits.shape, "the gradient by the logits")
        return pair

    return RowLoss(value, loss.closed and closed, kernel=loss.kernel)


def _check_rows(found: Any, shape: tuple[int, ...], what: str) -> None:
    """Refuse what a loss returned if it is no floating-point tensor of this shape."""
    if isinstance(found, Tensor) and found.shape == shape and found.is_floating_point():
        return
    is_tensor = isinstance(found, Tensor)
    kind = f"shape {tuple(found.shape)}, {found.dtype}" if is_tensor else type(found).__name__
    raise UserError(f"the loss returned {kind}; it must be floating point {tuple(shape)}, {what}")


def _versions(*tensors: Tensor) -> list[int]:
    """How often each was written into; inference tensors don't count it."""
    return [0 if x.is_inference() else x._version for x in tensors]


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
        loss: as `find_loss` returns it.

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

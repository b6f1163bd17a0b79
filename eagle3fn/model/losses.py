"""Per-step loss and metrics of the unroll."""

from collections.abc import Callable

import torch
from torch import Tensor

from eagle3fn.base.config import ObjectiveConfig
from eagle3fn.base.dtypes import wide
from eagle3fn.base.types import Frozen

KL = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""As `kl_loss`: `(logits, p_draft, mask, count) → scalar`."""


def step_loss(
    logits: Tensor,
    p_draft: Tensor,
    p_full: Tensor,
    mask: Tensor,
    count: Tensor | None,
    objective: ObjectiveConfig,
    kl: KL,
) -> tuple[Tensor, Tensor]:
    """One unroll step's loss under `objective.loss`, and the rows' acceptance rate, detached.

    Args:
        logits: the draft's, `(B, S, D)`, compute dtype. Each term casts them up itself, so that in
            bf16 the terms' gradients are added after their casts down.
        p_draft: the teacher's softmax over the draft vocabulary, `(B, S, D)`.
        p_full: the same tokens' probabilities under the full vocabulary, `(B, S, D)`.
        mask: `position_mask`, `(B, S, 1)`.
        count: see `kl_loss`.
        objective: the loss and its weights.
        kl: `kl_loss`, or another way to compute it.

    Returns:
        A scalar and `(B, S)`, both fp32 (fp64 in fp64).
    """
    # Under KL the acceptance rate is a metric alone.
    if objective.loss == "kl":
        return kl(logits, p_draft, mask, count), acceptance(logits.detach(), p_full)

    accept = acceptance(logits, p_full)
    if objective.loss == "lk_alpha":
        return lk_alpha(accept, mask), accept.detach()

    divergence = kl(logits, p_draft, mask, count)
    loss = lk_lambda(divergence, accept, mask, objective.kl_scale, objective.kl_decay)
    return loss, accept.detach()


def kl_loss(logits: Tensor, p_draft: Tensor, mask: Tensor, count: Tensor | None) -> Tensor:
    """Soft-label cross-entropy: the KL of the draft from the teacher, plus the teacher's entropy,
    which has no gradient; fp32 scalar.

    `-Σ_rows Σ_v p_draft[v] · log_softmax(logits)[v] / count` over rows with `mask` `(B, S, 1)`;
    without `count` the sum is divided by all `B·S` rows. `logits` and `p_draft` are `(B, S, D)`.
    """
    log_draft = torch.log_softmax(wide(logits), dim=-1)
    row = -(p_draft * log_draft).sum(-1) * (mask[..., 0] != 0).to(log_draft.dtype)
    return row.mean() if count is None else row.sum() / count


def acceptance(logits: Tensor, p_full: Tensor) -> Tensor:
    """Probability that a sampled draft token is accepted, `Σ_v min(p_full[v], softmax(logits)[v])`.

    `(B, S)` fp32.
    """
    draft = torch.softmax(wide(logits), dim=-1)
    return torch.minimum(p_full, draft).sum(-1)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of `x` `(B, S)` over rows with `mask` `(B, S, 1)`; zero if there is none."""
    weight = mask[..., 0].to(x.dtype)
    return (x * weight).sum() / weight.sum().clamp_min(1e-8)


def lk_alpha(accept: Tensor, mask: Tensor) -> Tensor:
    """`-mean(log acceptance)` (arXiv 2602.23881) of `(B, S)` over rows with `mask`; scalar.

    A row whose acceptance underflows counts as zero, without gradient: its logarithm's gradient
    would be infinite, and NaN where a draft probability of the row is zero as well.
    """
    holds = accept >= torch.finfo(accept.dtype).tiny
    log = torch.where(holds, torch.log(torch.where(holds, accept, 1.0)), 0.0)
    return -masked_mean(log, mask)


def lk_lambda(kl: Tensor, accept: Tensor, mask: Tensor, scale: float, decay: float) -> Tensor:
    """`w·kl + (1 - w)·(1 - mean acceptance)`, `w = scale·exp(-decay · mean acceptance)` a constant.

    Scalar.

    `kl` should be a mean over trained rows too: under `normalization = "rows"` padding moves the
    loss.
    """
    mean = masked_mean(accept, mask)
    weight = scale * torch.exp(-decay * mean.detach())
    return weight * kl + (1 - weight) * (1 - mean)


@torch.no_grad()
def correct_rows(logits: Tensor, token: Tensor, frozen: Frozen) -> Tensor:
    """Rows whose draft argmax, as a target id, is the target's argmax `token`; `(B, S)` bool."""
    best = logits.argmax(-1)
    return best + frozen.d2t[best] == token

"""Per-step loss and metrics of the unroll (objective, section 6)."""

from collections.abc import Callable

import torch
from torch import Tensor

from eagle3fn.base.config import ObjectiveConfig
from eagle3fn.base.types import Frozen
from eagle3fn.model.layers import at_least_fp32

KL = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""As `kl_loss`: `(logits, p, mask, n) → scalar`."""


def kl_on(device: torch.device, dtype: torch.dtype) -> KL:
    """The KL of the legacy numerics: on CUDA a kernel, as the old tool's; elsewhere, and in fp64, the expression."""
    if device.type == "cuda" and dtype != torch.float64:
        from eagle3fn.specforge.kl_kernel import mean_kl

        return mean_kl
    return kl_loss


def step_loss(
    logits: Tensor,
    p: Tensor,
    q: Tensor,
    mask: Tensor,
    n: Tensor | None,
    objective: ObjectiveConfig,
    kl: KL | None = None,
) -> tuple[Tensor, Tensor]:
    """One unroll step's loss under `objective.loss`, and the rows' acceptance, detached.

    Args:
        logits: the draft's, `(B, S, D)`, compute dtype. Each term widens them itself: in bf16 the terms' gradients
            are added after their casts, as in the old tool.
        p: the teacher over the draft vocabulary, `(B, S, D)`.
        q: the same tokens' probabilities under the full vocabulary, `(B, S, D)`.
        mask: `position_mask`, `(B, S, 1)`.
        n: see `kl_loss`.
        objective: the loss and its weights.
        kl: another way to compute `kl_loss`.

    Returns:
        A scalar and `(B, S)`, both fp32 (fp64 in fp64).
    """
    kl = kl or kl_loss
    if objective.loss == "kl":
        return kl(logits, p, mask, n), acceptance(logits.detach(), q)
    accept = acceptance(logits, q)
    if objective.loss == "lk_alpha":
        return lk_alpha(accept, mask), accept.detach()
    return lk_lambda(
        kl(logits, p, mask, n), accept, mask, objective.kl_scale, objective.kl_decay
    ), accept.detach()


def kl_loss(logits: Tensor, p: Tensor, mask: Tensor, n: Tensor | None) -> Tensor:
    """Soft-label KL of `(B, S, D)` logits against `p`, up to the teacher's entropy; fp32 scalar.

    Sum over rows with `mask` `(B, S, 1)` divided by `n`, or by all `B·S` rows without it.
    """
    logp = torch.log_softmax(logits.to(at_least_fp32(logits.dtype)), dim=-1)
    row = -(p * logp).sum(-1) * (mask[..., 0] != 0).to(logp.dtype)
    return row.mean() if n is None else row.sum() / n


def acceptance(logits: Tensor, q: Tensor) -> Tensor:
    """Chance that a sampled draft token is accepted, `Σ min(q, softmax(logits))`; `(B, S)` fp32."""
    return torch.minimum(q, torch.softmax(logits.to(at_least_fp32(logits.dtype)), dim=-1)).sum(-1)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of `x` `(B, S)` over rows with `mask` `(B, S, 1)`; zero if there is none."""
    weight = mask[..., 0].to(x.dtype)
    return (x * weight).sum() / weight.sum().clamp_min(1e-8)


def lk_alpha(accept: Tensor, mask: Tensor) -> Tensor:
    """`-mean(log acceptance)` (arXiv 2602.23881) of `(B, S)` over rows with `mask`; scalar.

    A row whose acceptance underflows counts as zero, without gradient. The old tool divides by that zero, in
    masked rows too, and its gradient is NaN wherever a draft probability of such a row is zero as well.
    """
    holds = accept >= torch.finfo(accept.dtype).tiny
    log = torch.where(holds, torch.log(torch.where(holds, accept, 1.0)), 0.0)
    return -masked_mean(log, mask)


def lk_lambda(kl: Tensor, accept: Tensor, mask: Tensor, scale: float, decay: float) -> Tensor:
    """`w·kl + (1 - w)·(1 - mean acceptance)` with `w = scale·exp(-decay · mean acceptance)`, a constant; scalar.

    `kl` must be a mean over trained rows too: the old tool's divides by padding as well, so that padding moves
    the loss (`normalization = "rows"`).
    """
    mean = masked_mean(accept, mask)
    weight = scale * torch.exp(-decay * mean.detach())
    return weight * kl + (1 - weight) * (1 - mean)


@torch.no_grad()
def correct_rows(logits: Tensor, token: Tensor, frozen: Frozen) -> Tensor:
    """Rows whose draft argmax, as a target id, is the target's argmax; `(B, S)` bool."""
    said = logits.argmax(-1)
    return said + frozen.d2t[said] == token

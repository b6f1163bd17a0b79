"""SpecForge's arithmetic, operation by operation: the plain unroll with SpecForge's losses.

The plain unroll has SpecForge's order of operations. SpecForge's losses are means over a batch. On
the CPU, and in fp64, its KL is the plain expression. On CUDA SpecForge runs a Triton kernel, and so
does this.
"""

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor

from eagle3fn.base.config import Config
from eagle3fn.base.dtypes import wide
from eagle3fn.base.errors import UserError
from eagle3fn.base.sections import ObjectiveConfig
from eagle3fn.base.types import Aux, Batch, Frozen, Params
from eagle3fn.model import losses
from eagle3fn.model.checks import check_batch
from eagle3fn.model.forward import forward
from eagle3fn.model.losses import RowLoss, acceptance
from eagle3fn.model.named_loss import Loss, find_loss
from eagle3fn.model.plain import PLAIN, score_steps

KL = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""As `kl_loss`: `(logits, p_draft, mask, count) → scalar`."""

BATCH_MEANS = {"lk_alpha": (), "lk_lambda": ("kl_scale", "kl_decay")}
"""Values of `objective.loss` that are SpecForge's alone, with the settings that they read: their
means run over the whole batch."""


def step_loss(
    logits: Tensor,
    p_draft: Tensor,
    p_full: Tensor,
    mask: Tensor,
    count: Tensor | None,
    objective: ObjectiveConfig,
    kl: KL | None = None,
) -> Tensor:
    """One unroll step's loss under `objective.loss`: "kl", one of `BATCH_MEANS`, or as
    `model.losses.step_loss`.

    Args:
        logits: the draft's, `(B, S, D)`, compute dtype. Each term casts them up itself, so that in
            bf16 the terms' gradients are added after their casts down.
        p_draft: the teacher's softmax over the draft vocabulary, `(B, S, D)`.
        p_full: the same tokens' probabilities under the full vocabulary, `(B, S, D)`.
        mask: `position_mask`, `(B, S, 1)`.
        count: see `kl_loss`.
        objective: the loss and its weights.
        kl: another way to compute the KL than `kl_on`'s.

    Returns:
        Scalar, fp32 (fp64 in fp64).
    """
    if objective.loss not in {*BATCH_MEANS, "kl"}:
        row_loss = find_loss(objective)
        return losses.step_loss(logits, p_draft, p_full, mask, count, row_loss)

    kl = kl or kl_on(logits.device, logits.dtype)
    if objective.loss == "kl":
        return kl(logits, p_draft, mask, count)

    accept = acceptance(logits, p_full)
    if objective.loss == "lk_alpha":
        return lk_alpha(accept, mask)
    divergence = kl(logits, p_draft, mask, count)
    return lk_lambda(divergence, accept, mask, objective.kl_scale, objective.kl_decay)


def kl_on(device: torch.device, dtype: torch.dtype) -> KL:
    """The KL that SpecForge computes on a device, for logits of this dtype."""
    if device.type == "cuda" and dtype != torch.float64:
        # Imported here: it needs Triton.
        from eagle3fn.specforge.kl_kernel import mean_kl

        return mean_kl
    return kl_loss


def kl_loss(logits: Tensor, p_draft: Tensor, mask: Tensor, count: Tensor | None) -> Tensor:
    """Soft-label cross-entropy: the KL of the draft from the teacher, plus the teacher's entropy,
    which has no gradient; fp32 scalar.

    `-Σ_rows Σ_v p_draft[v] · log_softmax(logits)[v] / count` over rows with `mask` `(B, S, 1)`;
    without `count` the sum is divided by all `B·S` rows. `logits` and `p_draft` are `(B, S, D)`.
    """
    log_draft = torch.log_softmax(wide(logits), dim=-1)
    row = -(p_draft * log_draft).sum(-1) * (mask[..., 0] != 0).to(log_draft.dtype)
    return row.mean() if count is None else row.sum() / count


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


def forward_loss(
    params: Params,
    batch: Batch,
    *,
    config: Config,
    frozen: Frozen,
    loss: Loss | None = None,
) -> tuple[Tensor, Aux]:
    """`eagle3fn.forward_loss` by SpecForge's arithmetic; `objective.numerics` is not read.

    A `loss` of the user's own is computed as the plain numerics compute it.

    Raises:
        UserError: as `eagle3fn.forward_loss`.
    """
    check_batch(params, batch, config, frozen)
    if batch.starts is not None:
        raise UserError(
            "batch.starts: SpecForge's arithmetic has no packed rows; give padded ones "
            "(data.collate.collate)"
        )
    if loss is not None:
        return forward(params, batch, config, frozen, PLAIN, find_loss(config.objective, loss))
    return forward(params, batch, config, frozen, SPECFORGE, None)


def score(
    params: Params,
    states: Iterable[Tensor],
    plan: None,
    batch: Batch,
    config: Config,
    frozen: Frozen,
    loss: RowLoss | None,
    kl: KL | None = None,
) -> tuple[Tensor, Aux]:
    """`plain.score_steps` of SpecForge's losses; `loss` is not read, `kl` as for `step_loss`."""
    own = partial(step_loss, objective=config.objective, kl=kl)
    return score_steps(params, states, batch, config, frozen, own)


SPECFORGE = PLAIN._replace(score=score)
"""What SpecForge's `sdpa` backend computes: the plain operations and its own losses."""

"""The plain operations: readable, differentiable any number of times, the reference of the others.

They have SpecForge's order of operations, and its shapes: every row of `(B, S)` at every step.
"""

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from eagle3fn.base.config import Config
from eagle3fn.base.draft_config import DraftConfig
from eagle3fn.base.dtypes import at_least_fp32, wide
from eagle3fn.base.rows import surviving, trained_row_counts
from eagle3fn.base.types import Aux, Batch, Frozen, Params
from eagle3fn.model import table
from eagle3fn.model.losses import RowLoss, acceptance, correct_rows, step_loss, survival_rate
from eagle3fn.model.teacher import make_teacher
from eagle3fn.model.unroll import Ops
from eagle3fn.model.visibility import Visible

# The layer


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last axis, `weight · x / √(mean(x²) + eps)`.

    In at least fp32 up to the product with `weight`, which is made in the dtype of `x`.
    """
    normed = wide(x)
    normed = normed * torch.rsqrt(normed.pow(2).mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


def heads(
    weights: Params, draft: DraftConfig, layer: table.Layer, embeds: Tensor | None, hidden: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries `(B, N, S, E)`, keys and values `(B, J, S, E)`, not yet rotated.

    The first layer reads the next token's embedding and the hidden state, both `(B, S, H)`, each
    normed by a weight of its own: `x = [norm(embeds), norm(hidden)]`, `(B, S, 2·H)`. Under
    `norm_before_residual` the hidden state is normed already. Later layers read `norm(hidden)`.
    """
    if embeds is None:
        x = rms_norm(hidden, weights[layer.input_norm], draft.rms_norm_eps)
    else:
        embeds = rms_norm(embeds, weights[layer.input_norm], draft.rms_norm_eps)
        if not draft.norm_before_residual:
            hidden = rms_norm(hidden, weights[layer.hidden_norm], draft.rms_norm_eps)
        x = torch.cat([embeds, hidden], dim=-1)

    def projected(matrix: str, bias: str) -> Tensor:
        rows = F.linear(x, weights[matrix], weights.get(bias))
        return rows.view(*x.shape[:2], -1, draft.head_dim).transpose(1, 2)

    query = projected(layer.q, layer.q_bias)
    key = projected(layer.k, layer.k_bias)
    return query, key, projected(layer.v, layer.v_bias)


def repeat_heads(x: Tensor, groups: int) -> Tensor:
    """Key-value heads `(B, J, S, E)` once for each query head: `(B, J·groups, S, E)`."""
    if groups == 1:
        return x
    b, j, s, e = x.shape
    return x[:, :, None].expand(b, j, groups, s, e).reshape(b, j * groups, s, e)


def output(weights: Params, layer: table.Layer, hidden: Tensor, attended: Tensor) -> Tensor:
    """`hidden + W_o · attended`, of `(B, S, H)` and heads `(B, N, S, E)`."""
    rows = attended.transpose(1, 2).flatten(2)
    return hidden + F.linear(rows, weights[layer.o], weights.get(layer.o_bias))


def mlp(weights: Params, layer: table.Layer, hidden: Tensor, eps: float) -> Tensor:
    """`h + W_down · (silu(W_gate · x) · W_up · x)` with `x = norm(h)`, of `(B, S, H)`."""
    x = rms_norm(hidden, weights[layer.post_norm], eps)
    inner = F.silu(F.linear(x, weights[layer.gate])) * F.linear(x, weights[layer.up])
    return hidden + F.linear(inner, weights[layer.down])


def logits(params: Params, draft: DraftConfig, hidden: Tensor) -> Tensor:
    """Draft logits `(B, S, D)` of hidden states `(B, S, H)`."""
    return F.linear(rms_norm(hidden, params[table.NORM], draft.rms_norm_eps), params[table.HEAD])


# Attention


def additive_mask(seen: Visible, attention_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive mask `(B, 1, S, S)` of step 0's keys, for what the rows `(B, S)` see.

    `dtype`'s most negative finite value where a row does not see the key, and again where the key
    is padding; both together overflow to -inf.
    """
    low = torch.finfo(dtype).min
    zero = torch.zeros((), dtype=dtype, device=attention_mask.device)
    key = torch.arange(attention_mask.shape[1], device=attention_mask.device)

    hidden = key > torch.as_tensor(seen.last)[..., None]  # (B, S, S)
    if seen.first is not None:
        hidden = hidden | (key < torch.as_tensor(seen.first)[..., None])
    padding = (attention_mask == 0)[:, None, None, :]
    return zero.masked_fill(padding, low) + zero.masked_fill(hidden[:, None], low)


def _sight(
    seen: Visible,
    rows: Tensor | None,
    batch: Batch,
    draft: DraftConfig,
    dtype: torch.dtype,
) -> Tensor:
    return additive_mask(seen, batch.attention_mask, dtype)


def attend(query: Tensor, keys: list[Tensor], values: list[Tensor], mask: Tensor) -> Tensor:
    """Attention at unroll step `len(keys) - 1` of queries `(B, N, S, E)`; of the same shape.

    `keys[0]` `(B, N, S, E)` is step 0's, masked by `mask` `(B, 1, S, S)`. Of each later step's
    keys `(B, N, S, E)` a row sees its own entry alone. One softmax over both, in at least fp32.
    """
    scale = math.sqrt(query.shape[-1])
    s = keys[0].shape[2]

    # Scores against the block (B, N, S, S), then one column (B, N, S, 1) for each later step.
    scores = torch.matmul(query, keys[0].transpose(2, 3)) / scale + mask
    own_scores = [(query * key).sum(-1, keepdim=True) / scale for key in keys[1:]]

    scores = torch.cat([scores, *own_scores], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=at_least_fp32(query.dtype)).to(query.dtype)

    # The block's values, then each later step's, added in their order.
    out = torch.matmul(weights[..., :s], values[0])
    for i, value in enumerate(values[1:]):
        out = out + weights[..., s + i, None] * value
    return out


# Tokens and rows


def embedding(weights: Params, draft: DraftConfig, frozen: Frozen) -> Tensor:
    """The draft's own embedding `(V, H)` if it trains one, else the target's."""
    if draft.own_embedding:
        return weights[table.EMBED]
    assert frozen.embed_tokens is not None  # checked with the batch
    return frozen.embed_tokens


def _tokens(
    weights: Params, batch: Batch, draft: DraftConfig, frozen: Frozen
) -> Callable[[int], Tensor]:
    """A function of an unroll step that gives the rows' embeddings `(B, S, H)`."""
    matrix = embedding(weights, draft, frozen)
    dtype = weights[table.FC].dtype
    s = batch.aux_hidden.shape[1]
    return lambda step: F.embedding(batch.next_ids[:, step : step + s], matrix).to(dtype)


def _qkv(
    weights: Params,
    draft: DraftConfig,
    layer: table.Layer,
    tokens: Callable[[int], Tensor],
    hidden: Tensor,
    rows: Tensor | None,
    step: int,
) -> tuple[Tensor, Tensor, Tensor]:
    assert rows is None, "the plain operations compute every row"
    embeds = None if layer.number else tokens(step)
    return heads(weights, draft, layer, embeds, hidden)


# Head, loss and metrics

StepLoss = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""As `losses.step_loss`: `(logits, p_draft, p_full, mask, count) → scalar`."""


class _Step(NamedTuple):
    """One unroll step's loss and its detached metrics by row."""

    loss: Tensor  # (): by survivors alone it stands for all rows
    correct: Tensor  # (B, S) bool
    accept: Tensor  # (B, S) fp32
    mask: Tensor  # (B, S): trained rows whose label is in the draft vocabulary
    row_mask: Tensor  # (B, S)


def score_steps(
    params: Params,
    states: Iterable[Tensor],
    batch: Batch,
    config: Config,
    frozen: Frozen,
    step_loss: StepLoss,
) -> tuple[Tensor, Aux]:
    """`Σ_i decay^i · L_i` over unroll steps, and the metrics.

    Where rows survive by chance, `L_i` is the survivors' sum over `survival^i`, whose expectation
    is the sum of all rows. Each step's loss is taken before the next of the `states` `(B, S, H)` is
    made.
    """
    objective = config.objective
    every = surviving(batch.row_mask, batch.survives)  # (B, K, S)
    rate = survival_rate(objective, batch)
    s = batch.aux_hidden.shape[1]
    teacher = make_teacher(batch.label_hidden, frozen, objective)

    # By which number of rows each step's sum is divided; None: by all B·S.
    counts = [None] * objective.ttt_length
    if objective.normalization == "mask":
        found = batch.row_counts
        counts = trained_row_counts([batch.row_mask]) if found is None else found

    steps: list[_Step] = []
    for i, hidden in enumerate(states):
        # Row t is scored against the label at t + i.
        at = slice(i, i + s)
        row_mask = every[:, i]
        mask = (teacher.known[:, at] * row_mask)[..., None]  # (B, S, 1)
        p_full = teacher.p_full[:, at]

        draft_logits = logits(params, config.draft, hidden)
        loss = step_loss(draft_logits, teacher.p_draft[:, at], p_full, mask, counts[i])
        if batch.survives is not None:
            loss = loss / rate**i
        detached = draft_logits.detach()
        correct = correct_rows(detached, teacher.token[:, at], frozen)
        accept = acceptance(detached, p_full)
        steps.append(_Step(loss, correct, accept, mask[..., 0], row_mask))

    total = sum((objective.decay**i * step.loss for i, step in enumerate(steps)), start=0)
    return torch.as_tensor(total), _aux(steps, rate)


def _score(
    params: Params,
    states: Iterable[Tensor],
    plan: None,
    batch: Batch,
    config: Config,
    frozen: Frozen,
    loss: RowLoss,
) -> tuple[Tensor, Aux]:
    return score_steps(params, states, batch, config, frozen, partial(step_loss, loss=loss))


@torch.no_grad()
def _aux(steps: list[_Step], rate: float) -> Aux:
    """Sums and counts over rows; see `Aux`."""
    correct = torch.stack([step.correct for step in steps]).long()  # (K, B, S)
    accept = torch.stack([step.accept for step in steps])
    row_mask = torch.stack([step.row_mask for step in steps])

    # Acceptance is counted where the target's argmax is in the draft vocabulary.
    weights = [step.mask.to(step.accept.dtype) for step in steps]
    accepted = [(step.accept * weight).sum() for step, weight in zip(steps, weights, strict=True)]

    # A chain of drafted tokens ends at its first wrong one, and where the row's labels end.
    alive = row_mask.cumprod(0)
    run = alive * correct.cumprod(0)  # 1 where the tokens up to this step are right
    reached = row_mask * torch.cat([torch.ones_like(run[:1]), run[:-1]])

    # A row that survived to a step stands for those that did not.
    step = torch.arange(len(steps), dtype=torch.float64, device=accept.device)
    stands_for = (1 / rate**step)[:, None, None]
    return Aux(
        losses=torch.stack([step.loss.detach() for step in steps]),
        correct=torch.stack([(step.correct * step.row_mask).sum() for step in steps]),
        rows=torch.stack([step.row_mask.sum() for step in steps]),
        chain_rows=reached.sum((1, 2)),
        chain_correct=run.sum((1, 2)),
        accept=torch.stack(accepted),
        accept_rows=torch.stack([weight.sum() for weight in weights]),
        greedy=(stands_for * run).sum().float(),
        sampled=(stands_for * alive * accept.cumprod(0)).sum().float(),
    )


PLAIN = Ops(
    weights=lambda params, draft: params,
    tokens=_tokens,
    plan=lambda batch: None,
    norm=rms_norm,
    qkv=_qkv,
    head_axis=1,
    shared=repeat_heads,
    sight=_sight,
    attend=attend,
    output=output,
    mlp=mlp,
    score=_score,
)
"""The plain operations."""

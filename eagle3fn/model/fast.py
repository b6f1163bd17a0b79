"""The fast profile of `forward_loss`: the same mathematics on the rows that reach a loss term.

Every row gives its step-0 key and value; queries, MLP, later keys, head and loss are made for the `T` contributing
rows of the whole batch only, as one list. What depends on a token alone is made once a batch, not once a step.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from eagle3fn.base.config import Config
from eagle3fn.base.rows import contributing_rows, step_rows
from eagle3fn.base.types import Aux, Batch, Frozen, Params
from eagle3fn.model import layers, table
from eagle3fn.model.block_attention import block_attention, make_blocks
from eagle3fn.model.flash_attention import fits, flash_attention
from eagle3fn.model.fused_layers import mlp, norm_linear, rms_norm
from eagle3fn.model.head_loss import Labels, Scores, head_and_kl
from eagle3fn.model.rope import rope_table, rotate


class RowPlan(NamedTuple):
    """Which rows take part, and how rows and labels find each other; rows and labels are places `b·S + t`."""

    rows: Tensor  # (T,) int64
    labels: Tensor  # (P,) int64
    mask: Tensor  # (K, T) int64: row t is trained at step i
    label: Tensor  # (K, T) int64: row t's label t + i, as an index into labels; any where mask is 0
    scored: Tensor  # (K, P) bool: the label is scored at step i, by row u - i
    student: Tensor  # (K, P) int64: that row, as an index into rows; any where scored is False


class Weights(NamedTuple):
    """The layer's matrices, those with one input side by side; `left` and `right` take embedding and hidden state."""

    left: Tensor  # (q + 2·kv, H)
    right: Tensor  # (q + 2·kv, H)
    o: Tensor  # (H, q)
    gate_up: Tensor  # (2·I, H)
    down: Tensor  # (H, I)


def forward_fast(
    params: Params, batch: Batch, config: Config, frozen: Frozen
) -> tuple[Tensor, Aux]:
    """Loss and metrics as `forward_loss` documents them, to rounding."""
    objective, k = config.objective, config.objective.ttt_length
    plan = plan_rows(batch, k)
    student = unroll(params, batch, plan.rows, config, frozen)
    if objective.normalization == "rows":
        n = torch.full((k,), float(batch.input_ids.numel()), device=student.device)
    else:
        n = step_rows([batch.row_mask], k) if batch.row_counts is None else batch.row_counts
    steps = torch.arange(k, dtype=torch.float64, device=student.device)
    factor = (objective.decay**steps / n)[:, None].to(layers.at_least_fp32(student.dtype))
    labels = Labels(label_targets(batch, plan.labels, frozen), plan.student, plan.scored * factor)
    scores = head_and_kl(
        student, params[table.HEAD], labels, frozen.target_head, frozen.t2d, frozen.d2t
    )
    return scores.loss, _aux(scores, plan, n)


def plan_rows(batch: Batch, k: int) -> RowPlan:
    """Rows and labels as the batch gives them, else from its mask; a place that repeats counts once."""
    s, mask = batch.row_mask.shape[1], batch.row_mask.flatten()
    rows = contributing_rows(batch.row_mask, k) if batch.rows is None else batch.rows
    labels = contributing_rows(batch.row_mask, 1) if batch.labels is None else batch.labels
    steps = torch.arange(k, device=rows.device)[:, None]
    label, has_label = _find(labels, rows + steps)
    student, has_student = _find(rows, labels - steps)
    has_label &= (rows % s + steps < s) & _first(rows) & (mask[labels] > 0)[label]
    has_student &= (labels % s >= steps) & _first(labels) & (mask[labels] > 0)
    return RowPlan(rows, labels, has_label.long(), label, has_student, student)


def unroll(params: Params, batch: Batch, rows: Tensor, config: Config, frozen: Frozen) -> Tensor:
    """Normed hidden states of `rows` `(T,)` after each step: `(K, T, H)`."""
    draft, k = config.draft, config.objective.ttt_length
    b, s = batch.input_ids.shape
    n, j, e = draft.num_attention_heads, draft.num_key_value_heads, draft.head_dim
    weights, hidden = _weights(params), layers.project(params, batch.aux_hidden).flatten(0, 1)
    attend = attention_on(hidden.device, hidden.dtype, e, rows, s)
    left = _embedded(params, batch, weights, config, frozen)
    place = rows // s * (s + k) + rows % s + torch.arange(k, device=rows.device)[:, None]
    positions = (
        torch.arange(s, device=rows.device) if batch.position_ids is None else batch.position_ids
    )
    positions = positions.expand(b, s).flatten()
    cos, sin = (x[:, None] for x in rope_table(draft, s + k, hidden.dtype, hidden.device, beyond=k))

    normed = rms_norm(hidden, params[table.HIDDEN_NORM], draft.rms_norm_eps)
    kv = torch.addmm(
        left.view(b, s + k, -1)[:, :s, n * e :].flatten(0, 1), normed, weights.right[n * e :].T
    )
    kv = kv.view(b, s, 2 * j, e)
    turn = (x[positions].view(b, s, 1, e) for x in (cos, sin))
    key, value = rotate(kv[:, :, :j], *turn), kv[:, :, j:]
    step_keys, step_values, out = [], [], []
    hidden, positions = hidden[rows], positions[rows]
    x = torch.addmm(
        left[:, : n * e].index_select(0, place[0]), normed[rows], weights.right[: n * e].T
    )
    for i in range(k):
        if i:
            x = norm_linear(
                hidden, params[table.HIDDEN_NORM], weights.right, left, place[i], draft.rms_norm_eps
            )
        heads = x.view(len(rows), -1, e)
        turned = rotate(heads[:, : n + j], cos[positions + i], sin[positions + i])
        if i:
            step_keys.append(turned[:, n:])
            step_values.append(heads[:, n + j :].clone())  # a view would keep the queries too
        attended = attend(turned[:, :n], key, value, step_keys, step_values)
        hidden = torch.addmm(hidden, attended.flatten(1), weights.o.T)
        hidden = mlp(
            hidden, params[table.POST_NORM], weights.gate_up, weights.down, draft.rms_norm_eps
        )
        out.append(rms_norm(hidden, params[table.NORM], draft.rms_norm_eps))
    return torch.stack(out)


def attention_on(
    device: torch.device, dtype: torch.dtype, size: int, rows: Tensor, s: int
) -> Callable[..., Tensor]:
    """Attention of queries at `rows` of `B·S`: a flash kernel where there is one, else in blocks cut on the host."""
    if fits(device, dtype, size):
        return partial(flash_attention, rows=rows)
    return partial(block_attention, rows=rows, blocks=make_blocks(rows, s))


def _weights(params: Params) -> Weights:
    qkv = torch.cat([params[table.Q], params[table.K], params[table.V]])
    left, right = qkv.chunk(2, dim=1)
    return Weights(
        left,
        right,
        params[table.O],
        torch.cat([params[table.GATE], params[table.UP]]),
        params[table.DOWN],
    )


def _embedded(
    params: Params, batch: Batch, weights: Weights, config: Config, frozen: Frozen
) -> Tensor:
    """What the next token's embedding gives to q, k and v at places `0 … S + K - 1` of each sample, a flat list."""
    k = config.objective.ttt_length
    ids = F.pad(batch.input_ids, (0, k + 1))[:, 1:]
    embeds = layers.embed(params, frozen, ids, weights.left.dtype)
    return F.linear(
        rms_norm(embeds, params[table.INPUT_NORM], config.draft.rms_norm_eps), weights.left
    ).flatten(0, 1)


def label_targets(batch: Batch, labels: Tensor, frozen: Frozen) -> Tensor:
    """The target's last hidden states `(P, Ht)` one place behind the labels, zero past the end."""
    states, s = batch.last_hidden.flatten(0, 1), batch.last_hidden.shape[1]
    inside = (labels % s + 1 < s)[:, None]
    return torch.where(inside, states[(labels + 1).clamp(max=len(states) - 1)], 0).to(
        frozen.target_head.dtype
    )


def _first(places: Tensor) -> Tensor:
    """Which of ascending places `(T,)` differ from the one before."""
    return torch.cat([torch.ones_like(places[:1], dtype=torch.bool), places[1:] != places[:-1]])


def _find(places: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Where each of `wanted` `(K, X)` stands in the ascending `places` `(T,)`, and whether it does."""
    found = torch.searchsorted(places, wanted).clamp(max=len(places) - 1)
    return found, places[found] == wanted


@torch.no_grad()
def _aux(scores: Scores, plan: RowPlan, n: Tensor) -> Aux:
    alive = plan.mask.cumprod(0)
    correct, accept = scores.correct.gather(1, plan.label), scores.accept.gather(1, plan.label)
    known = scores.known[plan.label] & (plan.mask > 0)
    counted = plan.scored & scores.known
    return Aux(
        losses=(scores.kl * counted).sum(1) / n,
        correct=(correct * plan.mask).sum(1),
        rows=plan.mask.sum(1),
        accept=(accept * known).sum(1),
        accept_rows=known.sum(1).to(accept.dtype),
        greedy=(alive * correct.long().cumprod(0)).sum().float(),
        sampled=(alive * accept.cumprod(0)).sum().float(),
    )

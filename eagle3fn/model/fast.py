"""The fast profile of `forward_loss`: the same mathematics on the rows that reach a loss term.

Every row gives its step-0 key and value; queries, MLP, later keys, head and loss are made for contributing rows only.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from eagle3fn.base.config import Config
from eagle3fn.base.rows import contributing_rows, shift, step_rows
from eagle3fn.base.types import Aux, Batch, Frozen, Params
from eagle3fn.model import layers, table
from eagle3fn.model.attention import block_mask, unrolled_attention
from eagle3fn.model.fused import Labels, Scores, head_and_kl
from eagle3fn.model.rope import rope_table


class Plan(NamedTuple):
    """Which rows take part, and how labels and rows find each other; `R` rows a sample, labels are the same places."""

    rows: Tensor  # (B, R) int64
    mask: Tensor  # (K, B, R) int64: row t is trained at step i
    student: Tensor  # (K, B, R) int64: label u's student row u - i, as an index into R
    scored: Tensor  # (K, B, R) bool: the label has that student row and is trained
    label: Tensor  # (K, B, R) int64: row t's label t + i, as an index into R


def forward_fast(params: Params, batch: Batch, config: Config, frozen: Frozen) -> tuple[Tensor, Aux]:
    """Loss and metrics as `forward_loss` documents them, to rounding."""
    objective = config.objective
    plan = make_plan(batch, objective.ttt_length)
    hidden = unroll(params, batch, plan, config, frozen)
    student = layers.rms_norm(hidden, params[table.NORM], config.draft.rms_norm_eps).flatten(1, 2)
    b, r = plan.rows.shape
    if objective.normalization == "rows":
        n = torch.full((objective.ttt_length,), float(batch.input_ids.numel()), device=hidden.device)
    else:
        n = step_rows([batch.loss_mask], objective.ttt_length) if batch.n is None else batch.n
    steps = torch.arange(objective.ttt_length, dtype=torch.float64, device=hidden.device)
    factor = (objective.decay**steps / n)[:, None].to(layers.at_least_fp32(hidden.dtype))
    base = torch.arange(b, device=hidden.device)[:, None] * r
    labels = Labels(
        target=_take(shift(batch.last_hidden, 1), plan.rows).flatten(0, 1).to(frozen.target_head.dtype),
        student=(plan.student + base).flatten(1),
        weight=plan.scored.flatten(1) * factor,
    )
    scores = head_and_kl(student, params[table.HEAD], labels, frozen.target_head, frozen.t2d, frozen.d2t)
    return scores.loss, _aux(scores, plan, n)


def make_plan(batch: Batch, k: int) -> Plan:
    """Find contributing rows and their labels; `batch.rows` if the pipeline made them, else from the mask here."""
    rows = contributing_rows(batch.loss_mask, k) if batch.rows is None else batch.rows
    s = batch.loss_mask.shape[1]
    steps = torch.arange(k, device=rows.device)[:, None, None]
    first = torch.ones_like(rows, dtype=torch.bool)
    first[:, 1:] = rows[:, 1:] != rows[:, :-1]  # repeats fill short samples
    trained = _take(batch.loss_mask, rows) * first
    student, has_student = _find(rows, rows - steps)
    label, has_label = _find(rows, rows + steps)
    mask = F.pad(batch.loss_mask, (0, k)).expand(k, -1, -1).gather(2, (rows + steps).clamp(max=s + k - 1))
    return Plan(rows, mask * first * has_label, student, has_student & (trained > 0), label)


def unroll(params: Params, batch: Batch, plan: Plan, config: Config, frozen: Frozen) -> Tensor:
    """Un-normed hidden states of the contributing rows after each step: `(K, B, R, H)`."""
    draft, k = config.draft, config.objective.ttt_length
    hidden = layers.project(params, batch.aux_hidden)
    s, dtype = hidden.shape[1], hidden.dtype
    cos, sin = rope_table(draft, s + k, dtype, hidden.device, beyond=k)
    positions = torch.arange(s, device=hidden.device)[None] if batch.position_ids is None else batch.position_ids
    own = _take(positions.expand(hidden.shape[:2]), plan.rows)
    ids = F.pad(batch.input_ids, (0, k + 1))
    groups = draft.num_attention_heads // draft.num_key_value_heads
    mask = block_mask(batch.attention_mask, dtype)[:, 0]
    mask = _take(mask, plan.rows)[:, None]

    embeds = layers.embed(params, frozen, ids[:, 1 : s + 1], dtype)
    _, key, value = layers.qkv(params, draft, embeds, hidden, cos[positions][:, None], sin[positions][:, None], q=False)
    keys, values = [layers.repeat_heads(key, groups)], [layers.repeat_heads(value, groups)]
    hidden, out = _take(hidden, plan.rows), []
    for i in range(k):
        embeds = layers.embed(params, frozen, ids.gather(1, plan.rows + i + 1), dtype)
        turn = cos[own + i][:, None], sin[own + i][:, None]
        q, key, value = layers.qkv(params, draft, embeds, hidden, *turn, kv=i > 0)
        if i:
            keys.append(layers.repeat_heads(key, groups))
            values.append(layers.repeat_heads(value, groups))
        hidden = layers.finish_layer(params, draft, hidden, unrolled_attention(q, keys, values, mask))
        out.append(hidden)
    return torch.stack(out)


def _take(x: Tensor, rows: Tensor) -> Tensor:
    """Rows `(B, R)` of `x` `(B, S, …)`."""
    index = rows.view(*rows.shape, *(1,) * (x.ndim - 2)).expand(*rows.shape, *x.shape[2:])
    return x.gather(1, index)


def _find(rows: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Where each of `wanted` `(K, B, R)` stands in the ascending `rows` `(B, R)`, and whether it does."""
    haystack = rows.expand(wanted.shape).contiguous()
    place = torch.searchsorted(haystack, wanted.contiguous()).clamp(max=rows.shape[1] - 1)
    return place, haystack.gather(2, place) == wanted


@torch.no_grad()
def _aux(scores: Scores, plan: Plan, n: Tensor) -> Aux:
    k, (b, r) = len(n), plan.rows.shape

    def by_row(x: Tensor) -> Tensor:
        return x.view(k, b, r).gather(2, plan.label)

    alive = plan.mask.cumprod(0)
    correct, accept = by_row(scores.correct), by_row(scores.accept)
    known = by_row(scores.known.expand(k, -1)) & (plan.mask > 0)
    counted = plan.scored.flatten(1) & scores.known
    return Aux(
        losses=(scores.kl * counted).sum(1) / n,
        correct=(correct * plan.mask).sum((1, 2)),
        rows=plan.mask.sum((1, 2)),
        accept=(accept * known).sum((1, 2)),
        accept_rows=known.sum((1, 2)).to(accept.dtype),
        greedy=(alive * correct.long().cumprod(0)).sum().float(),
        sampled=(alive * accept.cumprod(0)).sum().float(),
    )

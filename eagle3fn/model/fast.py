"""The fast operations: the same mathematics on the rows that reach a loss term.

A place of the batch is written `b·S + t`. Unroll step `i` scores row `t` against the label at
`t + i`. So only rows that the mask trains at some step contribute: the `T` rows of the whole batch,
as one list.

Every place gives its key and value of step 0. Queries, MLP, keys of later steps, head and loss are
made for the listed rows only. What depends on a token alone is made once for the batch, not at each
step.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from eagle3fn.base.config import Config
from eagle3fn.base.draft_config import DraftConfig
from eagle3fn.base.dtypes import at_least_fp32
from eagle3fn.base.rows import first_of_repeats, row_lists, trained_row_counts
from eagle3fn.base.types import Aux, Batch, Frozen, Params
from eagle3fn.model import table
from eagle3fn.model.block_attention import Blocks, block_attention, make_blocks
from eagle3fn.model.flash_attention import flash_attention, has_flash_kernel
from eagle3fn.model.fused_layers import fused_rms_norm, mlp, norm_linear
from eagle3fn.model.head_loss import Labels, Scores, head_and_loss
from eagle3fn.model.losses import RowLoss
from eagle3fn.model.unroll import Ops, Rows
from eagle3fn.model.visibility import Visible

# Rows


class RowPlan(NamedTuple):
    """Which rows take part, and how rows and labels find each other.

    For example one sample of S = 8 with K = 3, whose labels at places 2, 3 and 6 are trained:

        rows      0  1  2  3  4  5  6            labels    2  3  6

        trained against the label at t + i       scored by the row at u - i
        i = 0     ·  ·  2  3  ·  ·  6            i = 0     2  3  6
        i = 1     ·  2  3  ·  ·  6  ·            i = 1     1  2  5
        i = 2     2  3  ·  ·  6  ·  ·            i = 2     0  1  4

    The left table is `trained` (where it has a number) and `label_of_row`, the right one `scored`
    and `row_of_label`. The tables show places; the fields hold indices into `labels` and `listed`.
    """

    rows: Rows  # as the unroll reads them: the list, then all of it at every step
    labels: Tensor  # (P,) int64: places whose label is trained, ascending
    trained: Tensor  # (K, T) int64: 1 where the row is trained at the step
    label_of_row: Tensor  # (K, T) int64: index into `labels`; any value where `trained` is 0
    scored: Tensor  # (K, P) bool: the label is scored at the step
    row_of_label: Tensor  # (K, P) int64: index into the list; any value where `scored` is False


def plan_rows(batch: Batch) -> RowPlan:
    """The batch's rows and labels, or else those of its mask, and their pairs at each step.

    A list may repeat a place to fill up its length; the first of them counts.
    """
    _, k, s = batch.row_mask.shape
    rows, labels = batch.rows, batch.labels
    if rows is None or labels is None:
        rows, labels = row_lists(batch.row_mask)
    mask = batch.row_mask.transpose(0, 1).flatten(1)  # (K, B·S)

    # Look each partner up in the other list: the label at t + i, the row at u - i.
    steps = torch.arange(k, device=rows.device)[:, None]
    label_of_row, has_label = _find(labels, rows + steps)
    row_of_label, has_row = _find(rows, labels - steps)

    # A pair counts once, and if the mask trains its row at the step.
    label_in_sample = rows % s + steps < s
    trained = mask[:, rows] * (has_label & label_in_sample & first_of_repeats(rows))
    is_trained = mask.gather(1, (labels - steps).clamp(min=0)) > 0
    row_in_sample = labels % s >= steps
    scored = has_row & row_in_sample & first_of_repeats(labels) & is_trained
    return RowPlan(
        rows=[rows, *[None] * (k - 1)],
        labels=labels,
        trained=trained,
        label_of_row=label_of_row,
        scored=scored,
        row_of_label=row_of_label,
    )


def _find(places: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of `wanted` `(K, X)` in ascending `places` `(T,)`, and whether they are there."""
    found = torch.searchsorted(places, wanted).clamp(max=len(places) - 1)
    return found, places[found] == wanted


# The layer

# Matrices with one input, stacked. Queries, keys and values are projections of the embedding and
# the hidden state, next to each other: their matrix is split by columns.
_QKV_EMBED = "qkv of the embedding"  # (q + 2·kv, H)
_QKV_HIDDEN = "qkv of the hidden state"  # (q + 2·kv, H)
_GATE_UP = "gate and up"  # (2·I, H)


def _stacked(params: Params) -> Params:
    qkv = torch.cat([params[table.Q], params[table.K], params[table.V]])
    embed, hidden = qkv.chunk(2, dim=1)
    gate_up = torch.cat([params[table.GATE], params[table.UP]])
    return params | {_QKV_EMBED: embed, _QKV_HIDDEN: hidden, _GATE_UP: gate_up}


class _Tokens(NamedTuple):
    """What the next token's embedding gives to queries, keys and values, of every entry of
    `next_ids`.
    """

    projected: Tensor  # (B·(S + K - 1), q + 2·kv)
    length: int  # S + K - 1
    s: int

    def at(self, rows: Tensor, step: int) -> Tensor:
        """Where rows `b·S + t` read at a step: entry `t + step` of their sample."""
        return rows // self.s * self.length + rows % self.s + step


def _tokens(weights: Params, batch: Batch, draft: DraftConfig, frozen: Frozen) -> _Tokens:
    matrix = weights[table.EMBED] if frozen.embed_tokens is None else frozen.embed_tokens
    embeds = F.embedding(batch.next_ids, matrix).to(weights[_QKV_EMBED].dtype)
    normed = fused_rms_norm(embeds, weights[table.INPUT_NORM], draft.rms_norm_eps)
    projected = F.linear(normed, weights[_QKV_EMBED]).flatten(0, 1)
    return _Tokens(projected, batch.next_ids.shape[1], batch.aux_hidden.shape[1])


def _qkv(
    weights: Params, draft: DraftConfig, tokens: _Tokens, hidden: Tensor, rows: Tensor, step: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of the rows `(T, N, E)`; keys and values, of every place `(B, S, J, E)` at step 0,
    then of the rows `(T, J, E)`.
    """
    n, j, e = draft.num_attention_heads, draft.num_key_value_heads, draft.head_dim
    norm, matrix = weights[table.HIDDEN_NORM], weights[_QKV_HIDDEN]
    place = tokens.at(rows, step)
    if step > 0:
        heads = norm_linear(hidden, norm, matrix, tokens.projected, place, draft.rms_norm_eps)
        heads = heads.view(len(rows), n + 2 * j, e)
        value = heads[:, n + j :].clone()  # a view would keep the queries alive
        return heads[:, :n], heads[:, n : n + j], value

    # Step 0: the products are split, by rows of the matrix.
    b, s, _ = hidden.shape
    normed = fused_rms_norm(hidden.flatten(0, 1), norm, draft.rms_norm_eps)
    from_tokens = tokens.projected.view(b, -1, len(matrix))[:, :s, n * e :].flatten(0, 1)
    kv = torch.addmm(from_tokens, normed, matrix[n * e :].T).view(b, s, 2 * j, e)
    from_tokens = tokens.projected[:, : n * e].index_select(0, place)
    query = torch.addmm(from_tokens, normed[rows], matrix[: n * e].T)
    return query.view(len(rows), n, e), kv[:, :, :j], kv[:, :, j:]


class _Sight(NamedTuple):
    """What the rows see."""

    rows: Tensor  # (T,)
    blocks: Blocks | None  # None: all before them, by the flash kernel


def _sight(seen: Visible, rows: Tensor, key: Tensor, attention_mask: Tensor) -> _Sight:
    """The flash kernel where there is one, else blocks, which are cut on the host."""
    if seen.first is None and has_flash_kernel(key.device, key.dtype, key.shape[-1]):
        return _Sight(rows, None)
    return _Sight(rows, make_blocks(rows, key.shape[1], seen))


def _attend(query: Tensor, keys: list[Tensor], values: list[Tensor], sight: _Sight) -> Tensor:
    parts = query, keys[0], values[0], keys[1:], values[1:]
    if sight.blocks is None:
        return flash_attention(*parts, sight.rows)
    return block_attention(*parts, sight.blocks)


def _output(weights: Params, hidden: Tensor, attended: Tensor) -> Tensor:
    return torch.addmm(hidden, attended.flatten(1), weights[table.O].T)


def _mlp(weights: Params, hidden: Tensor, eps: float) -> Tensor:
    return mlp(hidden, weights[table.POST_NORM], weights[_GATE_UP], weights[table.DOWN], eps)


# Head, loss and metrics


def _score(
    params: Params,
    states: Iterable[Tensor],
    plan: RowPlan,
    batch: Batch,
    config: Config,
    frozen: Frozen,
    loss: RowLoss,
) -> tuple[Tensor, Aux]:
    """`Σ_i decay^i / n_i · Σ loss` of step i's pairs, with n_i the rows of the normalization."""
    objective = config.objective
    norm = params[table.NORM]
    eps = config.draft.rms_norm_eps
    draft = torch.stack([fused_rms_norm(hidden, norm, eps) for hidden in states])  # (K, T, H)

    # Each step's denominator.
    if objective.normalization == "rows":
        every = float(batch.attention_mask.numel())
        row_counts = torch.full((len(draft),), every, dtype=torch.float32, device=draft.device)
    elif batch.row_counts is None:
        row_counts = trained_row_counts([batch.row_mask])
    else:
        row_counts = batch.row_counts

    # Head and loss, with each step's factor in the pairs' weights.
    steps = torch.arange(len(draft), dtype=torch.float64, device=draft.device)
    factor = (objective.decay**steps / row_counts)[:, None]
    factor = factor.to(at_least_fp32(draft.dtype))  # (K, 1)
    target = batch.label_hidden.flatten(0, 1)[plan.labels].to(frozen.target_head.dtype)
    labels = Labels(target, row=plan.row_of_label, weight=plan.scored * factor)
    scores = head_and_loss(
        draft, params[table.HEAD], labels, frozen.target_head, frozen.t2d, frozen.d2t, loss
    )
    return scores.loss, _aux(scores, plan, row_counts)


@torch.no_grad()
def _aux(scores: Scores, plan: RowPlan, row_counts: Tensor) -> Aux:
    """Metrics by step from those of pairs."""
    # By row, for what is accepted in a run: all steps of a row up to the first that fails.
    alive = plan.trained.cumprod(0)  # (K, T)
    correct = scores.correct.gather(1, plan.label_of_row)
    accept = scores.accept.gather(1, plan.label_of_row)

    # Rows whose label's token is in the draft vocabulary, and the same pairs by label.
    known = scores.known[plan.label_of_row] & (plan.trained > 0)
    counted = plan.scored & scores.known
    return Aux(
        losses=torch.where(counted, scores.row_loss, 0.0).sum(1) / row_counts,
        correct=(correct * plan.trained).sum(1),
        rows=plan.trained.sum(1),
        accept=(accept * known).sum(1),
        accept_rows=known.sum(1).to(accept.dtype),
        greedy=(alive * correct.long().cumprod(0)).sum().float(),
        sampled=(alive * accept.cumprod(0)).sum().float(),
    )


FAST = Ops(
    weights=_stacked,
    tokens=_tokens,
    plan=plan_rows,
    norm=fused_rms_norm,
    qkv=_qkv,
    head_axis=-2,
    shared=lambda heads, groups: heads,
    sight=_sight,
    attend=_attend,
    output=_output,
    mlp=_mlp,
    score=_score,
)
"""The fast operations."""

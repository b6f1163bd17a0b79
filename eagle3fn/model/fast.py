"""The fast operations: the same mathematics on the rows that reach a loss term.

A place of the batch is written `b·S + t`. Unroll step `i` scores row `t` against the label at
`t + i`. So a row matters up to the last step at which the mask trains it, and if the row survives
to it (`Batch.survives`). The rows of the whole batch are one list, those of most steps first: each
step works on the first of them.

Every place gives its key and value of step 0. Queries, MLP, keys of later steps, head and loss are
made for a step's rows only. What depends on a token alone is made once for the batch, not at each
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
from eagle3fn.base.rows import RowPlan, plan_rows, surviving, trained_row_counts
from eagle3fn.base.types import Aux, Batch, Frozen, Params
from eagle3fn.model import table
from eagle3fn.model.block_attention import Blocks, block_attention, make_blocks
from eagle3fn.model.flash_attention import (
    Packing,
    flash_attention,
    has_flash_kernel,
    packing_of,
)
from eagle3fn.model.fused_layers import fused_rms_norm, mlp, norm_linear
from eagle3fn.model.head_loss import Pairs, Scores, head_and_loss
from eagle3fn.model.losses import RowLoss, survival_rate
from eagle3fn.model.plain import embedding
from eagle3fn.model.unroll import Ops
from eagle3fn.model.visibility import Visible

# Rows


def _plan(batch: Batch) -> RowPlan:
    """The batch's plan, or else the one of its masks, which waits for a device."""
    if batch.plan is not None:
        return batch.plan
    return plan_rows(batch.row_mask, batch.survives, batch.starts)


# The layer

# Matrices with one input, stacked, and their biases. Queries, keys and values of the first layer
# are projections of the embedding and the hidden state, next to each other: their matrix is split
# by columns. With these names a layer's are `layer.q + name`.
_QKV_EMBED = " … of the embedding"  # (q + 2·kv, H)
_QKV_HIDDEN = " … of the hidden state"  # (q + 2·kv, H)
_QKV_BIAS = " … biases"  # (q + 2·kv,)
_GATE_UP = " … gate and up"  # (2·I, H)


def _stacked(params: Params, draft: DraftConfig) -> Params:
    stacked = dict(params)
    for layer in table.layers(draft):
        qkv = torch.cat([params[layer.q], params[layer.k], params[layer.v]])
        if layer.number == 0:
            stacked[layer.q + _QKV_EMBED], qkv = qkv.chunk(2, dim=1)
        stacked[layer.q + _QKV_HIDDEN] = qkv
        if draft.attention_bias:
            biases = [params[layer.q_bias], params[layer.k_bias], params[layer.v_bias]]
            stacked[layer.q + _QKV_BIAS] = torch.cat(biases)
        stacked[layer.q + _GATE_UP] = torch.cat([params[layer.gate], params[layer.up]])
    return stacked


class _Tokens(NamedTuple):
    """What the next token's embedding gives to queries, keys and values of the first layer, of
    every entry of `next_ids`; their biases are in it.
    """

    projected: Tensor  # (B·(S + K - 1), q + 2·kv)
    length: int  # S + K - 1
    s: int

    def at(self, rows: Tensor, step: int) -> Tensor:
        """Where rows `b·S + t` read at a step: entry `t + step` of their sample."""
        return rows // self.s * self.length + rows % self.s + step


def _tokens(weights: Params, batch: Batch, draft: DraftConfig, frozen: Frozen) -> _Tokens:
    layer = table.FIRST
    matrix = weights[layer.q + _QKV_EMBED]
    embeds = F.embedding(batch.next_ids, embedding(weights, draft, frozen)).to(matrix.dtype)
    normed = fused_rms_norm(embeds, weights[layer.input_norm], draft.rms_norm_eps)
    projected = F.linear(normed, matrix, weights.get(layer.q + _QKV_BIAS)).flatten(0, 1)
    return _Tokens(projected, batch.next_ids.shape[1], batch.aux_hidden.shape[1])


def _qkv(
    weights: Params,
    draft: DraftConfig,
    layer: table.Layer,
    tokens: _Tokens,
    hidden: Tensor,
    rows: Tensor,
    step: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of the rows `(T, N, E)`; keys and values, of every place `(B, S, J, E)` at step 0,
    then of the rows `(T, J, E)`.
    """
    n, j, e = draft.num_attention_heads, draft.num_key_value_heads, draft.head_dim
    if step > 0:
        heads = _of_rows(weights, draft, layer, tokens, hidden, rows, step)
        heads = heads.view(len(rows), n + 2 * j, e)
        value = heads[:, n + j :].clone()  # a view would keep the queries alive
        return heads[:, :n], heads[:, n : n + j], value

    # Step 0: the products are split, by rows of the matrix.
    b, s, _ = hidden.shape
    matrix, bias = weights[layer.q + _QKV_HIDDEN], weights.get(layer.q + _QKV_BIAS)
    normed = _normed(weights, draft, layer, hidden.flatten(0, 1))
    if layer.number:
        to_query = None if bias is None else bias[: n * e]
        to_kv = None if bias is None else bias[n * e :]
    else:
        to_query = tokens.projected[:, : n * e].index_select(0, tokens.at(rows, step))
        to_kv = tokens.projected.view(b, -1, len(matrix))[:, :s, n * e :].flatten(0, 1)
    kv = _product(normed, matrix[n * e :], to_kv).view(b, s, 2 * j, e)
    query = _product(normed[rows], matrix[: n * e], to_query)
    return query.view(len(rows), n, e), kv[:, :, :j], kv[:, :, j:]


def _of_rows(
    weights: Params,
    draft: DraftConfig,
    layer: table.Layer,
    tokens: _Tokens,
    hidden: Tensor,
    rows: Tensor,
    step: int,
) -> Tensor:
    """Queries, keys and values of rows `(T, H)` next to each other, `(T, q + 2·kv)`."""
    matrix = weights[layer.q + _QKV_HIDDEN]
    if layer.number:
        normed = _normed(weights, draft, layer, hidden)
        return _product(normed, matrix, weights.get(layer.q + _QKV_BIAS))

    place = tokens.at(rows, step)
    if draft.norm_before_residual:
        return _product(hidden, matrix, tokens.projected.index_select(0, place))
    norm = weights[layer.hidden_norm]
    return norm_linear(hidden, norm, matrix, tokens.projected, place, draft.rms_norm_eps)


def _normed(weights: Params, draft: DraftConfig, layer: table.Layer, hidden: Tensor) -> Tensor:
    """What the layer's projections read of hidden states."""
    if layer.number:
        return fused_rms_norm(hidden, weights[layer.input_norm], draft.rms_norm_eps)
    if draft.norm_before_residual:
        return hidden  # normed already
    return fused_rms_norm(hidden, weights[layer.hidden_norm], draft.rms_norm_eps)


def _product(x: Tensor, matrix: Tensor, added: Tensor | None) -> Tensor:
    """`x · matrixᵀ`, plus a vector or rows that are added."""
    return x @ matrix.T if added is None else torch.addmm(added, x, matrix.T)


class _Sight(NamedTuple):
    """What the rows see."""

    rows: Tensor  # (T,)
    blocks: Blocks | None  # None: all of their conversations before them, by the flash kernel
    packing: Packing | None  # where conversations begin, for that kernel


def _sight(
    seen: Visible, rows: Tensor, batch: Batch, draft: DraftConfig, dtype: torch.dtype
) -> _Sight:
    """The flash kernel where there is one, else blocks, which are cut on the host."""
    sees_all = draft.draft_window is None
    if sees_all and has_flash_kernel(rows.device, dtype, draft.head_dim):
        packing = None if batch.starts is None else packing_of(_plan(batch))
        return _Sight(rows, None, packing)
    return _Sight(rows, make_blocks(rows, batch.attention_mask.shape[1], seen), None)


def _attend(query: Tensor, keys: list[Tensor], values: list[Tensor], sight: _Sight) -> Tensor:
    parts = query, keys[0], values[0], keys[1:], values[1:]
    if sight.blocks is None:
        return flash_attention(*parts, sight.rows, sight.packing)
    return block_attention(*parts, sight.blocks)


def _output(weights: Params, layer: table.Layer, hidden: Tensor, attended: Tensor) -> Tensor:
    bias = weights.get(layer.o_bias)
    if bias is not None:
        hidden = hidden + bias
    return torch.addmm(hidden, attended.flatten(1), weights[layer.o].T)


def _mlp(weights: Params, layer: table.Layer, hidden: Tensor, eps: float) -> Tensor:
    gate_up, down = weights[layer.q + _GATE_UP], weights[layer.down]
    return mlp(hidden, weights[layer.post_norm], gate_up, down, eps)


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
    """`Σ_i decay^i / (n_i · chance_i) · Σ loss` of step i's pairs.

    n_i are the rows of the normalization, of which a row is scored with `chance_i = survival^i`.
    """
    objective = config.objective
    norm = params[table.NORM]
    eps = config.draft.rms_norm_eps

    # The states of all steps' rows, one step after another.
    draft = torch.cat([fused_rms_norm(hidden, norm, eps) for hidden in states])  # (R, H)

    # Each step's denominator.
    if objective.normalization == "rows":
        every = float(batch.attention_mask.numel())
        row_counts = batch.row_mask.new_full((objective.ttt_length,), every, dtype=torch.float32)
    elif batch.row_counts is None:
        row_counts = trained_row_counts([batch.row_mask])
    else:
        row_counts = batch.row_counts

    # Each step's factor, in the weights of its pairs; 0 where the mask does not train the row.
    steps = torch.arange(objective.ttt_length, dtype=torch.float64, device=draft.device)
    chance = survival_rate(objective, batch) ** steps
    factor = (objective.decay**steps / (row_counts * chance)).to(at_least_fp32(draft.dtype))
    weight = _is_trained(batch, plan) * factor[plan.step]

    # Head and loss.
    target = batch.label_hidden.flatten(0, 1)[plan.labels].to(frozen.target_head.dtype)
    pairs = Pairs(target, plan.label, plan.state, weight, plan.first)
    scores = head_and_loss(
        draft, params[table.HEAD], pairs, frozen.target_head, frozen.t2d, frozen.d2t, loss
    )
    return scores.loss, _aux(scores, plan, weight > 0, row_counts, chance)


def _is_trained(batch: Batch, plan: RowPlan) -> Tensor:
    """Whether the mask trains each pair's row at its step: `(X,)` int64."""
    mask = surviving(batch.row_mask, batch.survives)
    place = plan.rows[plan.row]
    s = mask.shape[-1]
    return mask[place // s, plan.step, place % s]


@torch.no_grad()
def _aux(scores: Scores, plan: RowPlan, trained: Tensor, row_counts: Tensor, chance: Tensor) -> Aux:
    """Metrics by step from those of pairs; see `Aux`."""

    def by_step(values: Tensor) -> Tensor:
        """Values of pairs `(X,)` by step and row, `(K, T)`; 0 where no pair is trained."""
        values = torch.where(trained, values, values.new_zeros(()))
        table = values.new_zeros(len(chance), len(plan.rows))
        return table.index_put_((plan.step, plan.row), values)

    # Rows whose label's token is in the draft vocabulary.
    known = by_step(scores.known)
    losses = by_step(torch.where(scores.known, scores.row_loss, 0.0))

    # A chain of drafted tokens: all steps of a row up to the first that fails or is not trained.
    rows = by_step(trained.long())
    correct = by_step(scores.correct).long()
    accept = by_step(scores.accept)
    run = correct.cumprod(0)  # 1 where the tokens up to this step are right
    reached = rows * torch.cat([torch.ones_like(run[:1]), run[:-1]])

    # A row that survived to a step stands for those that did not.
    stands_for = (1 / chance)[:, None]
    return Aux(
        losses=losses.sum(1) / (row_counts * chance).to(row_counts.dtype),
        correct=correct.sum(1),
        rows=rows.sum(1),
        chain_rows=reached.sum(1),
        chain_correct=run.sum(1),
        accept=(accept * known).sum(1),
        accept_rows=known.sum(1).to(accept.dtype),
        greedy=(stands_for * run).sum().float(),
        sampled=(stands_for * accept.cumprod(0)).sum().float(),
    )


FAST = Ops(
    weights=_stacked,
    tokens=_tokens,
    plan=_plan,
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

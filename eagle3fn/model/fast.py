"""The fast numerics of `forward_loss`: the same mathematics on the rows that reach a loss term.

A place of the batch is written `b·S + t`. A label is a place that the mask trains; unroll step `i`
scores row `t` against the label at `t + i`. So only rows with a label among `t … t + K - 1`
contribute: the `T` rows of the whole batch, as one list.

Every place gives its key and value of step 0. Queries, MLP, keys of later steps, head and loss are
made for the listed rows only. What depends on a token alone is made once for the batch, not at each
step.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from eagle3fn.base.config import Config
from eagle3fn.base.dtypes import at_least_fp32
from eagle3fn.base.rows import contributing_rows, first_of_repeats, trained_row_counts
from eagle3fn.base.types import Aux, Batch, Frozen, Params
from eagle3fn.model import layers, table
from eagle3fn.model.block_attention import block_attention, make_blocks
from eagle3fn.model.flash_attention import flash_attention, has_flash_kernel
from eagle3fn.model.fused_layers import fused_rms_norm, mlp, norm_linear
from eagle3fn.model.head_loss import Labels, Scores, head_and_loss
from eagle3fn.model.losses import RowLoss
from eagle3fn.model.rope import rope_table, rotate


class RowPlan(NamedTuple):
    """Which rows take part, and how rows and labels find each other.

    For example one sample of S = 8 with K = 3, its mask 1 at places 2, 3 and 6:

        rows      0  1  2  3  4  5  6            labels    2  3  6

        trained against the label at t + i       scored by the row at u - i
        i = 0     ·  ·  2  3  ·  ·  6            i = 0     2  3  6
        i = 1     ·  2  3  ·  ·  6  ·            i = 1     1  2  5
        i = 2     2  3  ·  ·  6  ·  ·            i = 2     0  1  4

    The left table is `trained` (where it has a number) and `label_of_row`, the right one `scored`
    and `row_of_label`. The tables show places; the fields hold indices into `labels` and `rows`.
    """

    rows: Tensor  # (T,) int64: places that contribute, ascending
    labels: Tensor  # (P,) int64: places that are trained, ascending
    trained: Tensor  # (K, T) int64: 1 where the row is trained at the step
    label_of_row: Tensor  # (K, T) int64: index into `labels`; any value where `trained` is 0
    scored: Tensor  # (K, P) bool: the label is scored at the step
    row_of_label: Tensor  # (K, P) int64: index into `rows`; any value where `scored` is False


class Weights(NamedTuple):
    """The layer's matrices, those with one input stacked.

    Queries, keys and values are projections of the embedding and the hidden state, side by side.
    Their matrix is split by columns: what reads the embedding, and what reads the hidden state.
    """

    qkv_embed: Tensor  # (q + 2·kv, H)
    qkv_hidden: Tensor  # (q + 2·kv, H)
    o: Tensor  # (H, q)
    gate_up: Tensor  # (2·I, H)
    down: Tensor  # (H, I)


def forward_fast(
    params: Params, batch: Batch, config: Config, frozen: Frozen, loss: RowLoss
) -> tuple[Tensor, Aux]:
    """Loss and metrics as `forward_loss` documents them, to rounding.

    loss = Σ_i decay^i / n_i · Σ KL of step i's pairs, with n_i the rows of the normalization.
    """
    objective = config.objective
    k = objective.ttt_length
    plan = plan_rows(batch, k)
    draft = unroll(params, batch, plan.rows, config, frozen)  # (K, T, H)

    # Each step's denominator.
    if objective.normalization == "rows":
        rows = float(batch.input_ids.numel())
        row_counts = torch.full((k,), rows, dtype=torch.float32, device=draft.device)
    elif batch.row_counts is None:
        row_counts = trained_row_counts([batch.row_mask], k)
    else:
        row_counts = batch.row_counts

    # Head and loss, with each step's factor in the pairs' weights.
    steps = torch.arange(k, dtype=torch.float64, device=draft.device)
    factor = (objective.decay**steps / row_counts)[:, None]
    factor = factor.to(at_least_fp32(draft.dtype))  # (K, 1)
    labels = Labels(
        target=label_targets(batch, plan.labels, frozen),
        row=plan.row_of_label,
        weight=plan.scored * factor,
    )
    scores = head_and_loss(
        draft, params[table.HEAD], labels, frozen.target_head, frozen.t2d, frozen.d2t, loss
    )
    return scores.loss, _aux(scores, plan, row_counts)


def plan_rows(batch: Batch, k: int) -> RowPlan:
    """The batch's rows and labels, or else those of its mask, and their pairs at `k` steps.

    A list may repeat a place to fill up its length; the first of them counts.
    """
    s = batch.row_mask.shape[1]
    mask = batch.row_mask.flatten()
    rows = contributing_rows(batch.row_mask, k) if batch.rows is None else batch.rows
    labels = contributing_rows(batch.row_mask, 1) if batch.labels is None else batch.labels

    # Look each partner up in the other list: the label at t + i, the row at u - i.
    steps = torch.arange(k, device=rows.device)[:, None]
    label_of_row, has_label = _find(labels, rows + steps)
    row_of_label, has_row = _find(rows, labels - steps)

    # A pair counts within one sample, once, and if the mask trains the label: a batch without a
    # trained one has labels that only fill the list.
    label_in_sample = rows % s + steps < s
    row_in_sample = labels % s >= steps
    is_trained = mask[labels] > 0
    trained = has_label & label_in_sample & first_of_repeats(rows) & is_trained[label_of_row]
    scored = has_row & row_in_sample & first_of_repeats(labels) & is_trained
    return RowPlan(
        rows=rows,
        labels=labels,
        trained=trained.long(),
        label_of_row=label_of_row,
        scored=scored,
        row_of_label=row_of_label,
    )


def unroll(params: Params, batch: Batch, rows: Tensor, config: Config, frozen: Frozen) -> Tensor:
    """Normed hidden states of the draft rows after each step: `(K, T, H)`.

    Step i of row t reads the embedding of token t + i + 1 and the hidden state of step i - 1 (at
    step 0 the projected taps), rotates by position t + i, and attends to the step-0 keys at places
    u ≤ t and to its own later ones.

    Args:
        params: the draft's tensors.
        batch: see `Batch`.
        rows: places `b·S + t`, `(T,)` int64, ascending.
        config: `draft` and `objective.ttt_length` are read.
        frozen: the target's embedding is read.
    """
    draft = config.draft
    k = config.objective.ttt_length
    b, s = batch.input_ids.shape
    n = draft.num_attention_heads
    j = draft.num_key_value_heads
    e = draft.head_dim
    eps = draft.rms_norm_eps
    weights = _weights(params)
    hidden = layers.project(params, batch.aux_hidden).flatten(0, 1)  # (B·S, H)
    attend = attention_on(hidden.device, hidden.dtype, e, rows, s)

    # What tokens give to queries, keys and values, and the rows' places in it at each step.
    from_embeds = _from_embeds(params, batch, weights, config, frozen)  # (B·(S + K), q + 2·kv)
    place = rows // s * (s + k) + rows % s
    place = place + torch.arange(k, device=rows.device)[:, None]  # (K, T)

    # Rotary tables up to the last step's positions.
    positions = batch.position_ids
    if positions is None:
        positions = torch.arange(s, device=rows.device)
    positions = positions.expand(b, s).flatten()  # (B·S,)
    tables = rope_table(draft, s + k, hidden.dtype, hidden.device, beyond=k)
    cos, sin = (x[:, None] for x in tables)  # (S + K, 1, E)

    # Step 0, every place: keys and values.
    normed = fused_rms_norm(hidden, params[table.HIDDEN_NORM], eps)
    kv = torch.addmm(
        from_embeds.view(b, s + k, -1)[:, :s, n * e :].flatten(0, 1),
        normed,
        weights.qkv_hidden[n * e :].T,
    )
    kv = kv.view(b, s, 2 * j, e)
    angles = (x[positions].view(b, s, 1, e) for x in (cos, sin))
    key = rotate(kv[:, :, :j], *angles)  # (B, S, J, E)
    value = kv[:, :, j:]

    # Step 0, the rows: queries. From here on all is of the listed rows.
    hidden = hidden[rows]  # (T, H)
    positions = positions[rows]
    qkv = torch.addmm(
        from_embeds[:, : n * e].index_select(0, place[0]),
        normed[rows],
        weights.qkv_hidden[: n * e].T,
    )

    step_keys: list[Tensor] = []
    step_values: list[Tensor] = []
    out: list[Tensor] = []
    for i in range(k):
        # Later steps: queries, and a key and a value of the row's own.
        if i > 0:
            qkv = norm_linear(
                hidden, params[table.HIDDEN_NORM], weights.qkv_hidden, from_embeds, place[i], eps
            )
        heads = qkv.view(len(rows), -1, e)  # (T, N, E), later (T, N + 2·J, E)
        rotated = rotate(heads[:, : n + j], cos[positions + i], sin[positions + i])
        if i > 0:
            step_keys.append(rotated[:, n:])
            step_values.append(heads[:, n + j :].clone())  # a view would keep the queries alive

        # The rest of the layer, and the norm before the head.
        attended = attend(rotated[:, :n], key, value, step_keys, step_values)
        hidden = torch.addmm(hidden, attended.flatten(1), weights.o.T)
        hidden = mlp(hidden, params[table.POST_NORM], weights.gate_up, weights.down, eps)
        out.append(fused_rms_norm(hidden, params[table.NORM], eps))
    return torch.stack(out)


def attention_on(
    device: torch.device, dtype: torch.dtype, head_size: int, rows: Tensor, s: int
) -> Callable[..., Tensor]:
    """Attention of queries at `rows` of `B·S`.

    The flash kernel where there is one, else in blocks, which are cut on the host.
    """
    if has_flash_kernel(device, dtype, head_size):
        return partial(flash_attention, rows=rows)
    return partial(block_attention, rows=rows, blocks=make_blocks(rows, s))


def _weights(params: Params) -> Weights:
    qkv = torch.cat([params[table.Q], params[table.K], params[table.V]])
    qkv_embed, qkv_hidden = qkv.chunk(2, dim=1)
    return Weights(
        qkv_embed=qkv_embed,
        qkv_hidden=qkv_hidden,
        o=params[table.O],
        gate_up=torch.cat([params[table.GATE], params[table.UP]]),
        down=params[table.DOWN],
    )


def _from_embeds(
    params: Params, batch: Batch, weights: Weights, config: Config, frozen: Frozen
) -> Tensor:
    """What the next token's embedding gives to queries, keys and values.

    A flat list `(B·(S + K), q + 2·kv)`: places `0 … S + K - 1` of each sample. Past the end of the
    sequence the token is 0.
    """
    k = config.objective.ttt_length
    next_ids = F.pad(batch.input_ids, (0, k + 1))[:, 1:]  # (B, S + K)
    embeds = layers.embed(params, frozen, next_ids, weights.qkv_embed.dtype)
    normed = fused_rms_norm(embeds, params[table.INPUT_NORM], config.draft.rms_norm_eps)
    return F.linear(normed, weights.qkv_embed).flatten(0, 1)


def label_targets(batch: Batch, labels: Tensor, frozen: Frozen) -> Tensor:
    """The target's last hidden states `(P, Ht)` one place after the labels; zero past the end."""
    s = batch.last_hidden.shape[1]
    states = batch.last_hidden.flatten(0, 1)
    inside = (labels % s + 1 < s)[:, None]
    last = len(states) - 1
    return torch.where(inside, states[(labels + 1).clamp(max=last)], 0).to(frozen.target_head.dtype)


def _find(places: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of `wanted` `(K, X)` in ascending `places` `(T,)`, and whether they are there."""
    found = torch.searchsorted(places, wanted).clamp(max=len(places) - 1)
    return found, places[found] == wanted


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

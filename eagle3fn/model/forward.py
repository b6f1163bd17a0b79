"""`forward_loss(params, batch) → (loss, aux)`: the EAGLE-3 objective as one pure function."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eagle3fn.base.config import Config
from eagle3fn.base.rows import shift, step_rows
from eagle3fn.base.types import Aux, Batch, Frozen, Params, Teacher
from eagle3fn.model import layers, table
from eagle3fn.model.attention import block_mask, unrolled_attention
from eagle3fn.model.checks import check_batch
from eagle3fn.model.fast import forward_fast
from eagle3fn.model.losses import KL, correct_rows, kl_on, step_loss
from eagle3fn.model.rope import rope_table
from eagle3fn.model.teacher import make_teacher


class Operations(NamedTuple):
    """The parts of the legacy unroll that exist as kernels too; a comparison of kernels puts in others."""

    kl: KL
    mask: Callable[
        [Tensor, torch.dtype], Any
    ]  # of attention_mask (B, S) and the compute dtype, once
    heads: Callable[
        [Tensor, int], Tensor
    ]  # key-value heads (B, J, S, E) and N / J to what attention reads, each step
    attention: Callable[
        [Tensor, list[Tensor], list[Tensor], Any], Tensor
    ]  # queries, heads so far, mask


def legacy_operations(device: torch.device, dtype: torch.dtype) -> Operations:
    """What the old tool's `sdpa` backend computes on that device."""
    return Operations(kl_on(device, dtype), block_mask, layers.repeat_heads, unrolled_attention)


class _Step(NamedTuple):
    """One unroll step's loss and its detached per-row metrics."""

    loss: Tensor
    correct: Tensor  # (B, S) bool
    accept: Tensor  # (B, S) fp32
    position_mask: Tensor  # (B, S)
    row_mask: Tensor  # (B, S)


def forward_loss(
    params: Params, batch: Batch, *, config: Config, frozen: Frozen
) -> tuple[Tensor, Aux]:
    """The training loss of one micro-batch and its metrics.

    Args:
        params: the draft's tensors in the compute dtype (`model.table.shapes`).
        batch: see `Batch`; padding on the right.
        config: `draft` and `objective` are read; `objective.numerics` chooses the legacy operations or the fast ones.
        frozen: target embedding, head and vocabulary map.

    Returns:
        Scalar fp32 loss `Σ decay^i · L_i`, and `Aux` without gradient.

    Raises:
        UserError: shapes, dtypes or values that don't fit together; it names the field.
    """
    check_batch(params, batch, config, frozen)
    if config.objective.numerics == "fast":
        return forward_fast(params, batch, config, frozen)
    return forward_plain(params, batch, config=config, frozen=frozen)


def forward_plain(
    params: Params,
    batch: Batch,
    *,
    config: Config,
    frozen: Frozen,
    operations: Operations | None = None,
) -> tuple[Tensor, Aux]:
    """`forward_loss` under the legacy numerics, without its checks; `operations` stand in for the legacy ones."""
    objective = config.objective
    operations = operations or legacy_operations(batch.aux_hidden.device, params[table.FC].dtype)
    teacher = make_teacher(shift(batch.last_hidden, 1), batch.row_mask, frozen, objective)
    n = None
    if objective.normalization == "mask":
        n = (
            step_rows([batch.row_mask], objective.ttt_length)
            if batch.row_counts is None
            else batch.row_counts
        )
    steps = list(_unroll(params, batch, teacher, n, config, frozen, operations))
    loss = sum((objective.decay**i * step.loss for i, step in enumerate(steps)), start=0)
    return torch.as_tensor(loss), _aux(steps)


def _unroll(
    params: Params,
    batch: Batch,
    teacher: Teacher,
    n: Tensor | None,
    config: Config,
    frozen: Frozen,
    operations: Operations,
):
    s = batch.input_ids.shape[1]
    hidden = layers.project(params, batch.aux_hidden)
    ids, row_mask, position_mask = shift(batch.input_ids), batch.row_mask, teacher.position_mask
    mask = operations.mask(batch.attention_mask, hidden.dtype)
    k = config.objective.ttt_length
    cos, sin = rope_table(config.draft, s + k, hidden.dtype, hidden.device, beyond=k)
    positions = (
        torch.arange(s, device=ids.device)[None]
        if batch.position_ids is None
        else batch.position_ids
    )
    groups = config.draft.num_attention_heads // config.draft.num_key_value_heads
    keys: list[Tensor] = []
    values: list[Tensor] = []
    for i in range(k):
        embeds = layers.embed(params, frozen, ids, hidden.dtype)
        turn = cos[positions + i][:, None], sin[positions + i][:, None]
        q, key, value = layers.qkv(params, config.draft, embeds, hidden, *turn)
        keys.append(operations.heads(key, groups))
        values.append(operations.heads(value, groups))
        hidden = layers.finish_layer(
            params, config.draft, hidden, operations.attention(q, keys, values, mask)
        )
        logits = layers.logits(params, config.draft, hidden)
        p, q = teacher.p_draft[:, i : i + s], teacher.p_full[:, i : i + s]
        at = None if n is None else n[i]
        loss, accept = step_loss(logits, p, q, position_mask, at, config.objective, operations.kl)
        yield _Step(
            loss=loss,
            correct=correct_rows(logits.detach(), teacher.token[:, i : i + s], frozen),
            accept=accept,
            position_mask=position_mask[..., 0],
            row_mask=row_mask,
        )
        ids, row_mask, position_mask = shift(ids), shift(row_mask), shift(position_mask, 1)


@torch.no_grad()
def _aux(steps: list[_Step]) -> Aux:
    alive = torch.stack([step.row_mask for step in steps]).cumprod(0)
    correct = torch.stack([step.correct for step in steps])
    accept = torch.stack([step.accept for step in steps])
    return Aux(
        losses=torch.stack([step.loss.detach() for step in steps]),
        correct=torch.stack([(step.correct * step.row_mask).sum() for step in steps]),
        rows=torch.stack([step.row_mask.sum() for step in steps]),
        accept=torch.stack(
            [(step.accept * step.position_mask.to(step.accept.dtype)).sum() for step in steps]
        ),
        accept_rows=torch.stack([step.position_mask.to(step.accept.dtype).sum() for step in steps]),
        greedy=(alive * correct.long().cumprod(0)).sum().float(),
        sampled=(alive * accept.cumprod(0)).sum().float(),
    )

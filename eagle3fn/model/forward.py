"""`forward_loss(params, batch) → (loss, aux)`: the EAGLE-3 objective as one pure function.

This file is the plain unroll, operation by operation; `model.fast` computes the same on fewer rows.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from eagle3fn.base.config import Config
from eagle3fn.base.rows import shift, trained_row_counts
from eagle3fn.base.types import Aux, Batch, Frozen, Params, Teacher
from eagle3fn.model import layers
from eagle3fn.model.attention import block_mask, unrolled_attention
from eagle3fn.model.checks import check_batch
from eagle3fn.model.fast import forward_fast
from eagle3fn.model.losses import RowLoss, acceptance, correct_rows, find_loss, step_loss
from eagle3fn.model.rope import rope_table
from eagle3fn.model.teacher import make_teacher


class ForwardLoss(Protocol):
    """A loss of one micro-batch and its metrics, as `forward_loss`."""

    def __call__(
        self,
        params: Params,
        batch: Batch,
        *,
        config: Config,
        frozen: Frozen,
        loss: RowLoss | Callable[..., Tensor] | None = None,
    ) -> tuple[Tensor, Aux]:
        """Scalar loss, and metrics without gradient."""
        ...


class Operations(NamedTuple):
    """The parts of the plain unroll that other arithmetic replaces, each with the signature of its
    default.
    """

    # (logits, p_draft, p_full, mask, count, objective) → scalar; None: `losses.step_loss`
    step_loss: Callable[..., Tensor] | None = None
    # (attention mask (B, S), dtype) → the mask that `attention` reads, made once a batch
    mask: Callable[[Tensor, torch.dtype], Any] = block_mask
    # (key-value heads (B, J, S, E), N / J) → the heads that `attention` reads, made at every step
    heads: Callable[[Tensor, int], Tensor] = layers.repeat_heads
    # (queries (B, N, S, E), keys of all steps so far, values of all steps so far, mask) → (B, N, S,
    # E)
    attention: Callable[[Tensor, list[Tensor], list[Tensor], Any], Tensor] = unrolled_attention


class _Step(NamedTuple):
    """One unroll step's loss and its detached per-row metrics."""

    loss: Tensor  # ()
    correct: Tensor  # (B, S) bool
    accept: Tensor  # (B, S) fp32
    position_mask: Tensor  # (B, S)
    row_mask: Tensor  # (B, S)


def forward_loss(
    params: Params,
    batch: Batch,
    *,
    config: Config,
    frozen: Frozen,
    loss: RowLoss | Callable[..., Tensor] | None = None,
) -> tuple[Tensor, Aux]:
    """The training loss of one micro-batch, `Σ_i decay^i · L_i` over unroll steps `i`, and its
    metrics.

    Args:
        params: the draft's tensors in the compute dtype (`model.table.shapes`).
        batch: see `Batch`; padding on the right.
        config: `draft` and `objective` are read; `objective.numerics` chooses the plain unroll or
            the fast one.
        frozen: target embedding, head and vocabulary map.
        loss: a loss of the user's own in place of `objective.loss`.

    Returns:
        Scalar loss (fp32, or fp64 for fp64 parameters), and `Aux` without gradient.

    Raises:
        UserError: shapes, dtypes or values that don't fit together, or a `torch.autocast` around
            the call; it names the field.
    """
    check_batch(params, batch, config, frozen)
    if config.objective.numerics == "fast":
        return forward_fast(params, batch, config, frozen, find_loss(config.objective, loss))
    return forward_plain(params, batch, config=config, frozen=frozen, loss=loss)


def forward_plain(
    params: Params,
    batch: Batch,
    *,
    config: Config,
    frozen: Frozen,
    loss: RowLoss | Callable[..., Tensor] | None = None,
    operations: Operations = Operations(),  # noqa: B008
) -> tuple[Tensor, Aux]:
    """`forward_loss` under the plain numerics, without its checks.

    `operations` may be other than the defaults.
    """
    objective = config.objective

    # `last_hidden[t]` predicts token t + 1. Shifted left by one, row t has the state that predicts
    # token t + 2, its label.
    teacher = make_teacher(shift(batch.last_hidden, 1), batch.row_mask, frozen, objective)

    # By which number of rows each step's sum is divided; None: by all B·S.
    counts = None
    if objective.normalization == "mask":
        counts = batch.row_counts
        if counts is None:
            counts = trained_row_counts([batch.row_mask], objective.ttt_length)

    if operations.step_loss is None:
        score = partial(step_loss, loss=find_loss(objective, loss))
    else:
        score = partial(operations.step_loss, objective=objective)
    steps = list(_unroll(params, batch, teacher, counts, config, frozen, operations, score))
    total = sum((objective.decay**i * step.loss for i, step in enumerate(steps)), start=0)
    return torch.as_tensor(total), _aux(steps)


def _unroll(
    params: Params,
    batch: Batch,
    teacher: Teacher,
    counts: Tensor | None,
    config: Config,
    frozen: Frozen,
    operations: Operations,
    score: Callable[..., Tensor],
) -> Iterator[_Step]:
    """Run the draft `K` times on its own hidden states.

    Each step's loss is taken before the next step is made.

    At step `i` row `t` has the hidden state of step `i - 1`, the embedding of token `t + i + 1`,
    rotary position `t + i`, and the label `t + i`, whose distribution is the target's for token `t
    + i + 2`.
    """
    draft = config.draft
    k = config.objective.ttt_length
    s = batch.input_ids.shape[1]
    groups = draft.num_attention_heads // draft.num_key_value_heads

    # Step 0's hidden state: the three taps, projected.
    hidden = layers.project(params, batch.aux_hidden)

    # What every step reads: attention mask, cosines and sines, and each row's position.
    mask = operations.mask(batch.attention_mask, hidden.dtype)
    cos, sin = rope_table(draft, s + k, hidden.dtype, hidden.device, beyond=k)
    positions = batch.position_ids
    if positions is None:
        positions = torch.arange(s, device=batch.input_ids.device)[None]

    ids = shift(batch.input_ids)
    row_mask = batch.row_mask
    position_mask = teacher.position_mask
    keys: list[Tensor] = []
    values: list[Tensor] = []
    for i in range(k):
        # Attention: the keys of step 0 are a causal block, each later step adds one key a row.
        embeds = layers.embed(params, frozen, ids, hidden.dtype)
        rotation = cos[positions + i][:, None], sin[positions + i][:, None]
        query, key, value = layers.qkv(params, draft, embeds, hidden, *rotation)
        keys.append(operations.heads(key, groups))
        values.append(operations.heads(value, groups))
        attended = operations.attention(query, keys, values, mask)

        # The rest of the layer, and the draft's logits (B, S, D).
        hidden = layers.finish_layer(params, draft, hidden, attended)
        logits = layers.logits(params, draft, hidden)

        # Loss and metrics against the teacher's rows i … i + S - 1.
        p_full = teacher.p_full[:, i : i + s]
        loss = score(
            logits,
            teacher.p_draft[:, i : i + s],
            p_full,
            position_mask,
            None if counts is None else counts[i],
        )
        accept = acceptance(logits.detach(), p_full)
        yield _Step(
            loss=loss,
            correct=correct_rows(logits.detach(), teacher.token[:, i : i + s], frozen),
            accept=accept,
            position_mask=position_mask[..., 0],
            row_mask=row_mask,
        )

        # The next step reads one token further.
        ids = shift(ids)
        row_mask = shift(row_mask)
        position_mask = shift(position_mask, 1)


@torch.no_grad()
def _aux(steps: list[_Step]) -> Aux:
    """Sums and counts over rows; see `Aux`."""
    correct = torch.stack([step.correct for step in steps])  # (K, B, S)
    accept = torch.stack([step.accept for step in steps])
    row_mask = torch.stack([step.row_mask for step in steps])

    # Acceptance is counted where the target's argmax is in the draft vocabulary.
    weights = [step.position_mask.to(step.accept.dtype) for step in steps]
    accept_sums = [
        (step.accept * weight).sum() for step, weight in zip(steps, weights, strict=True)
    ]

    # A chain of drafted tokens ends at its first wrong one, and where the row's labels end.
    alive = row_mask.cumprod(0)
    return Aux(
        losses=torch.stack([step.loss.detach() for step in steps]),
        correct=torch.stack([(step.correct * step.row_mask).sum() for step in steps]),
        rows=torch.stack([step.row_mask.sum() for step in steps]),
        accept=torch.stack(accept_sums),
        accept_rows=torch.stack([weight.sum() for weight in weights]),
        greedy=(alive * correct.long().cumprod(0)).sum().float(),
        sampled=(alive * accept.cumprod(0)).sum().float(),
    )

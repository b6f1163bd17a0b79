"""The training objective: teacher, unroll, loss and metrics.

    L = Σ_i decay^i · L_i,   i = 0 … K - 1

Row `t` of step `i` is given the embedding of token `t + i + 1` and the hidden state that step
`i - 1` made at row `t` (step 0: the projection of the target's taps). Its label is the target's
distribution for token `t + i + 2`. It is trained if the row mask is 1 at `t + i`.

So each step reads tokens and row mask one place further to the left, and compares with teacher rows
`i … i + S - 1`.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from eagle3fn.base.sections import ObjectiveConfig
from eagle3fn.testing.builders import Unaligned
from tests.reference.model import Draft, at_least_fp32, bias_mask


class Teacher(NamedTuple):
    """The target's distributions; the first three are padded by K rows at the sequence's end."""

    p_draft: Tensor  # (B, S + K, D): softmax over the draft vocabulary
    p_full: Tensor  # (B, S + K, D): the same tokens' probabilities under the full vocabulary
    token: Tensor  # (B, S + K) int64: the target's most likely token
    position_mask: (
        Tensor  # (B, S, 1) int: the row mask, where that token is in the draft vocabulary
    )


class TeacherLogits(NamedTuple):
    """What `Teacher` is made from."""

    draft: Tensor  # (B, S, D): the target's logits of the draft vocabulary
    log_sum: Tensor  # (B, S, 1): log Σ_v exp(logit_v) over the full vocabulary
    token: Tensor  # (B, S): the largest logit's token


class Metrics(NamedTuple):
    """Sums and counts per unroll step `(K,)`, and the simulated accepted tokens of all rows."""

    losses: Tensor  # L_i
    correct: Tensor  # trained rows whose most likely draft token is the target's
    rows: Tensor  # trained rows
    chain_rows: Tensor  # trained rows that all earlier steps' choices reach
    chain_correct: Tensor  # of those, the ones whose choice is the target's as well
    accept: Tensor  # acceptance rates, over rows of the position mask
    accept_rows: Tensor  # these rows
    greedy: Tensor  # (): drafted tokens that a greedy verifier accepts
    sampled: Tensor  # (): drafted tokens that a sampling verifier is expected to accept


class Step(NamedTuple):
    """What the metrics need of one step, all `(B, S)`."""

    hit: Tensor  # bool: the draft's most likely token is the target's
    accepted: Tensor  # the acceptance rate
    row_mask: Tensor
    position_mask: Tensor


def shift(x: Tensor) -> Tensor:
    """One place to the left along the sequence; zeros at the end."""
    moved = torch.zeros_like(x)
    moved[:, :-1] = x[:, 1:]
    return moved


# The teacher.


def full_logits(target: Tensor, head: Tensor, t2d: Tensor) -> TeacherLogits:
    """From all logits `(B, S, V)` at once."""
    logits = at_least_fp32(functional.linear(target, head))
    log_sum = torch.logsumexp(logits, dim=-1, keepdim=True)
    return TeacherLogits(logits[..., t2d], log_sum, logits.argmax(-1))


def compact_logits(target: Tensor, head: Tensor, t2d: Tensor, chunk: int) -> TeacherLogits:
    """The same with a running maximum and sum over chunks of the vocabulary.

    With `m` the largest logit so far and `s = Σ exp(logit - m)`, a chunk whose maximum is
    `m'` > `m` gives `s ← s · exp(m - m') + Σ_chunk exp(logit - m')`; in the end
    `log_sum = m + log s`.
    """
    draft = at_least_fp32(functional.linear(target, head[t2d]))
    largest = draft.new_full((*target.shape[:-1], 1), float("-inf"))
    total = torch.zeros_like(largest)
    token = torch.zeros(target.shape[:-1], dtype=torch.long, device=target.device)
    for first in range(0, len(head), chunk):
        part = at_least_fp32(functional.linear(target, head[first : first + chunk]))
        best, where = part.max(dim=-1, keepdim=True)
        token = torch.where((best > largest).squeeze(-1), where.squeeze(-1) + first, token)

        raised = torch.maximum(largest, best)
        chunk_sum = (part - raised).exp().sum(dim=-1, keepdim=True)
        total = total * (largest - raised).exp() + chunk_sum
        largest = raised
    return TeacherLogits(draft, largest + total.log(), token)


@torch.no_grad()
def make_teacher(
    target: Tensor, head: Tensor, t2d: Tensor, row_mask: Tensor, steps: int, chunk: int | None
) -> Teacher:
    """The teacher of all steps.

    Args:
        target: the target's last hidden states `(B, S, Ht)`, shifted by one place.
        head: the target's head `(V, Ht)`.
        t2d: which target tokens are in the draft vocabulary, `(V,)` bool.
        row_mask: `(B, S, 1)`.
        steps: K.
        chunk: of the vocabulary; None computes all logits at once.
    """
    if chunk is None:
        made = full_logits(target, head, t2d)
    else:
        made = compact_logits(target, head, t2d, chunk)
    p_draft = torch.softmax(made.draft, dim=-1)
    p_full = torch.exp(made.draft - made.log_sum)

    # No row reads the padding: the row mask is zero past the end.
    return Teacher(
        p_draft=functional.pad(p_draft, (0, 0, 0, steps), value=1 / p_draft.shape[-1]),
        p_full=functional.pad(p_full, (0, 0, 0, steps)),
        token=functional.pad(made.token, (0, steps)),
        position_mask=t2d[made.token].unsqueeze(-1).int() * row_mask,
    )


# The loss of one step.


def kl(logits: Tensor, p_draft: Tensor, mask: Tensor, count: Tensor | None) -> Tensor:
    """`-Σ_rows Σ_v p_draft(v) · log_softmax(logits)(v) / count`, over rows with `mask` `(B, S)`.

    Without a count the sum is divided by all `B·S` rows.
    """
    log_draft = torch.log_softmax(at_least_fp32(logits), dim=-1)
    row = -(p_draft * log_draft).sum(-1) * at_least_fp32(mask)
    return row.mean() if count is None else row.sum() / count


def average(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of `x` `(B, S)` over the rows of a mask `(B, S)`; zero if there is none."""
    weight = mask.to(x.dtype)
    return (x * weight).sum() / weight.sum().clamp_min(1e-8)


def step_loss(
    logits: Tensor,
    p_draft: Tensor,
    p_full: Tensor,
    mask: Tensor,
    count: Tensor | None,
    config: ObjectiveConfig,
) -> Tensor:
    """One step's loss, by `config.loss`; `a` is a row's acceptance rate `Σ_v min(p_full, draft)`:

        kl         as `kl`
        lk_alpha   -mean(log a)
        lk_lambda  w · kl + (1 - w) · (1 - mean a),  w = kl_scale · exp(-kl_decay · mean a) constant

    The means are over rows with `mask` `(B, S)`. As SpecForge has it: the gradient of a row without
    acceptance divides zero by zero.
    """
    if config.loss == "kl":
        return kl(logits, p_draft, mask, count)

    accept = torch.minimum(p_full, torch.softmax(at_least_fp32(logits), dim=-1)).sum(-1)  # (B, S)
    if config.loss == "lk_alpha":
        return -average(torch.where(accept > 0, accept.log(), 0), mask)

    mean = average(accept, mask)
    with torch.no_grad():
        share = config.kl_scale * (-config.kl_decay * mean).exp()
    return share * kl(logits, p_draft, mask, count) + (1 - share) * (1 - mean)


def mask_counts(row_mask: Tensor, steps: int) -> Tensor:
    """Rows trained at each step, at least 1: `(K,)` fp32 from a row mask `(B, S)`."""
    counts = []
    for _ in range(steps):
        counts.append(row_mask.sum().clamp_min(1))
        row_mask = shift(row_mask)
    return torch.stack(counts).float()


def weighted_sum(losses: list[Tensor], decay: float) -> Tensor:
    """`Σ_i decay^i · L_i`, added in the steps' order, from zero."""
    total: Tensor | int = 0
    for index, loss in enumerate(losses):
        total = total + decay**index * loss
    assert isinstance(total, Tensor)
    return total


# The unroll.


def forward(
    draft: Draft, head: Tensor, batch: Unaligned, config: ObjectiveConfig
) -> tuple[list[Tensor], Metrics]:
    """The K losses before the decay, with their graph, and the metrics.

    Args:
        draft: with its parameters.
        head: the target's, `(V, Ht)`.
        batch: padded samples, each tensor at its own tokens.
        config: of the objective; `numerics` is not read.

    Raises:
        AssertionError: a row mask that is not `(B, S)`.
    """
    assert batch.row_mask.shape == batch.input_ids.shape
    steps = config.ttt_length
    length = batch.input_ids.shape[1]

    # What the first step reads: tokens shifted by one place, and the mask as it is.
    tokens = shift(batch.input_ids)
    row_mask = batch.row_mask.unsqueeze(-1)  # (B, S, 1)

    # The teacher: its row t has the distribution for token t + 2.
    chunk = config.teacher_chunk if config.teacher == "compact" else None
    target = shift(batch.last_hidden)
    teacher = make_teacher(target, head, draft.t2d, row_mask, steps, chunk)
    position_mask = teacher.position_mask

    # By how many rows each step's sum is divided.
    counts = batch.row_counts
    if counts is None:
        counts = mask_counts(batch.row_mask, steps)

    # What every step reads.
    hidden = draft.fc(batch.aux_hidden)
    positions = batch.position_ids
    if positions is None:
        positions = torch.arange(length, device=hidden.device)[None]
    bias = bias_mask(batch.attention_mask, hidden.dtype)

    past: list[tuple[Tensor, Tensor]] = []
    losses = []
    seen = []
    for index in range(steps):
        # The draft.
        embedded = draft.embed_tokens(tokens).to(hidden.dtype)
        hidden = draft.midlayer(embedded, hidden, positions, bias, past)
        logits = draft.logits(hidden)

        # Loss and metrics against this step's rows of the teacher.
        window = slice(index, index + length)
        count = None if config.normalization == "rows" else counts[index]
        p_draft = teacher.p_draft[:, window]
        p_full = teacher.p_full[:, window]
        mask = position_mask.squeeze(-1)
        losses.append(step_loss(logits, p_draft, p_full, mask, count, config))
        with torch.no_grad():
            seen.append(observe(draft, logits, teacher, window, row_mask, position_mask))

        # The next step reads one place further.
        tokens = shift(tokens)
        row_mask = shift(row_mask)
        position_mask = shift(position_mask)
    return losses, summarize(losses, seen)


# Metrics.


def observe(
    draft: Draft,
    logits: Tensor,
    teacher: Teacher,
    window: slice,
    row_mask: Tensor,
    position_mask: Tensor,
) -> Step:
    """Per row: whether the draft's choice is the target's, and the acceptance rate of a sample."""
    choice = logits.argmax(-1)
    hit = choice + draft.d2t[choice] == teacher.token[:, window]
    probability = torch.softmax(at_least_fp32(logits), dim=-1)
    accepted = torch.minimum(teacher.p_full[:, window], probability).sum(-1)
    return Step(hit, accepted, row_mask.squeeze(-1), position_mask.squeeze(-1))


@torch.no_grad()
def summarize(losses: list[Tensor], steps: list[Step]) -> Metrics:
    """Sums per step, and the accepted tokens: `Σ_rows Σ_i Π_{j≤i} x_j` for hits and for rates.

    A row's chain ends at a factor of zero, and where its labels end.
    """
    greedy_chain = torch.ones_like(steps[0].accepted)
    sampled_chain = torch.ones_like(steps[0].accepted)
    greedy = torch.zeros_like(greedy_chain)
    sampled = torch.zeros_like(sampled_chain)
    chain_rows = []
    chain_correct = []
    for step in steps:
        chain_rows.append((greedy_chain * step.row_mask).sum().long())
        greedy_chain = greedy_chain * (step.hit * step.row_mask)
        sampled_chain = sampled_chain * (step.accepted * step.row_mask)
        chain_correct.append(greedy_chain.sum().long())
        greedy = greedy + greedy_chain
        sampled = sampled + sampled_chain

    correct = []
    accept = []
    accept_rows = []
    for step in steps:
        weight = step.position_mask.to(step.accepted.dtype)
        correct.append((step.hit * step.row_mask).sum())
        accept.append((step.accepted * weight).sum())
        accept_rows.append(weight.sum())
    return Metrics(
        losses=torch.stack([loss.detach() for loss in losses]),
        correct=torch.stack(correct),
        rows=torch.stack([step.row_mask.sum() for step in steps]),
        chain_rows=torch.stack(chain_rows),
        chain_correct=torch.stack(chain_correct),
        accept=torch.stack(accept),
        accept_rows=torch.stack(accept_rows),
        greedy=greedy.sum().float(),
        sampled=sampled.sum().float(),
    )

"""Teacher, unroll, loss and metrics."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from eagle3fn.base.config import ObjectiveConfig
from eagle3fn.base.types import Batch
from tests.reference.model import Draft, at_least_fp32, bias_mask


class Teacher(NamedTuple):
    """The target's distributions; the first three are padded by K rows at the end of the sequence."""

    p: Tensor
    q: Tensor
    token: Tensor
    position_mask: Tensor


class Metrics(NamedTuple):
    """Sums and counts per unroll step, and the simulated accepted tokens summed over rows."""

    losses: Tensor
    correct: Tensor
    rows: Tensor
    accept: Tensor
    accept_rows: Tensor
    greedy: Tensor
    sampled: Tensor


def shift(x: Tensor) -> Tensor:
    """One place left along the sequence, zeros behind."""
    moved = torch.zeros_like(x)
    moved[:, :-1] = x[:, 1:]
    return moved


def full_logits(target: Tensor, head: Tensor, t2d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Draft-vocabulary logits, logsumexp and argmax from all logits at once."""
    logits = at_least_fp32(functional.linear(target, head))
    return logits[..., t2d], torch.logsumexp(logits, dim=-1, keepdim=True), logits.argmax(-1)


def compact_logits(
    target: Tensor, head: Tensor, t2d: Tensor, chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The same three with a running maximum and sum over chunks of the vocabulary."""
    draft = at_least_fp32(functional.linear(target, head[t2d]))
    top = draft.new_full((*target.shape[:-1], 1), float("-inf"))
    total = torch.zeros_like(top)
    token = torch.zeros(target.shape[:-1], dtype=torch.long, device=target.device)
    for first in range(0, len(head), chunk):
        part = at_least_fp32(functional.linear(target, head[first : first + chunk]))
        best, where = part.max(dim=-1, keepdim=True)
        token = torch.where((best > top).squeeze(-1), where.squeeze(-1) + first, token)
        raised = torch.maximum(top, best)
        total = total * (top - raised).exp() + (part - raised).exp().sum(dim=-1, keepdim=True)
        top = raised
    return draft, top + total.log(), token


@torch.no_grad()
def make_teacher(
    target: Tensor, head: Tensor, t2d: Tensor, row_mask: Tensor, steps: int, chunk: int | None
) -> Teacher:
    """`target` is already shifted, `row_mask` is `(B, S, 1)`; `chunk` None computes all logits at once."""
    parts = (
        full_logits(target, head, t2d)
        if chunk is None
        else compact_logits(target, head, t2d, chunk)
    )
    logits, normalizer, token = parts
    p = torch.softmax(logits, dim=-1)
    q = torch.exp(logits - normalizer)
    return Teacher(
        p=functional.pad(p, (0, 0, 0, steps), value=1 / p.shape[-1]),
        q=functional.pad(q, (0, 0, 0, steps)),
        token=functional.pad(token, (0, steps)),
        position_mask=t2d[token].unsqueeze(-1).int() * row_mask,
    )


def kl(logits: Tensor, p: Tensor, mask: Tensor, n: Tensor | None) -> Tensor:
    """The agreed eager expression; `mask` is `(B, S)`, `n` None means all rows."""
    logp = torch.log_softmax(at_least_fp32(logits), dim=-1)
    row = -(p * logp).sum(-1) * at_least_fp32(mask)
    return row.mean() if n is None else row.sum() / n


def average(x: Tensor, mask: Tensor) -> Tensor:
    """Over the rows of a `(B, S)` mask."""
    weight = mask.to(x.dtype)
    return (x * weight).sum() / weight.sum().clamp_min(1e-8)


def step_loss(
    logits: Tensor, p: Tensor, q: Tensor, mask: Tensor, n: Tensor | None, config: ObjectiveConfig
) -> Tensor:
    """KL, or a loss by acceptance as the old tool states it: a row without acceptance divides zero by zero."""
    if config.loss == "kl":
        return kl(logits, p, mask, n)
    chance = torch.minimum(q, torch.softmax(at_least_fp32(logits), dim=-1)).sum(-1)
    if config.loss == "lk_alpha":
        return -average(torch.where(chance > 0, chance.log(), 0), mask)
    mean = average(chance, mask)
    with torch.no_grad():
        share = config.kl_scale * (-config.kl_decay * mean).exp()
    return share * kl(logits, p, mask, n) + (1 - share) * (1 - mean)


def mask_counts(row_mask: Tensor, steps: int) -> Tensor:
    """`(K,)` fp32: rows trained at each step, at least 1."""
    counts = []
    for _ in range(steps):
        counts.append(row_mask.sum().clamp_min(1))
        row_mask = shift(row_mask)
    return torch.stack(counts).float()


def weighted_sum(losses: list[Tensor], decay: float) -> Tensor:
    """Steps in order, from zero."""
    total: Tensor | int = 0
    for index, loss in enumerate(losses):
        total = total + decay**index * loss
    assert isinstance(total, Tensor)
    return total


def forward(
    draft: Draft, head: Tensor, batch: Batch, config: ObjectiveConfig
) -> tuple[list[Tensor], Metrics]:
    """The K losses before the decay, with their graph, and the metrics.

    Raises:
        AssertionError: a loss mask that is not `(B, S)`.
    """
    assert batch.row_mask.shape == batch.input_ids.shape
    steps, length = config.ttt_length, batch.input_ids.shape[1]
    row_mask, tokens = batch.row_mask.unsqueeze(-1), shift(batch.input_ids)
    chunk = config.teacher_chunk if config.teacher == "compact" else None
    teacher = make_teacher(shift(batch.last_hidden), head, draft.t2d, row_mask, steps, chunk)
    position_mask = teacher.position_mask
    counts = mask_counts(batch.row_mask, steps) if batch.row_counts is None else batch.row_counts

    hidden = draft.fc(batch.aux_hidden)
    positions = (
        torch.arange(length, device=hidden.device)[None]
        if batch.position_ids is None
        else batch.position_ids
    )
    bias = bias_mask(batch.attention_mask, hidden.dtype)
    past: list[tuple[Tensor, Tensor]] = []
    losses, steps_seen = [], []
    for index in range(steps):
        embedded = draft.embed_tokens(tokens).to(hidden.dtype)
        hidden = draft.midlayer(embedded, hidden, positions, bias, past)
        logits = draft.logits(hidden)
        window = slice(index, index + length)
        n = None if config.normalization == "rows" else counts[index]
        p, q = teacher.p[:, window], teacher.q[:, window]
        losses.append(step_loss(logits, p, q, position_mask.squeeze(-1), n, config))
        with torch.no_grad():
            steps_seen.append(observe(draft, logits, teacher, window, row_mask, position_mask))
        tokens, row_mask, position_mask = shift(tokens), shift(row_mask), shift(position_mask)
    return losses, summarize(losses, steps_seen)


class Step(NamedTuple):
    """What the metrics need of one step, all `(B, S)`."""

    hit: Tensor
    accepted: Tensor
    row_mask: Tensor
    position_mask: Tensor


def observe(
    draft: Draft,
    logits: Tensor,
    teacher: Teacher,
    window: slice,
    row_mask: Tensor,
    position_mask: Tensor,
) -> Step:
    """Per row: whether the draft's first choice is the target's, and the chance that a sample is accepted."""
    choice = logits.argmax(-1)
    hit = choice + draft.d2t[choice] == teacher.token[:, window]
    probability = torch.softmax(at_least_fp32(logits), dim=-1)
    accepted = torch.minimum(teacher.q[:, window], probability).sum(-1)
    return Step(hit, accepted, row_mask.squeeze(-1), position_mask.squeeze(-1))


@torch.no_grad()
def summarize(losses: list[Tensor], steps: list[Step]) -> Metrics:
    """Sums per step; a row's chain of accepted tokens breaks where a factor is zero or unmasked."""
    greedy_chain = torch.ones_like(steps[0].accepted)
    sampled_chain = torch.ones_like(steps[0].accepted)
    greedy, sampled = torch.zeros_like(greedy_chain), torch.zeros_like(sampled_chain)
    for step in steps:
        greedy_chain = greedy_chain * (step.hit * step.row_mask)
        sampled_chain = sampled_chain * (step.accepted * step.row_mask)
        greedy, sampled = greedy + greedy_chain, sampled + sampled_chain
    return Metrics(
        losses=torch.stack([loss.detach() for loss in losses]),
        correct=torch.stack([(step.hit * step.row_mask).sum() for step in steps]),
        rows=torch.stack([step.row_mask.sum() for step in steps]),
        accept=torch.stack(
            [(step.accepted * step.position_mask.to(step.accepted.dtype)).sum() for step in steps]
        ),
        accept_rows=torch.stack(
            [step.position_mask.to(step.accepted.dtype).sum() for step in steps]
        ),
        greedy=greedy.sum().float(),
        sampled=sampled.sum().float(),
    )

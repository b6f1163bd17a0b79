"""The objective by loops over samples, steps and rows, in fp64: no batch, no padding, no shift.

It reads slowly and runs slowly. For row `t` of unroll step `i`, both counted from 0:

    e_i(t) = embedding of token t + i + 1, or of token 0 past the end
    h_0(t) = W_fc · taps(t)
    h_{i+1}(t) = layer(e_i(t), h_i(t)), attending to the keys of
        - step 0, at rows 0 … t
        - steps 1 … i, at row t alone
    logits_i(t) = W_head · norm(h_{i+1}(t))

The row is trained if the row mask is 1 at `t + i`. Its label is the target's distribution for token
`t + i + 2`, which the target's last hidden state of token `t + i + 1` gives.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from eagle3fn.base.config import Config, ObjectiveConfig
from eagle3fn.base.draft_config import DraftConfig
from eagle3fn.base.types import Frozen, Params
from eagle3fn.model import table
from eagle3fn.testing.builders import Unaligned


class Sums(NamedTuple):
    """Sums over trained rows, a number for each unroll step.

    A known row is one whose most likely target token is in the draft vocabulary: only these enter
    the loss.
    """

    loss: list[float]  # the row's loss, over known rows; 0 if `LOSSES` does not have it
    kl: list[float]  # its KL
    log_accept: list[float]  # log acceptance rate, over known rows
    accept: list[float]  # acceptance rate, over known rows
    known: list[int]  # known rows
    rows: list[int]  # trained rows
    correct: list[int]  # trained rows whose most likely draft token is the target's
    chain_rows: list[int]  # trained rows whose earlier drafted tokens were all trained and right
    chain_correct: list[int]  # of those, the ones that are right at this step too


def kl(p_draft: list[float], draft: list[float]) -> float:
    """`-Σ_v p(v) log s(v)`."""
    return -sum(p * math.log(s) for p, s in zip(p_draft, draft, strict=True))


def reverse_kl(p_draft: list[float], draft: list[float]) -> float:
    """`Σ_v s(v) log(s(v) / p(v))`."""
    return sum(s * math.log(s / p) for p, s in zip(p_draft, draft, strict=True))


def acceptance(p_full: list[float], draft: list[float]) -> float:
    """`Σ_v min(p_full(v), s(v))`."""
    return sum(min(p, s) for p, s in zip(p_full, draft, strict=True))


def mixed(
    p_draft: list[float], p_full: list[float], draft: list[float], objective: ObjectiveConfig
) -> float:
    """`w · kl + (1 - w) · (1 - a)`, `w = kl_scale · exp(-kl_decay · a)`, `a` the acceptance."""
    accept = acceptance(p_full, draft)
    weight = objective.kl_scale * math.exp(-objective.kl_decay * accept)
    return weight * kl(p_draft, draft) + (1 - weight) * (1 - accept)


LOSSES: dict[str, Callable[[list[float], list[float], list[float], ObjectiveConfig], float]] = {
    "kl": lambda p_draft, p_full, draft, objective: kl(p_draft, draft),
    "rkl": lambda p_draft, p_full, draft, objective: reverse_kl(p_draft, draft),
    "nla": lambda p_draft, p_full, draft, objective: -math.log(acceptance(p_full, draft)),
    "lk": mixed,
}
"""A row's loss from its teacher over the draft vocabulary, the same tokens' probabilities under the
full one, the draft's probabilities, and the settings."""


class Objective(NamedTuple):
    """The loss, its terms by unroll step before the decay, and what they were made from."""

    loss: float
    losses: list[float]
    sums: Sums


def objective_by_loops(
    params: Params, frozen: Frozen, config: Config, samples: Sequence[Unaligned], places: int
) -> Objective:
    """`Σ_i decay^i · L_i` over all samples' rows together.

    `L_i` is, over the rows of step `i`, by `objective.loss`:

        one of `LOSSES`   Σ loss / n,  n = trained rows, at least 1, or `places` under "rows"

    or a mean over known rows, as SpecForge has two:

        lk_alpha   mean of -log(acceptance rate)
        lk_lambda  w · kl + (1 - w) · (1 - a),  w = kl_scale · exp(-kl_decay · a),
                   a = mean acceptance rate

    Args:
        params: fp64 parameters.
        frozen: fp64 tensors of the target.
        config: `draft` and `objective` are read.
        samples: batches without the batch axis: ids `(S,)`, features `(S, …)`, nothing padded.
        places: rows of the batches that hold the samples, padded ones too.
    """
    objective = config.objective
    steps = objective.ttt_length
    sums = Sums(*([0] * steps for _ in Sums._fields))  # pyright: ignore[reportArgumentType]
    for sample in samples:
        logits = unroll(params, frozen, config.draft, sample, steps)
        add_rows(sums, frozen, sample, logits, objective)

    losses = []
    for i in range(steps):
        count = places if objective.normalization == "rows" else max(sums.rows[i], 1)
        kl = sums.kl[i] / count
        known = max(sums.known[i], 1e-8)
        if objective.loss in LOSSES:
            losses.append(sums.loss[i] / count)
        elif objective.loss == "lk_alpha":
            losses.append(-sums.log_accept[i] / known)
        else:
            accept = sums.accept[i] / known
            weight = objective.kl_scale * math.exp(-objective.kl_decay * accept)
            losses.append(weight * kl + (1 - weight) * (1 - accept))

    loss = 0.0
    for i, term in enumerate(losses):
        loss += objective.decay**i * term
    return Objective(loss, losses, sums)


def unroll(
    params: Params, frozen: Frozen, draft: DraftConfig, sample: Unaligned, steps: int
) -> list[list[Tensor]]:
    """Logits `(D,)` of one sample, by unroll step and row."""
    s = len(sample.input_ids)
    size = draft.head_dim
    heads = draft.num_attention_heads
    kv_heads = draft.num_key_value_heads
    eps = draft.rms_norm_eps
    embedding = params[table.EMBED] if frozen.embed_tokens is None else frozen.embed_tokens
    positions = range(s) if sample.position_ids is None else sample.position_ids.tolist()

    hidden = [params[table.FC] @ taps for taps in sample.aux_hidden]
    keys: list[list[list[Tensor]]] = []  # by step, row, key-value head
    values: list[list[list[Tensor]]] = []
    logits = []
    for i in range(steps):
        # The layer's input, and this step's key and value, row by row.
        inputs = []
        keys.append([])
        values.append([])
        for t in range(s):
            token = int(sample.input_ids[t + i + 1]) if t + i + 1 < s else 0
            left = norm(embedding[token], params[table.INPUT_NORM], eps)
            right = norm(hidden[t], params[table.HIDDEN_NORM], eps)
            x = torch.cat([left, right])
            key = (params[table.K] @ x).view(kv_heads, size)
            value = (params[table.V] @ x).view(kv_heads, size)
            inputs.append(x)
            keys[i].append([rotate(head, positions[t] + i, draft.rope_theta) for head in key])
            values[i].append(list(value))

        # Attention, head by head, then the MLP.
        for t in range(s):
            query = (params[table.Q] @ inputs[t]).view(heads, size)
            attended = []
            for head in range(heads):
                j = head // (heads // kv_heads)
                seen_keys = [keys[0][u][j] for u in range(t + 1)]
                seen_values = [values[0][u][j] for u in range(t + 1)]
                for step in range(1, i + 1):
                    seen_keys.append(keys[step][t][j])
                    seen_values.append(values[step][t][j])
                rotated = rotate(query[head], positions[t] + i, draft.rope_theta)
                attended.append(attend(rotated, seen_keys, seen_values))
            hidden[t] = hidden[t] + params[table.O] @ torch.cat(attended)

            x = norm(hidden[t], params[table.POST_NORM], eps)
            gate = params[table.GATE] @ x
            up = params[table.UP] @ x
            hidden[t] = hidden[t] + params[table.DOWN] @ (gate / (1 + (-gate).exp()) * up)

        logits.append([params[table.HEAD] @ norm(h, params[table.NORM], eps) for h in hidden])
    return logits


def add_rows(
    sums: Sums,
    frozen: Frozen,
    sample: Unaligned,
    logits: list[list[Tensor]],
    objective: ObjectiveConfig,
) -> None:
    """Add one sample's trained rows to the sums."""
    s = len(sample.input_ids)
    kept = frozen.t2d.nonzero()[:, 0].tolist()  # target ids of the draft vocabulary
    right = [[False] * s for _ in logits]  # by step and row: trained, and the target's choice
    for i in range(len(logits)):
        for t in range(s - i):
            if not sample.row_mask[t + i]:
                continue

            # The target's choice; past the end its hidden state is zero.
            last = torch.zeros_like(sample.last_hidden[0])
            if t + i + 1 < s:
                last = sample.last_hidden[t + i + 1]
            target = frozen.target_head @ last.to(frozen.target_head.dtype)  # (V,)
            choice = int(target.argmax())

            sums.rows[i] += 1
            right[i][t] = kept[int(logits[i][t].argmax())] == choice
            reached = all(right[j][t] for j in range(i))
            sums.correct[i] += right[i][t]
            sums.chain_rows[i] += reached
            sums.chain_correct[i] += reached and right[i][t]
            if choice not in kept:
                continue

            # Teacher and draft over the draft vocabulary, and what a verifier would accept.
            p_draft = torch.softmax(target[kept], 0).tolist()
            p_full = torch.softmax(target, 0)[kept].tolist()
            draft = torch.softmax(logits[i][t], 0).tolist()
            accept = acceptance(p_full, draft)
            if objective.loss in LOSSES:
                sums.loss[i] += LOSSES[objective.loss](p_draft, p_full, draft, objective)
            sums.kl[i] += kl(p_draft, draft)
            sums.accept[i] += accept
            sums.log_accept[i] += math.log(accept)
            sums.known[i] += 1


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x²) + eps) · weight`."""
    return x / math.sqrt(float((x * x).sum()) / len(x) + eps) * weight


def rotate(x: Tensor, position: int, theta: float) -> Tensor:
    """One head's vector `(E,)` at a position: pair `(j, j + E/2)` rotated by `position / θ^(2j/E)`.

    The angles are fp32, as everywhere.
    """
    half = len(x) // 2
    out = x.clone()
    for j in range(half):
        frequency = 1.0 / theta ** (torch.tensor(2.0 * j) / len(x))
        angle = torch.tensor(position).float() * frequency
        cos = float(angle.cos())
        sin = float(angle.sin())
        out[j] = x[j] * cos - x[half + j] * sin
        out[half + j] = x[half + j] * cos + x[j] * sin
    return out


def attend(query: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    """Softmax of `query · key / sqrt(E)` over all keys, times the values: `(E,)`."""
    scores = [float(query @ key) / math.sqrt(len(query)) for key in keys]
    weights = [math.exp(score - max(scores)) for score in scores]
    out = torch.zeros_like(query)
    for weight, value in zip(weights, values, strict=True):
        out = out + weight / sum(weights) * value
    return out

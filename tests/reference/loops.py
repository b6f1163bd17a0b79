"""The objective by loops over samples, steps and rows, in fp64: no batch, no padding, no shift.

It reads slowly and runs slowly. For row `t` of unroll step `i`, both counted from 0:

    e_i(t) = embedding of token t + i + 1, or of token 0 past the end
    h_0(t) = W_fc · taps(t)
    h_{i+1}(t) = layers(e_i(t), h_i(t)), each attending to the keys of
        - step 0, at rows 0 … t; with a window of W those from t + i - W + 1 on
        - steps 1 … i, at row t alone
    logits_i(t) = W_head · norm(h_{i+1}(t))

The switches of the draft are read where they act.

The row is trained if the row mask is 1 at `t + i`. Its label is the target's distribution for token
`t + i + 2`, which the target's last hidden state of token `t + i + 1` gives.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from eagle3fn.base.config import Config
from eagle3fn.base.draft_config import DraftConfig
from eagle3fn.base.sections import ObjectiveConfig
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


def jensen_shannon(p_draft: list[float], draft: list[float]) -> float:
    """`½ Σ_v p(v) log(p(v) / m(v)) + ½ Σ_v s(v) log(s(v) / m(v))`, `m = (p + s) / 2`."""
    total = 0.0
    for p, s in zip(p_draft, draft, strict=True):
        mean = (p + s) / 2
        total += p * math.log(p / mean) / 2 + s * math.log(s / mean) / 2
    return total


def cross_entropy(p_draft: list[float], draft: list[float]) -> float:
    """`-log s(v)` of the first `v` with the largest `p(v)`."""
    return -math.log(draft[p_draft.index(max(p_draft))])


def total_variation(p_draft: list[float], draft: list[float]) -> float:
    """`½ Σ_v |p(v) - s(v)|`."""
    return sum(abs(p - s) for p, s in zip(p_draft, draft, strict=True)) / 2


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
    "jsd": lambda p_draft, p_full, draft, objective: jensen_shannon(p_draft, draft),
    "ce": lambda p_draft, p_full, draft, objective: cross_entropy(p_draft, draft),
    "tv": lambda p_draft, p_full, draft, objective: total_variation(p_draft, draft),
}
"""A row's loss from its teacher over the draft vocabulary, the same tokens' probabilities under the
full one, the draft's probabilities, and the settings."""


def parts_of(objective: ObjectiveConfig) -> Mapping[str, float]:
    """The names of `objective.loss` with their weights."""
    return {objective.loss: 1.0} if isinstance(objective.loss, str) else objective.loss


def row_loss(
    p_draft: list[float], p_full: list[float], draft: list[float], objective: ObjectiveConfig
) -> float:
    """A row's loss: `Σ weight · loss` of what `objective.loss` names."""
    total = 0.0
    for name, weight in parts_of(objective).items():
        total += weight * LOSSES[name](p_draft, p_full, draft, objective)
    return total


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

        of `LOSSES`   Σ loss / n,  n = trained rows, at least 1, or `places` under "rows"

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
        if parts_of(objective).keys() <= LOSSES.keys():
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
    embedding = params[table.EMBED] if draft.own_embedding else frozen.embed_tokens
    assert embedding is not None
    positions = range(s) if sample.position_ids is None else sample.position_ids.tolist()

    hidden = [projected(params, draft, taps) for taps in sample.aux_hidden]
    past: list[Past] = [Past([], []) for _ in range(draft.num_hidden_layers)]
    logits = []
    for i in range(steps):
        tokens = [int(sample.input_ids[t + i + 1]) if t + i + 1 < s else 0 for t in range(s)]
        embeds: list[Tensor] | None = [embedding[token] for token in tokens]
        for number in range(draft.num_hidden_layers):
            prefix = f"layers.{number}" if number else "midlayer"
            part = {
                name.removeprefix(f"{prefix}."): value
                for name, value in params.items()
                if name.startswith(f"{prefix}.")
            }
            hidden = layer(part, draft, embeds, hidden, past[number], positions, i)
            embeds = None  # of the first layer alone

        eps = draft.rms_norm_eps
        normed = [norm(h, params["norm.weight"], eps) for h in hidden]
        logits.append([params["lm_head.weight"] @ h for h in normed])
        if draft.norm_output:
            hidden = normed
    return logits


def projected(params: Params, draft: DraftConfig, taps: Tensor) -> Tensor:
    """A row's taps `(A·Ht,)`, normed by the switches, to its hidden state `(H,)`."""
    eps = draft.rms_norm_eps
    if draft.norm_before_fc:
        taps = norm(taps, params["input_norm.weight"], eps)
    if draft.fc_norm:
        width = draft.target_hidden_size
        each = [taps[i * width : (i + 1) * width] for i in range(draft.taps)]
        each = [norm(x, params[f"fc_norm.{i}.weight"], eps) for i, x in enumerate(each)]
        taps = torch.cat(each)
    return params["fc.weight"] @ taps


class Past(NamedTuple):
    """One layer's keys and values by step, row and key-value head."""

    keys: list[list[list[Tensor]]]
    values: list[list[list[Tensor]]]


def layer(
    part: Params,
    draft: DraftConfig,
    embeds: list[Tensor] | None,
    hidden: list[Tensor],
    past: Past,
    positions: Sequence[int],
    step: int,
) -> list[Tensor]:
    """One decoder layer, whose weights are `part`, on the hidden states `(H,)` of all rows."""
    s = len(hidden)
    size = draft.head_dim
    heads = draft.num_attention_heads
    kv_heads = draft.num_key_value_heads
    eps = draft.rms_norm_eps

    def product(name: str, x: Tensor) -> Tensor:
        bias = part.get(f"self_attn.{name}_proj.bias", 0.0)
        return part[f"self_attn.{name}_proj.weight"] @ x + bias

    def turned(name: str, head: Tensor, t: int) -> Tensor:
        if draft.qk_norm:
            head = norm(head, part[f"self_attn.{name}_norm.weight"], eps)
        return rotate(head, positions[t] + step, draft.rope_theta)

    # The layer's input, and this step's keys and values, row by row.
    inputs = []
    residual = []
    past.keys.append([])
    past.values.append([])
    for t in range(s):
        residual.append(hidden[t])
        if embeds is None:
            x = norm(hidden[t], part["input_layernorm.weight"], eps)
        else:
            right = norm(hidden[t], part["hidden_norm.weight"], eps)
            x = torch.cat([norm(embeds[t], part["input_layernorm.weight"], eps), right])
            if draft.norm_before_residual:
                residual[t] = right
        inputs.append(x)
        keys = product("k", x).view(kv_heads, size)
        past.keys[step].append([turned("k", head, t) for head in keys])
        past.values[step].append(list(product("v", x).view(kv_heads, size)))

    # Attention, head by head, then the MLP.
    out = []
    for t in range(s):
        window = draft.draft_window or s + step
        seen = [u for u in range(t + 1) if u > t + step - window]
        query = product("q", inputs[t]).view(heads, size)
        attended = []
        for head in range(heads):
            j = head // (heads // kv_heads)
            seen_keys = [past.keys[0][u][j] for u in seen]
            seen_values = [past.values[0][u][j] for u in seen]
            for i in range(1, step + 1):
                seen_keys.append(past.keys[i][t][j])
                seen_values.append(past.values[i][t][j])
            attended.append(attend(turned("q", query[head], t), seen_keys, seen_values))
        h = residual[t] + product("o", torch.cat(attended))

        x = norm(h, part["post_attention_layernorm.weight"], eps)
        gate = part["mlp.gate_proj.weight"] @ x
        up = part["mlp.up_proj.weight"] @ x
        out.append(h + part["mlp.down_proj.weight"] @ (gate / (1 + (-gate).exp()) * up))
    return out


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
            if parts_of(objective).keys() <= LOSSES.keys():
                sums.loss[i] += row_loss(p_draft, p_full, draft, objective)
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

"""The objective once more by plain loops over numbers, in fp64: no batch, no mask tensor, no shift."""

import math
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import eagle3fn as e3
from eagle3fn.model import table
from eagle3fn.testing.builders import Case, tiny_batch, tiny_frozen, tiny_params
from eagle3fn.testing.strategies import cases

P = dict[str, Tensor]


class Sums(NamedTuple):
    """Per unroll step, over all rows."""

    kl: list[float]
    log_accept: list[float]
    accept: list[float]
    known: list[int]
    rows: list[int]
    correct: list[int]


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / math.sqrt(float((x * x).sum()) / len(x) + eps) * weight


def turned(x: Tensor, position: int, theta: float) -> Tensor:
    """One head's vector at a position; the angles are fp32, as everywhere."""
    half, out = len(x) // 2, x.clone()
    for j in range(half):
        angle = torch.tensor(position).float() * (1.0 / theta ** (torch.tensor(2.0 * j) / len(x)))
        cos, sin = float(angle.cos()), float(angle.sin())
        out[j], out[half + j] = x[j] * cos - x[half + j] * sin, x[half + j] * cos + x[j] * sin
    return out


def attend(query: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    scores = [float(query @ key) / math.sqrt(len(query)) for key in keys]
    weights = [math.exp(score - max(scores)) for score in scores]
    return sum(
        (w / sum(weights) * v for w, v in zip(weights, values, strict=True)),
        start=torch.zeros_like(query),
    )


def unroll(case: Case, params: P, frozen: e3.Frozen, sample: e3.Batch) -> list[list[Tensor]]:
    """Logits of one unpadded sample, by unroll step and row."""
    (n, j), e, s = case.heads, case.head_dim, len(sample.input_ids)
    embedding = params[table.EMBED] if frozen.embed_tokens is None else frozen.embed_tokens
    places = range(s) if sample.position_ids is None else sample.position_ids.tolist()
    hidden = [params[table.FC] @ x for x in sample.aux_hidden]
    keys: list[list[list[Tensor]]] = []  # by step, row, key-value head
    values: list[list[list[Tensor]]] = []
    out = []
    for i in range(case.steps):
        ids = [int(sample.input_ids[t + i + 1]) if t + i + 1 < s else 0 for t in range(s)]
        x = [
            torch.cat([norm(embedding[ids[t]], params[table.INPUT_NORM], case.eps),
                       norm(hidden[t], params[table.HIDDEN_NORM], case.eps)])
            for t in range(s)
        ]  # fmt: skip
        keys.append(
            [
                [turned(k, places[t] + i, case.theta) for k in (params[table.K] @ x[t]).view(j, e)]
                for t in range(s)
            ]
        )
        values.append([list((params[table.V] @ x[t]).view(j, e)) for t in range(s)])
        for t in range(s):
            heads = []
            for h, query in enumerate((params[table.Q] @ x[t]).view(n, e)):
                g = h // (n // j)
                seen = [keys[0][u][g] for u in range(t + 1)] + [
                    keys[k][t][g] for k in range(1, i + 1)
                ]
                told = [values[0][u][g] for u in range(t + 1)] + [
                    values[k][t][g] for k in range(1, i + 1)
                ]
                heads.append(attend(turned(query, places[t] + i, case.theta), seen, told))
            hidden[t] = hidden[t] + params[table.O] @ torch.cat(heads)
            inner = norm(hidden[t], params[table.POST_NORM], case.eps)
            gate = params[table.GATE] @ inner
            hidden[t] = hidden[t] + params[table.DOWN] @ (
                gate / (1 + (-gate).exp()) * (params[table.UP] @ inner)
            )
        out.append([params[table.HEAD] @ norm(h, params[table.NORM], case.eps) for h in hidden])
    return out


def add_rows(
    sums: Sums, case: Case, frozen: e3.Frozen, sample: e3.Batch, logits: list[list[Tensor]]
) -> None:
    """Row t of step i learns the distribution for token t + i + 2, where the mask of t + i is 1."""
    s, kept = len(sample.input_ids), frozen.t2d.nonzero()[:, 0].tolist()
    for i in range(case.steps):
        for t in range(s - i):
            if not sample.token_mask[t + i]:
                continue
            last = (
                sample.last_hidden[t + i + 1]
                if t + i + 1 < s
                else torch.zeros(case.target_hidden).double()
            )
            z = frozen.target_head @ last
            token, student = int(z.argmax()), torch.softmax(logits[i][t], 0)
            sums.rows[i] += 1
            sums.correct[i] += kept[int(logits[i][t].argmax())] == token
            if token not in kept:
                continue
            p, q = torch.softmax(z[kept], 0), torch.softmax(z, 0)[kept]
            accept = sum(min(float(a), float(b)) for a, b in zip(q, student, strict=True))
            sums.kl[i] -= sum(
                float(a) * math.log(float(b)) for a, b in zip(p, student, strict=True)
            )
            sums.accept[i] += accept
            sums.log_accept[i] += math.log(accept)
            sums.known[i] += 1


def by_loops(case: Case) -> tuple[float, Sums]:
    batch, frozen, params = tiny_batch(case), tiny_frozen(case), tiny_params(case)
    sums = Sums(*([0] * case.steps for _ in Sums._fields))  # pyright: ignore[reportArgumentType]
    for b, length in enumerate(case.lengths):
        sample = e3.Batch(*(None if x is None else x[b, :length] for x in batch))  # pyright: ignore[reportArgumentType]
        add_rows(sums, case, frozen, sample, unroll(case, params, frozen, sample))
    rows = batch.input_ids.numel()
    loss = 0.0
    for i in range(case.steps):
        kl = sums.kl[i] / (rows if case.normalization == "rows" else max(sums.rows[i], 1))
        known = max(sums.known[i], 1e-8)
        accept = sums.accept[i] / known
        weight = case.kl_scale * math.exp(-case.kl_decay * accept)
        each = {
            "kl": kl,
            "lk_alpha": -sums.log_accept[i] / known,
            "lk_lambda": weight * kl + (1 - weight) * (1 - accept),
        }
        loss += 0.8**i * each[case.loss]
    return loss, sums


def check(case: Case, **objective: Any) -> None:
    wanted, sums = by_loops(case)
    plain = case.config()
    changed = {
        **{name: getattr(plain.objective, name) for name in plain.objective.__dataclass_fields__},
        **objective,
    }
    config = e3.Config(plain.draft, e3.ObjectiveConfig(**changed), train=plain.train)
    loss, aux = e3.forward_loss(
        tiny_params(case), tiny_batch(case), config=config, frozen=tiny_frozen(case)
    )
    assert float(loss) == pytest.approx(wanted, rel=1e-9, abs=1e-12)
    assert aux.correct.tolist() == sums.correct and aux.rows.tolist() == sums.rows
    assert aux.accept.tolist() == pytest.approx(sums.accept, rel=1e-9, abs=1e-12)
    assert aux.accept_rows.tolist() == sums.known


@settings(max_examples=max(8, settings().max_examples // 8))  # loops over numbers are slow
@given(cases(dtype="float64"), st.sampled_from(["drawn", "full", "one", "empty"]))
def test_the_objective_by_plain_loops(case: Case, mask: Any) -> None:
    """Any unroll length; padded rows are not trained, since the loops see none."""
    check(replace(case, mask=mask, lengths=tuple(min(length, 8) for length in case.lengths[:2])))


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("normalization", ["rows", "mask"])
def test_the_fast_numerics_by_plain_loops(normalization: Any, steps: int) -> None:
    case = Case(
        dtype="float64",
        steps=steps,
        normalization=normalization,
        lengths=(7, 4),
        own_positions=True,
        eps=1e-2,
    )
    check(case, numerics="fast")

"""Both accuracies and the share of rows counted, on batches whose draft is often right."""

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import eagle3fn as e3
from eagle3fn.base.rows import surviving
from eagle3fn.base.types import Batch
from eagle3fn.model import losses
from eagle3fn.testing.builders import Case, tiny_batch, tiny_frozen, tiny_params
from eagle3fn.train.track import readable

RATES = ("accuracy", "conditional_accuracy", "counted", "accepted_length", "rows")
COUNTS = ("correct", "rows", "chain_rows", "chain_correct", "accept_rows", "greedy")
PLACES = {
    "next_ids": 1,
    "attention_mask": 1,
    "row_mask": 2,
    "aux_hidden": 1,
    "label_hidden": 1,
    "position_ids": 1,
    "survives": 1,
}
"""Fields of a batch by the axis of a sample's places."""

FEW = settings(max_examples=max(10, settings().max_examples // 4))
BOTH = pytest.mark.parametrize("numerics", ["fast", "plain"])


def often_right(seed: int, **changes: Any) -> Case:
    """A case of few tokens: the draft is right by chance, also several times in a row."""
    sizes = {"vocab": 3, "draft_vocab": 2, "lengths": (14, 9), "steps": 4, "mask": "drawn"}
    return Case(seed=seed, dtype="float64", **(sizes | changes))


def batch_of(case: Case) -> Batch:
    """The case's batch, in which neighbouring labels are often alike: so chains are long."""
    batch = tiny_batch(case)
    return batch._replace(label_hidden=batch.label_hidden + 2 * batch.label_hidden[:, :1])


def aux_of(case: Case, batch: Batch, numerics: str, survival: float = 1.0) -> e3.Aux:
    config = case.config()
    objective = replace(config.objective, numerics=numerics, survival=survival)
    config = replace(config, objective=objective)
    _, aux = e3.forward_loss(tiny_params(case), batch, config=config, frozen=tiny_frozen(case))
    return aux


def padded(batch: Batch, columns: int, samples: int) -> Batch:
    """The batch with more places at the end of each sample, and empty samples after the last."""

    def grown(name: str) -> Tensor | None:
        x = getattr(batch, name)
        if x is None:
            return None
        pairs = [0, 0] * x.ndim  # of the last axis first
        pairs[2 * (x.ndim - 1 - PLACES[name]) + 1] = columns
        pairs[2 * (x.ndim - 1) + 1] = samples
        return F.pad(x, pairs)

    return batch._replace(plan=None, **{name: grown(name) for name in PLACES})


@BOTH
@FEW
@given(st.integers(0, 500), st.integers(0, 5), st.integers(0, 2), st.booleans())
def test_padding_moves_no_rate(
    numerics: str, seed: int, columns: int, samples: int, thinned: bool
) -> None:
    case = often_right(seed)
    batch = batch_of(case)
    rate = 1.0
    if thinned:
        source = torch.Generator().manual_seed(seed)
        rate = 0.7
        shape = batch.attention_mask.shape
        batch = batch._replace(survives=torch.randint(1, 5, shape, generator=source))
    before = aux_of(case, batch, numerics, rate)
    after = aux_of(case, padded(batch, columns, samples), numerics, rate)
    for name in COUNTS:
        assert torch.equal(getattr(before, name), getattr(after, name)), name
    assert {name: readable(before)[name] for name in RATES} == {
        name: readable(after)[name] for name in RATES
    }


@BOTH
@FEW
@given(st.integers(0, 500), st.sampled_from([1.0, 0.7]))
def test_rates_are_those_of_a_loop_over_the_survivors(
    numerics: str, seed: int, rate: float
) -> None:
    """By loops over steps and rows, from which tokens are right alone."""
    case = often_right(seed)
    batch = batch_of(case)
    if rate < 1:
        source = torch.Generator().manual_seed(seed)
        shape = batch.attention_mask.shape
        batch = batch._replace(survives=torch.randint(1, 5, shape, generator=source))
    trained = surviving(batch.row_mask, batch.survives)
    right = right_rows(case, batch)

    b, k, s = trained.shape
    found = readable(aux_of(case, batch, numerics, rate))
    for i in range(k):
        rows = hits = reached = kept = 0
        for sample, t in product(range(b), range(s)):
            if not trained[sample, i, t]:
                continue
            before = all(trained[sample, j, t] and right[j][sample, t] for j in range(i))
            hit = bool(right[i][sample, t])
            rows += 1
            hits += hit
            reached += before
            kept += before and hit
        assert found["accuracy"][i] == pytest.approx(hits / max(rows, 1))
        assert found["conditional_accuracy"][i] == pytest.approx(kept / max(reached, 1))


def right_rows(case: Case, batch: Batch) -> list[Tensor]:
    """At each step, which rows' draft argmax is the target's, `(B, S)`, as the plain numerics see
    them.
    """
    seen: list[Tensor] = []
    with pytest.MonkeyPatch.context() as patch:

        def noted(*args: Any) -> Tensor:
            seen.append(losses.correct_rows(*args))
            return seen[-1]

        patch.setattr("eagle3fn.model.plain.correct_rows", noted)
        aux_of(case, batch, "plain")
    return seen


def test_the_cases_have_long_chains() -> None:
    """Without them the tests above would compare zeros."""
    total = sum(
        aux_of(often_right(seed), batch_of(often_right(seed)), "plain").chain_correct
        for seed in range(20)
    )
    assert isinstance(total, Tensor)
    assert (total > 0).all(), total
    assert (total[1:] < total[:-1]).all()


@BOTH
def test_counted_is_the_share_of_labels_in_the_map(numerics: str) -> None:
    case = often_right(3, mask="full", lengths=(12,))
    found = readable(aux_of(case, batch_of(case), numerics))
    frozen = tiny_frozen(case)
    batch = batch_of(case)
    token = (batch.label_hidden @ frozen.target_head.T).argmax(-1)  # (B, S)
    known = rows = 0
    for i in range(case.steps):
        for t in range(12 - i):
            if batch.row_mask[0, i, t]:
                rows += 1
                known += int(frozen.t2d[token[0, t + i]])
    assert found["counted"] == known / rows
    assert 0 < found["counted"] < 1


def test_no_row_has_a_rate_of_zero() -> None:
    case = often_right(0, mask="empty")
    found = readable(aux_of(case, batch_of(case), "fast"))
    assert found["counted"] == 0 and not any(found["conditional_accuracy"])

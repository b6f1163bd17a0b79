"""Rows that survive the unroll by chance: loss, gradients and metrics are right in expectation.

At step `i` a row is scored with the chance `survival^i` and weighs as much more. Enumerated, all
outcomes together give the sum over every row.
"""

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import eagle3fn as e3
from eagle3fn.base.rows import surviving, trained_row_counts
from eagle3fn.base.sections import ObjectiveConfig
from eagle3fn.base.tree import named_leaves
from eagle3fn.base.types import Batch, Params, Sample
from eagle3fn.data.collate import collate
from eagle3fn.data.stages import Item, Loaded
from eagle3fn.data.stages import collate as collate_stage
from eagle3fn.data.survival import draw_survival
from eagle3fn.testing.builders import Case, tiny_batch, tiny_frozen, tiny_params
from eagle3fn.testing.strategies import cases
from tests.model.blocks import error

NUMERICS = ["plain", "fast"]
SUMS = ("losses", "greedy", "sampled")  # metrics whose expectation is that of every row


def config_of(case: Case, **objective: Any) -> e3.Config:
    config = case.config()
    return replace(config, objective=replace(config.objective, **objective))


def evaluate(case: Case, batch: Batch, config: e3.Config) -> tuple[Tensor, e3.Aux, Params]:
    """Loss, metrics, gradients."""

    def loss_of(params: Params) -> Any:
        return e3.forward_loss(params, batch, config=config, frozen=tiny_frozen(case))

    (loss, aux), grads = e3.value_and_grad(loss_of, has_aux=True)(tiny_params(case))
    return loss, aux, grads


def outcomes(batch: Batch, rate: float) -> list[tuple[float, Tensor]]:
    """Every outcome of the trained rows' survival: its chance, and `(B, S)` steps."""
    _, k, _ = batch.row_mask.shape
    reached = batch.row_mask.amax(1).flatten().nonzero()[:, 0].tolist()
    chances = [rate**step * (1 - rate) for step in range(k - 1)] + [rate ** (k - 1)]
    found = []
    for steps in product(range(1, k + 1), repeat=len(reached)):
        survives = torch.ones(batch.attention_mask.numel(), dtype=torch.int64)
        chance = 1.0
        for place, count in zip(reached, steps, strict=True):
            survives[place] = count
            chance *= chances[count - 1]
        found.append((chance, survives.view_as(batch.attention_mask)))
    return found


# In expectation.


@pytest.mark.parametrize("numerics", NUMERICS)
@pytest.mark.parametrize("normalization", ["mask", "rows"])
@pytest.mark.parametrize("loss", ["kl", "lk"])
def test_all_outcomes_together_are_the_sum_of_every_row(
    numerics: str, normalization: str, loss: str
) -> None:
    """By enumeration: the chances' sum of loss, gradients, and of the metrics that are sums."""
    case = Case(dtype="float64", lengths=(4,), steps=3, mask="full")
    rate = 0.6
    config = config_of(
        case, survival=rate, numerics=numerics, normalization=normalization, loss=loss
    )
    batch = tiny_batch(case)
    batch = batch._replace(row_counts=trained_row_counts([batch.row_mask]))
    wanted_loss, wanted_aux, wanted = evaluate(case, batch, config)
    every = outcomes(batch, rate)
    assert len(every) == 3**4
    assert sum(chance for chance, _ in every) == pytest.approx(1)

    total = torch.zeros((), dtype=torch.float64)
    metrics = dict.fromkeys(SUMS, torch.zeros((), dtype=torch.float64))
    grads = {name: torch.zeros_like(grad) for name, grad in wanted.items()}
    for chance, survives in every:
        found_loss, aux, found = evaluate(case, batch._replace(survives=survives), config)
        total += chance * found_loss
        for name in SUMS:
            metrics[name] = metrics[name] + chance * getattr(aux, name).double()
        for name, grad in found.items():
            grads[name] += chance * grad

    assert total == pytest.approx(float(wanted_loss), rel=1e-12)
    for name, value in metrics.items():
        torch.testing.assert_close(value, getattr(wanted_aux, name).double(), rtol=1e-5, atol=1e-6)
    for name, grad in grads.items():
        assert error(grad, wanted[name]) < 1e-11, name


def samples_of(lengths: list[int], width: int = 16) -> list[Sample]:
    source = torch.Generator().manual_seed(sum(lengths))
    return [
        Sample(
            torch.randint(40, (n,), generator=source),
            torch.ones(n, dtype=torch.int64),
            torch.randn(n, 3 * width, generator=source),
            torch.randn(n, width, generator=source),
        )
        for n in lengths
    ]


def test_drawn_losses_average_to_the_full_one() -> None:
    """100 drawn steps: the mean is within four standard errors of the sum over every row."""
    case = Case(dtype="float64", lengths=(9, 6), steps=4, mask="full")
    config = config_of(case, survival=0.5)
    batch = tiny_batch(case)
    batch = batch._replace(row_counts=trained_row_counts([batch.row_mask]))
    wanted, *_ = evaluate(case, batch, config)
    samples = samples_of([9, 9])

    losses = []
    for step in range(100):
        drawn = draw_survival(samples, [0, 1], config, step)
        assert drawn is not None
        thinned = batch._replace(survives=torch.stack(drawn))
        loss, _ = e3.forward_loss(
            tiny_params(case), thinned, config=config, frozen=tiny_frozen(case)
        )
        losses.append(loss)
    found = torch.stack(losses)
    standard_error = found.std() / len(found) ** 0.5
    assert 0 < standard_error < 0.1 * wanted
    assert (found.mean() - wanted).abs() < 4 * standard_error


# Both numerics, any survivors.


@given(data=st.data())
def test_fast_is_plain_for_any_survivors(data: st.DataObject) -> None:
    mask = st.sampled_from(["drawn", "full", "one", "empty"])  # no padded row is trained
    case = data.draw(cases(dtype="float64", mask=mask))
    batch = tiny_batch(case)
    k = case.steps
    steps = st.lists(
        st.integers(1, k),
        min_size=batch.attention_mask.numel(),
        max_size=batch.attention_mask.numel(),
    )
    survives = torch.tensor(data.draw(steps)).view_as(batch.attention_mask)
    batch = batch._replace(survives=survives)
    rate = data.draw(st.sampled_from([0.3, 0.8, 1.0]))
    plain = config_of(case, survival=rate, numerics="plain")
    fast = config_of(case, survival=rate, numerics="fast")

    wanted_loss, wanted_aux, wanted = evaluate(case, batch, plain)
    loss, aux, grads = evaluate(case, batch, fast)
    assert loss == pytest.approx(float(wanted_loss), rel=1e-9, abs=1e-12)
    for name, value in named_leaves(aux).items():
        torch.testing.assert_close(value, getattr(wanted_aux, name), rtol=1e-5, atol=1e-6)
    for name, grad in grads.items():
        assert error(grad, wanted[name]) < 1e-9, name


@pytest.mark.parametrize("numerics", NUMERICS)
def test_survival_of_all_is_the_full_sum_to_the_bit(numerics: str) -> None:
    """Nothing is drawn at 1.0; and rows that all survive are as rows without survival."""
    case = Case(dtype="float32", lengths=(9, 6), steps=4)
    batch = tiny_batch(case)
    config = config_of(case, numerics=numerics)
    assert config.objective.survival == 1.0
    assert draw_survival(samples_of([9]), [0], config, 3) is None

    every = torch.full_like(batch.attention_mask, case.steps)
    wanted_loss, wanted_aux, wanted = evaluate(case, batch, config)
    loss, aux, grads = evaluate(case, batch._replace(survives=every), config)
    assert torch.equal(loss, wanted_loss)
    for name, value in named_leaves(aux).items():
        assert torch.equal(value, getattr(wanted_aux, name)), name
    for name, grad in grads.items():
        assert torch.equal(grad, wanted[name]), name


def test_a_row_that_ends_adds_nothing_to_later_steps() -> None:
    """At step 2 the only survivor is row 3: the gradient of that step's loss is its alone."""
    case = Case(dtype="float64", lengths=(8,), steps=3, mask="full")
    batch = tiny_batch(case)
    survives = torch.ones_like(batch.attention_mask)
    survives[0, 3] = 3
    mask = surviving(batch.row_mask, survives)
    assert mask[0, 1:].nonzero().tolist() == [[0, 3], [1, 3]]
    _, aux, _ = evaluate(case, batch._replace(survives=survives), config_of(case, survival=0.5))
    assert aux.rows.tolist()[1:] == [1, 1]


# What is drawn.


def settings_of(rate: float, **data: Any) -> e3.Config:
    config = Case(steps=5).config()
    objective = replace(config.objective, survival=rate)
    return replace(config, objective=objective, data=e3.DataConfig(**data))


def test_rows_survive_with_the_chance_asked_for() -> None:
    config = settings_of(0.7)
    drawn = draw_survival(samples_of([4000]), [5], config, 2)
    assert drawn is not None
    (steps,) = drawn
    assert steps.dtype == torch.int64 and steps.min() == 1 and steps.max() == 5
    for i in range(5):
        share = float((steps > i).double().mean())
        assert share == pytest.approx(0.7**i, abs=4 * (0.25 / 4000) ** 0.5)


def test_draws_depend_on_seed_step_and_sample_alone() -> None:
    """Not on the other samples, their order, the micro-batch or the rank."""
    config = settings_of(0.5)
    samples = samples_of([30, 20, 25])
    alone = [draw_survival([s], [n], config, 7) for s, n in zip(samples, [4, 9, 2], strict=True)]
    together = draw_survival(samples[::-1], [2, 9, 4], config, 7)
    assert together is not None
    for one, same in zip(alone, together[::-1], strict=True):
        assert one is not None
        assert torch.equal(one[0], same)

    other_seed = replace(config, train=replace(config.train, seed=1))
    for changed in (
        draw_survival(samples[:1], [4], config, 8),
        draw_survival(samples[:1], [5], config, 7),
        draw_survival(samples[:1], [4], other_seed, 7),
    ):
        assert changed is not None and alone[0] is not None
        assert not torch.equal(changed[0], alone[0][0])


def test_micro_batches_carry_their_samples_survival_and_the_full_counts() -> None:
    config = settings_of(0.5, max_length=22, global_batch=4, micro_batch=2)
    samples = samples_of([30, 20, 25, 9])
    drawn = draw_survival(samples, [4, 9, 2, 3], config, 7)
    assert drawn is not None
    loaded = Loaded([[4, 9], [2, 3]], [samples[:2], samples[2:]], [])
    step_7 = Item(loaded, 8 * 4)
    ((parts, _),) = collate_stage([step_7], config)
    ((every, _),) = collate_stage(
        [step_7], replace(config, objective=replace(config.objective, survival=1.0))
    )
    assert [len(part.row_mask) for part in parts] == [2, 2]
    for part, full in zip(parts, every, strict=True):
        assert part.row_counts is not None and full.row_counts is not None
        assert torch.equal(part.row_counts, full.row_counts)
        assert torch.equal(part.row_mask, full.row_mask)
        assert part.plan is not None and full.plan is not None
        assert len(part.plan.label) < len(full.plan.label)
    found = [row for part in parts if part.survives is not None for row in part.survives]
    for row, steps in zip(found, drawn, strict=True):
        assert torch.equal(row[: min(len(steps), 22)], steps[:22])
        assert not row[len(steps) :].any()


def test_a_step_makes_products_for_survivors_alone() -> None:
    """Rows and pairs of the plan: about 1 + 0.5 + 0.25 + … of those of every row."""
    config = settings_of(0.5)
    samples = samples_of([2000])
    full = collate(samples, config).plan
    thin = collate(samples, config, survives=draw_survival(samples, [0], config, 0)).plan
    assert full is not None and thin is not None
    assert full.sizes[0] == thin.sizes[0]
    for i, (some, every) in enumerate(zip(thin.sizes, full.sizes, strict=True)):
        assert some / every == pytest.approx(0.5**i, abs=0.05)
    assert len(thin.label) == pytest.approx(len(full.label) * (2 - 2**-4) / 5, rel=0.05)


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.01, float("nan")])
def test_a_chance_outside_its_range_is_refused(rate: float) -> None:
    with pytest.raises(e3.UserError, match=r"objective\.survival = .* \(0, 1\]"):
        ObjectiveConfig(survival=rate)

"""SpecForge's losses with means over the whole batch: formulas by loops, gradients, refusals."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import eagle3fn as e3
from eagle3fn import specforge
from eagle3fn.base.types import Batch
from eagle3fn.model.checks import check_loss
from eagle3fn.specforge import RECIPE
from eagle3fn.specforge.arithmetic import forward_loss, kl_loss, lk_alpha, lk_lambda, step_loss
from eagle3fn.testing.builders import Case, tiny_batch, tiny_frozen, tiny_params
from eagle3fn.testing.results import Result, named
from tests.factories import (
    LossInput,
    make_batch,
    make_config,
    make_frozen,
    pad_batch,
    underflow,
)
from tests.reference.objective import average
from tests.reference.objective import step_loss as reference_loss

BY_ACCEPTANCE = ("lk_alpha", "lk_lambda")


def objective(loss: Any, **more: Any) -> e3.ObjectiveConfig:
    return e3.ObjectiveConfig(loss=loss, numerics="plain", **more)


def drawn_step() -> LossInput:
    """Two samples of five rows, seven draft tokens of nine; fp64."""
    source = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 7, generator=source, dtype=torch.float64)
    target_logits = torch.randn(2, 5, 9, generator=source, dtype=torch.float64)
    p_full = torch.softmax(target_logits, -1)[..., :7]
    p_draft = p_full / p_full.sum(-1, keepdim=True)
    mask = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 1, 0, 0]])[..., None]
    return LossInput(logits, p_draft, p_full, mask)


def acceptance_by_loops(step: LossInput) -> list[float]:
    """`Σ_v min(p_full(v), draft(v))` of each trained row, in order."""
    rates = []
    for b in range(2):
        for t in range(5):
            if not step.mask[b, t]:
                continue
            draft = torch.softmax(step.logits[b, t], -1).tolist()
            target = step.p_full[b, t].tolist()
            rates.append(sum(min(p, q) for p, q in zip(target, draft, strict=True)))
    return rates


def test_lk_alpha_is_the_mean_negative_log_of_acceptance():
    step = drawn_step()
    rates = acceptance_by_loops(step)
    expected = -sum(math.log(rate) for rate in rates) / len(rates)
    loss = step_loss(*step, None, objective("lk_alpha"))
    assert float(loss) == pytest.approx(expected, rel=1e-12)


def test_lk_lambda_weighs_kl_and_mean_rejection():
    """`w · kl + (1 - w) · (1 - a)`, `w = kl_scale · exp(-kl_decay · a)`, `a` the mean rate."""
    step = drawn_step()
    count = torch.tensor(4.0)
    rates = acceptance_by_loops(step)
    mean = sum(rates) / len(rates)
    kl = float(kl_loss(step.logits, step.p_draft, step.mask, count))
    weight = 0.5 * math.exp(-2.0 * mean)

    settings = objective("lk_lambda", kl_scale=0.5, kl_decay=2.0)
    loss = step_loss(*step, count, settings)
    assert float(loss) == pytest.approx(weight * kl + (1 - weight) * (1 - mean), rel=1e-12)


def test_weight_of_lk_lambda_is_a_constant():
    """The gradient by a row's acceptance rate is that of `-(1 - w) · mean` alone."""
    accept = torch.tensor([[0.3, 0.7]], dtype=torch.float64)
    mask = torch.ones(1, 2, 1)
    kl = torch.tensor(2.0)
    slope = torch.func.grad(lambda a: lk_lambda(kl, a, mask, 1.0, 3.0))(accept)
    weight = math.exp(-3 * 0.5)
    expected = torch.full((1, 2), -(1 - weight) / 2, dtype=torch.float64)
    assert torch.allclose(slope, expected, rtol=1e-12)


@pytest.mark.parametrize("loss", BY_ACCEPTANCE)
def test_gradients_are_those_of_finite_differences(loss):
    step = drawn_step()
    settings = objective(loss, kl_decay=0.0, kl_scale=0.5)

    def value(logits: Tensor) -> Tensor:
        return step_loss(logits, *step[1:], None, settings)

    assert torch.autograd.gradcheck(value, step.logits.clone().requires_grad_())


def test_alpha_leaves_out_rows_whose_acceptance_underflows():
    """SpecForge's expression divides zero by zero there, even in a row that is not trained."""
    logits, p_draft, p_full, mask = underflow()
    settings = objective("lk_alpha")
    ours = logits.clone().requires_grad_()
    theirs = logits.clone().requires_grad_()
    loss = step_loss(ours, p_draft, p_full, mask, None, settings)
    reference = reference_loss(theirs, p_draft, p_full, mask[..., 0], None, settings)
    loss.backward()
    reference.backward()
    assert torch.equal(loss, reference)
    assert theirs.grad is not None
    assert ours.grad is not None

    underflowing = [0, 2]
    assert theirs.grad[0, underflowing].isnan().all()
    assert ours.grad[0, underflowing].abs().sum() == 0

    others = [1, 3]
    assert torch.equal(ours.grad[0, others], theirs.grad[0, others])
    assert ours.grad[0, others].abs().sum() > 0


def test_alpha_has_a_finite_gradient_where_acceptance_is_subnormal():
    accept = torch.tensor([[1e-44, 0.5]]).requires_grad_()
    lk_alpha(accept, torch.ones(1, 2, 1)).backward()
    assert accept.grad is not None
    assert accept.grad.isfinite().all()


def results_on(case: Case, batch: Batch) -> Result:
    """The case's result on another batch than its own."""
    config = case.config()
    frozen = tiny_frozen(case)

    def loss_of(params: dict[str, Tensor]) -> Any:
        return forward_loss(params, batch, config=config, frozen=frozen)

    (loss, aux), gradients = e3.value_and_grad(loss_of, has_aux=True)(tiny_params(case))
    return named(loss, aux, gradients)


@pytest.mark.parametrize("loss", BY_ACCEPTANCE)
def test_padding_does_not_change_loss_or_gradients(loss: Any):
    case = Case(loss=loss, dtype="float64", normalization="mask")
    batch = tiny_batch(case)
    left = results_on(case, batch)
    right = results_on(case, pad_batch(batch, 3))
    for name, value in left.items():
        assert torch.allclose(value.double(), right[name].double(), rtol=1e-9, atol=1e-12), name


def test_padding_changes_lk_lambda_under_rows():
    """Its KL part is then divided by padded rows too, as SpecForge does it."""
    case = Case(loss="lk_lambda", dtype="float64", normalization="rows")
    batch = tiny_batch(case)
    left = results_on(case, batch)["loss"]
    right = results_on(case, pad_batch(batch, 3))["loss"]
    assert abs(float(left - right)) > 1e-2


def test_mean_over_no_rows_is_zero():
    nothing = torch.zeros(1, 3, 1, dtype=torch.int64)
    assert lk_alpha(torch.full((1, 3), 0.5), nothing) == 0
    assert average(torch.full((1, 3), 0.5), nothing[..., 0]) == 0


@pytest.mark.parametrize("loss", BY_ACCEPTANCE)
def test_acceptance_rises_within_twelve_updates(loss: Any):
    config = make_config(numerics="plain", loss=loss)
    config = replace(config, optimizer=e3.OptimizerConfig(learning_rate=0.03))
    fns = e3.bind(config, make_frozen(config), recipe=RECIPE)
    batch = make_batch(1, (12,))
    state = fns.init_state(fns.init(0))
    rates = []
    for _ in range(12):
        state, metrics = fns.step(state, batch)
        aux = metrics["aux"]
        rates.append(float(aux.accept.sum() / aux.accept_rows.sum()))
    assert rates[-1] > rates[0] + 0.05


@pytest.mark.parametrize("loss", BY_ACCEPTANCE)
def test_means_over_the_batch_need_the_recipe_and_one_micro_batch(loss: Any):
    config = make_config(numerics="plain", loss=loss)
    frozen = make_frozen(config)
    with pytest.raises(e3.UserError, match=rf"objective\.loss = '{loss}': must be one of 'kl', "):
        e3.bind(config, frozen)

    split = replace(config, data=e3.DataConfig(global_batch=4))
    with pytest.raises(e3.UserError, match=r"data\.micro_batch = 1: must be 4"):
        e3.bind(split, frozen, recipe=RECIPE)
    whole = replace(config, data=e3.DataConfig(global_batch=4, micro_batch=4))
    e3.bind(whole, frozen, recipe=RECIPE)

    fns = e3.bind(config, frozen, recipe=RECIPE)
    batch = make_batch(0, (5,))
    with pytest.raises(e3.UserError, match=r"2 micro-batches under objective\.loss"):
        fns.step(fns.init_state(fns.init(0)), (batch, batch))


@pytest.mark.parametrize("loss", ["rkl", "lk"])
def test_losses_by_row_are_those_of_the_plain_numerics(loss: str):
    case = Case(loss=loss, normalization="mask")
    frozen = tiny_frozen(case)
    options = {"config": case.config(), "frozen": frozen}
    expected, _ = e3.forward_loss(tiny_params(case), tiny_batch(case), **options)
    found, _ = forward_loss(tiny_params(case), tiny_batch(case), **options)
    assert torch.equal(found, expected)


def test_batch_means_need_every_row():
    """Survivors' means are not the batch's in expectation: refused before any work."""
    settings = {"loss": "lk_alpha", "survival": 0.5}
    config, recipe = specforge.recipe(Case().draft(), objective=settings)
    with pytest.raises(e3.UserError, match=r"objective\.survival = 0\.5: must be 1 under"):
        check_loss(config, recipe.batch_means)

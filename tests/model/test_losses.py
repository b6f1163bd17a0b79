"""The losses by acceptance: their parts by hand, where they leave the old tool's, and what is refused."""

from dataclasses import replace
from typing import Any

import pytest
import torch

import eagle3fn as e3
from eagle3fn.model.losses import kl_loss, lk_alpha, lk_lambda, step_loss
from eagle3fn.specforge.oracle import Oracle, run_oracle
from eagle3fn.testing.builders import Case, tiny_batch, tiny_frozen, tiny_params
from eagle3fn.testing.results import Result, run_forward
from tests.reference.objective import average
from tests.reference.objective import step_loss as reference_loss
from tests.small import batch_of, config_of, frozen_of, underflow

BY_ACCEPTANCE = ("lk_alpha", "lk_lambda")


def objective(loss: Any, **more: Any) -> e3.ObjectiveConfig:
    return e3.ObjectiveConfig(loss=loss, numerics="plain", **more)


def drawn_step(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    """Logits, teacher over draft and full vocabulary, mask."""
    source = torch.Generator().manual_seed(0)
    logits, wide = (
        torch.randn(2, 5, size, generator=source, dtype=torch.float64) for size in (7, 9)
    )
    full = torch.softmax(wide, -1)
    q, mask = full[..., :7], torch.tensor([[1, 1, 0, 1, 0], [0, 0, 1, 0, 0]])[..., None]
    return logits.to(dtype), (q / q.sum(-1, keepdim=True)).to(dtype), q.to(dtype), mask


def test_the_formulas_by_plain_loops():
    logits, p, q, mask = drawn_step()
    rows = [(b, t) for b in range(2) for t in range(5) if mask[b, t]]
    student = [[float(x) for x in torch.softmax(logits[b, t], -1)] for b, t in rows]
    accept = [
        sum(min(float(q[b, t, v]), s[v]) for v in range(7))
        for (b, t), s in zip(rows, student, strict=True)
    ]
    mean = sum(accept) / len(accept)
    log_mean = sum(float(torch.tensor(a, dtype=torch.float64).log()) for a in accept) / len(accept)
    assert float(step_loss(logits, p, q, mask, None, objective("lk_alpha"))[0]) == pytest.approx(
        -log_mean, rel=1e-12
    )
    kl = float(kl_loss(logits, p, mask, torch.tensor(4.0)))
    weight = 0.5 * float(torch.tensor(-2.0 * mean, dtype=torch.float64).exp())
    settings = objective("lk_lambda", kl_scale=0.5, kl_decay=2.0)
    loss, seen = step_loss(logits, p, q, mask, torch.tensor(4.0), settings)
    assert float(loss) == pytest.approx(weight * kl + (1 - weight) * (1 - mean), rel=1e-12)
    assert torch.allclose(
        seen[mask[..., 0] > 0], torch.tensor(accept, dtype=torch.float64), rtol=1e-12
    )


def test_the_weight_of_lambda_is_a_constant():
    accept, mask = torch.tensor([[0.3, 0.7]], dtype=torch.float64), torch.ones(1, 2, 1)
    slope = torch.func.grad(lambda a: lk_lambda(torch.tensor(2.0), a, mask, 1.0, 3.0))(accept)
    weight = torch.exp(torch.tensor(-3 * 0.5, dtype=torch.float64))
    assert torch.allclose(
        slope, -(1 - weight) / 2 * torch.ones(1, 2, dtype=torch.float64), rtol=1e-12
    )


@pytest.mark.parametrize("loss", BY_ACCEPTANCE)
def test_gradients_are_those_of_finite_differences(loss):
    logits, p, q, mask = drawn_step()

    def value(x):
        return step_loss(x, p, q, mask, None, objective(loss, kl_decay=0.0, kl_scale=0.5))[0]

    assert torch.autograd.gradcheck(value, logits.clone().requires_grad_())


def test_alpha_has_a_gradient_where_acceptance_underflows():
    """The old tool's expression divides zero by zero, even in a masked row; ours leaves the row out."""
    logits, p, q, mask = underflow()
    settings = objective("lk_alpha")
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss = step_loss(ours, p, q, mask, None, settings)[0]
    old = reference_loss(theirs, p, q, mask[..., 0], None, settings)
    loss.backward()
    old.backward()
    assert torch.equal(loss, old)
    assert theirs.grad is not None and ours.grad is not None
    assert theirs.grad[0, [0, 2]].isnan().all()  # the masked row and the trained one
    kept = [1, 3]
    assert ours.grad[0, [0, 2]].abs().sum() == 0
    assert (
        torch.equal(ours.grad[0, kept], theirs.grad[0, kept]) and ours.grad[0, kept].abs().sum() > 0
    )


def test_alpha_stays_finite_where_acceptance_is_subnormal():
    accept = torch.tensor([[1e-44, 0.5]]).requires_grad_()
    lk_alpha(accept, torch.ones(1, 2, 1)).backward()
    assert accept.grad is not None and accept.grad.isfinite().all()


def peaked(case: Case) -> dict[str, torch.Tensor]:
    """Parameters whose draft is so sure that most of its probabilities are zero in fp32."""
    params = tiny_params(case)
    return params | {"lm_head.weight": params["lm_head.weight"] * 4000}


def test_the_old_tool_has_no_gradient_there(oracle: Oracle, monkeypatch):
    case = Case(loss="lk_alpha", steps=2)
    monkeypatch.setattr("eagle3fn.specforge.oracle.tiny_params", peaked)
    monkeypatch.setattr("eagle3fn.testing.results.tiny_params", peaked)
    old, ours = run_oracle(oracle, case), run_forward(e3.forward_loss, case)
    assert torch.isfinite(old["loss"]) and old["fc.weight"].isnan().any()
    assert all(torch.isfinite(value).all() for value in ours.values())


def padded_twice(case: Case) -> tuple[Result, Result]:
    """Results on a batch, and on the same with three more padded places."""
    config, frozen, params = case.config(), tiny_frozen(case), tiny_params(case)
    batch, results = tiny_batch(case), []
    padded = e3.Batch(
        *(torch.nn.functional.pad(x, (0, 0, 0, 3) if x.ndim == 3 else (0, 3)) for x in batch[:5])
    )
    for one in (batch, padded):
        compute = e3.value_and_grad(
            lambda p, b: e3.forward_loss(p, b, config=config, frozen=frozen)[0]
        )
        loss, grads = compute(params, one)
        results.append({"loss": loss, **grads})
    return results[0], results[1]


@pytest.mark.parametrize("loss", BY_ACCEPTANCE)
def test_padding_does_not_move_the_losses(loss: Any):
    left, right = padded_twice(Case(loss=loss, dtype="float64", normalization="mask"))
    assert all(torch.allclose(left[name], right[name], rtol=1e-9, atol=1e-12) for name in left)


def test_padding_moves_the_old_lambda():
    """Under "rows" its KL part is divided by padding too: the old tool's, kept by that name."""
    left, right = padded_twice(Case(loss="lk_lambda", dtype="float64", normalization="rows"))
    assert abs(float(left["loss"] - right["loss"])) > 1e-2


def test_masked_means_of_nothing_are_zero():
    nothing = torch.zeros(1, 3, 1, dtype=torch.int64)
    assert lk_alpha(torch.full((1, 3), 0.5), nothing) == 0
    assert average(torch.full((1, 3), 0.5), nothing[..., 0]) == 0


@pytest.mark.parametrize("loss", BY_ACCEPTANCE)
def test_a_draft_learns_by_acceptance(loss: Any):
    config = replace(
        config_of("float32", numerics="plain", loss=loss), optimizer=e3.OptimizerConfig(0.03)
    )
    fns, batch = e3.bind(config, frozen_of(config)), batch_of(1, (12,))
    state, rates = fns.init_state(fns.init(0)), []
    for _ in range(12):
        state, metrics = fns.step(state, batch)
        rates.append(float(metrics["aux"].accept.sum() / metrics["aux"].accept_rows.sum()))
    assert rates[-1] > rates[0] + 0.05


def test_refusals_name_the_setting():
    for loss in BY_ACCEPTANCE:
        with pytest.raises(e3.UserError, match=r"objective\.loss = .*objective\.numerics='plain'"):
            e3.ObjectiveConfig(loss=loss)
        config = config_of(numerics="plain", loss=loss)
        with pytest.raises(e3.UserError, match=r"data\.micro_batch = 1: must be 4"):
            replace(config, data=e3.DataConfig(global_batch=4))
        replace(config, data=e3.DataConfig(global_batch=4, micro_batch=4))
        fns, batch = e3.bind(config, frozen_of(config)), batch_of(0, (5,))
        with pytest.raises(e3.UserError, match=r"2 micro-batches under objective\.loss"):
            fns.step(fns.init_state(fns.init(0)), (batch, batch))
    for name, value in (
        ("kl_scale", 1.1),
        ("kl_scale", -0.1),
        ("kl_decay", -1.0),
        ("kl_decay", float("inf")),
    ):
        with pytest.raises(e3.UserError, match=f"objective.{name} = "):
            replace(e3.ObjectiveConfig(), **{name: value})

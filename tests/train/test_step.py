"""The functional core on fixed pieces: gradients, padding, bound functions, metrics, schedules, refusals."""

from dataclasses import replace

import pytest
import torch

import eagle3fn as e3
from eagle3fn.base.tree import equal
from eagle3fn.train.optimizer import cosine_schedule
from tests import small
from tests.small import batch_of, config_of, frozen_of


@pytest.fixture(params=["fast", "plain"], autouse=True)
def _numerics(request, monkeypatch):
    monkeypatch.setattr(small, "NUMERICS", request.param)


def setup(dtype="float32", **objective):
    config = config_of(dtype, **objective)
    frozen = frozen_of(config)
    fns = e3.bind(config, frozen)
    return config, frozen, fns, fns.init(0)


def gradient(fns, params, batch):
    return e3.value_and_grad(fns.forward_loss, has_aux=True)(params, batch)[1]


def test_value_and_grad_has_the_bits_of_backward():
    _, _, fns, params = setup("bfloat16")
    batch = batch_of(0, lengths=(7, 5))
    leaves = {name: value.clone().requires_grad_() for name, value in params.items()}
    loss, _ = fns.forward_loss(leaves, batch)
    loss.backward()
    (value, _), grads = e3.value_and_grad(fns.forward_loss, has_aux=True)(params, batch)
    assert torch.equal(value, loss)
    assert all(
        leaf.grad is not None and torch.equal(grads[name], leaf.grad)
        for name, leaf in leaves.items()
    )


def test_value_and_grad_refuses_a_vector():
    with pytest.raises(ValueError, match="scalar"):
        e3.value_and_grad(lambda x: x * 2)(torch.ones(3))


def test_module_level_functions_are_the_bound_ones():
    config, frozen, fns, params = setup()
    batch = batch_of(2, lengths=(6, 3))
    again = e3.forward_loss(params, batch, config=config, frozen=frozen)
    assert torch.equal(fns.forward_loss(params, batch)[0], again[0])
    state = e3.init_state(params, config=config)
    assert equal(fns.step(state, batch)[0], e3.step(state, batch, config=config, frozen=frozen)[0])


def test_padding_does_not_move_loss_or_gradients():
    _, _, fns, params = setup("float64")
    batch = batch_of(4, lengths=(6,))
    padded = e3.Batch(
        *(torch.nn.functional.pad(x, (0, 0, 0, 3) if x.ndim == 3 else (0, 3)) for x in batch[:5])
    )
    a, b = fns.forward_loss(params, batch)[0], fns.forward_loss(params, padded)[0]
    assert torch.allclose(a, b, rtol=1e-12)
    grads = gradient(fns, params, batch), gradient(fns, params, padded)
    assert all(torch.allclose(grads[0][k], grads[1][k], rtol=1e-9, atol=1e-12) for k in params)


def test_losses_of_micro_batches_are_the_loss():
    config, _, fns, params = setup("float64", normalization="rows")
    parts = tuple(batch_of(seed, lengths=(7,)) for seed in (6, 7))
    _, metrics = fns.step(fns.init_state(params), parts)
    weights = config.objective.decay ** torch.arange(4.0)
    assert torch.allclose((weights * metrics["aux"].losses).sum(), metrics["loss"], rtol=1e-6)


def test_without_gradients_the_values_are_the_same():
    _, _, fns, params = setup("float64")
    batch = batch_of(2, lengths=(9, 5))
    with torch.no_grad():
        loss, aux = fns.forward_loss(params, batch)
    (want, want_aux), _ = e3.value_and_grad(fns.forward_loss, has_aux=True)(params, batch)
    assert torch.equal(loss, want)
    assert equal(aux, want_aux)


def test_micro_batches_without_global_counts_are_refused():
    _, _, fns, params = setup()
    parts = tuple(batch_of(seed, lengths=(7,)) for seed in (6, 7))
    with pytest.raises(e3.UserError, match=r"batch\.row_counts is missing"):
        fns.step(fns.init_state(params), parts)
    with pytest.raises(e3.UserError, match="empty tuple"):
        fns.step(fns.init_state(params), ())


def test_empty_mask_gives_zero_loss_and_finite_metrics():
    _, _, fns, params = setup()
    batch = batch_of(8, lengths=(5,))
    batch = batch._replace(row_mask=torch.zeros_like(batch.row_mask))
    (loss, aux), grads = e3.value_and_grad(fns.forward_loss, has_aux=True)(params, batch)
    assert loss == 0
    assert all(g.abs().sum() == 0 for g in grads.values())
    assert aux.greedy == 0


def test_simulated_accepted_length_by_plain_loops():
    _, frozen, fns, params = setup("float64", ttt_length=3)
    batch = batch_of(9, lengths=(40,))
    params = params | {"lm_head.weight": params["lm_head.weight"] * 0}  # always says draft id 0
    aux = fns.forward_loss(params, batch)[1]
    teacher = (batch.last_hidden.double() @ frozen.target_head.double().T).argmax(-1)[0]
    first = int(frozen.d2t[0])
    mask = batch.row_mask[0].tolist()
    total = 0
    for row in range(40):
        for i in range(3):
            place = row + i
            if place + 1 >= 40 or not mask[place] or int(teacher[place + 1]) != first:
                break
            total += 1
    assert int(aux.greedy) == total


def test_start_from_target_takes_head_norm_and_last_tap():
    config, frozen, _, params = setup()
    h = config.draft.hidden_size
    started = e3.start_from_target(params, frozen._replace(target_norm=torch.full((h,), 2.0)))
    assert torch.equal(started["lm_head.weight"], frozen.target_head[frozen.t2d])
    assert torch.equal(started["norm.weight"], torch.ones(h))
    taps = torch.randn(1, 4, 3 * h)
    assert torch.equal(taps @ started["fc.weight"].T, taps[..., 2 * h :])
    with pytest.raises(e3.UserError, match="init=random"):
        e3.start_from_target(
            params | {"fc.weight": torch.zeros(h, 3 * h + 3)}, frozen, torch.ones(h)
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"row_mask": torch.ones(1, 4)}, "batch.row_mask has shape"),
        ({"aux_hidden": torch.zeros(1, 6, 7)}, "batch.aux_hidden has shape"),
        ({"last_hidden": torch.zeros(1, 6, 16, dtype=torch.int64)}, "floating point"),
        ({"input_ids": torch.zeros(6, dtype=torch.int64)}, "must be"),
        ({"input_ids": torch.zeros(1, 6)}, "dtype"),
        ({"rows": torch.zeros(2)}, "dtype"),
        ({"n": torch.ones(9)}, r"batch\.row_counts has shape"),
        ({"rows": torch.zeros(3, 2, dtype=torch.int64)}, r"batch\.rows has shape"),
    ],
)
def test_batches_that_do_not_fit_are_refused(change, message):
    _, _, fns, params = setup()
    with pytest.raises(e3.UserError, match=message):
        fns.forward_loss(params, batch_of(0, lengths=(6,))._replace(**change))


def test_sequence_beyond_the_position_limit_is_refused():
    config, frozen, _, params = setup()
    short = replace(config, draft=replace(config.draft, max_position_embeddings=5))
    with pytest.raises(e3.UserError, match="max_position_embeddings = 5"):
        e3.forward_loss(params, batch_of(0, lengths=(6,)), config=short, frozen=frozen)


def test_parameters_of_another_draft_are_refused():
    _, _, fns, params = setup()
    batch = batch_of(0, lengths=(6,))
    with pytest.raises(e3.UserError, match=r"fc\.weight is missing"):
        fns.forward_loss({k: v for k, v in params.items() if k != "fc.weight"}, batch)
    with pytest.raises(e3.UserError, match=r"norm\.weight has shape"):
        fns.forward_loss(params | {"norm.weight": torch.ones(3)}, batch)


def test_closed_form_schedule():
    config = e3.OptimizerConfig(learning_rate=1.0, warmup_ratio=0.2)
    rate = cosine_schedule(config, 10)
    assert [rate(0), rate(1), rate(2)] == [0.5, 1.0, 1.0]
    assert rate(6) == pytest.approx(0.5)
    assert rate(10) == rate(99) == 0.0

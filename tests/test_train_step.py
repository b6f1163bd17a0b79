"""Laws of the functional core: purity, gradients, splits, exact zeros, causality, refusals."""

from dataclasses import replace

import pytest
import torch

import eagle3fn as e3
from eagle3fn.base.tree import equal, named_leaves, tree_map
from eagle3fn.data.collate import global_n
from eagle3fn.train.optimizer import make_schedule
from tests import small
from tests.small import batch_of, config_of, frozen_of


@pytest.fixture(params=["fast", "legacy"], autouse=True)
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
    assert all(leaf.grad is not None and torch.equal(grads[name], leaf.grad) for name, leaf in leaves.items())


def test_value_and_grad_refuses_a_vector():
    with pytest.raises(ValueError, match="scalar"):
        e3.value_and_grad(lambda x: x * 2)(torch.ones(3))


def test_step_leaves_its_input_untouched_and_is_a_function():
    _, _, fns, params = setup()
    state = fns.init_state(params)
    before = tree_map(torch.clone, state)
    batch = batch_of(1, lengths=(6,))
    copy = tree_map(torch.clone, batch)
    first, _ = fns.step(state, batch)
    again, _ = fns.step(state, batch)
    assert equal(state, before)
    assert equal(batch, copy)
    assert equal(first, again)
    assert not equal(first, state)


def test_module_level_functions_are_the_bound_ones():
    config, frozen, fns, params = setup()
    batch = batch_of(2, lengths=(6, 3))
    again = e3.forward_loss(params, batch, config=config, frozen=frozen)
    assert torch.equal(fns.forward_loss(params, batch)[0], again[0])
    state = e3.init_state(params, config=config)
    assert equal(fns.step(state, batch)[0], e3.step(state, batch, config=config, frozen=frozen)[0])


def test_masked_and_padded_places_have_exactly_zero_gradient():
    _, _, fns, params = setup("float64")
    batch = batch_of(3, lengths=(9, 5))
    mask = batch.loss_mask.clone()
    mask[0, 3:] = 0
    mask[1] = 0
    batch = batch._replace(loss_mask=mask)

    def by_features(aux_hidden):
        return fns.forward_loss(params, batch._replace(aux_hidden=aux_hidden))[0]

    grad = e3.value_and_grad(by_features)(batch.aux_hidden)[1]
    assert grad[0, :3].abs().sum() > 0
    assert grad[0, 3:].abs().sum() == 0  # rows behind the last trained one
    assert grad[1].abs().sum() == 0  # another sample, nothing trained


def test_padding_does_not_move_loss_or_gradients():
    _, _, fns, params = setup("float64")
    batch = batch_of(4, lengths=(6,))
    padded = e3.Batch(*(torch.nn.functional.pad(x, (0, 0, 0, 3) if x.ndim == 3 else (0, 3)) for x in batch[:5]))
    a, b = fns.forward_loss(params, batch)[0], fns.forward_loss(params, padded)[0]
    assert torch.allclose(a, b, rtol=1e-12)
    grads = gradient(fns, params, batch), gradient(fns, params, padded)
    assert all(torch.allclose(grads[0][k], grads[1][k], rtol=1e-9, atol=1e-12) for k in params)


def test_causality_by_gradient():
    """Row t of any unroll step sees features up to t and no later one."""
    _, _, fns, params = setup("float64")
    batch = batch_of(5, lengths=(8,))
    seen = 0
    for row in range(7):
        mask = torch.zeros_like(batch.loss_mask)
        mask[0, row] = 1

        def only(aux_hidden, mask=mask):
            return fns.forward_loss(params, batch._replace(aux_hidden=aux_hidden, loss_mask=mask))[0]

        grad = e3.value_and_grad(only)(batch.aux_hidden)[1]
        assert grad[0, row + 1 :].abs().sum() == 0
        seen += bool(grad[0, row].abs().sum() > 0)
    assert seen >= 3


def test_micro_batches_add_up():
    config, frozen, _, params = setup("float64")
    parts = tuple(batch_of(seed, lengths=(7,)) for seed in (6, 7))
    n = global_n(parts, config.objective.ttt_length)
    whole = e3.Batch(*(torch.cat(pair) for pair in zip(*(part[:5] for part in parts), strict=True)))
    split = tuple(part._replace(n=n) for part in parts)
    state = e3.init_state(params, config=config)
    a, ma = e3.step(state, whole, config=config, frozen=frozen)
    b, mb = e3.step(state, split, config=config, frozen=frozen)
    assert torch.allclose(ma["loss"], mb["loss"], rtol=1e-12)
    assert torch.equal(ma["aux"].correct, mb["aux"].correct)
    pairs = zip(named_leaves(a).values(), named_leaves(b).values(), strict=True)
    assert all(torch.allclose(x, y, rtol=1e-6, atol=1e-9) for x, y in pairs)


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
    with pytest.raises(e3.UserError, match=r"batch\.n is missing"):
        fns.step(fns.init_state(params), parts)
    with pytest.raises(e3.UserError, match="empty tuple"):
        fns.step(fns.init_state(params), ())


def test_empty_mask_gives_zero_loss_and_finite_metrics():
    _, _, fns, params = setup()
    batch = batch_of(8, lengths=(5,))
    batch = batch._replace(loss_mask=torch.zeros_like(batch.loss_mask))
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
    mask = batch.loss_mask[0].tolist()
    total = 0
    for row in range(40):
        for i in range(3):
            place = row + i
            if place + 1 >= 40 or not mask[place] or int(teacher[place + 1]) != first:
                break
            total += 1
    assert int(aux.greedy) == total


def test_compact_teacher_is_the_full_one():
    results = []
    for teacher in ("full", "compact"):
        _, _, fns, params = setup("float64", teacher=teacher, teacher_chunk=5)
        batch = batch_of(10, lengths=(9, 4))
        results.append((fns.forward_loss(params, batch), gradient(fns, params, batch)))
    (a, ga), (b, gb) = results
    assert torch.allclose(a[0], b[0], rtol=1e-12)
    assert torch.equal(a[1].correct, b[1].correct)
    assert all(torch.allclose(ga[k], gb[k], rtol=1e-9, atol=1e-14) for k in ga)


def test_start_from_target_takes_head_norm_and_last_tap():
    config, frozen, _, params = setup()
    h = config.draft.hidden_size
    started = e3.start_from_target(params, frozen, torch.full((h,), 2.0))
    assert torch.equal(started["lm_head.weight"], frozen.target_head[frozen.t2d])
    assert torch.equal(started["norm.weight"], torch.ones(h))
    taps = torch.randn(1, 4, 3 * h)
    assert torch.equal(taps @ started["fc.weight"].T, taps[..., 2 * h :])
    with pytest.raises(e3.UserError, match="init=random"):
        e3.start_from_target(params | {"fc.weight": torch.zeros(h, 3 * h + 3)}, frozen, torch.ones(h))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss_mask": torch.ones(1, 4)}, "batch.loss_mask has shape"),
        ({"aux_hidden": torch.zeros(1, 6, 7)}, "batch.aux_hidden has shape"),
        ({"last_hidden": torch.zeros(1, 6, 16, dtype=torch.int64)}, "floating point"),
        ({"input_ids": torch.zeros(6, dtype=torch.int64)}, "must be"),
        ({"input_ids": torch.zeros(1, 6)}, "dtype"),
        ({"rows": torch.zeros(1, 2)}, "dtype"),
        ({"n": torch.ones(9)}, r"batch\.n has shape"),
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
    rate = make_schedule(config, 10)
    assert [rate(0), rate(1), rate(2)] == [0.5, 1.0, 1.0]
    assert rate(6) == pytest.approx(0.5)
    assert rate(10) == rate(99) == 0.0


def test_legacy_schedule_peaks_above_its_base():
    rate = make_schedule(e3.OptimizerConfig(learning_rate=1.0, warmup_ratio=0.0, schedule="legacy"), 17)
    assert rate(0) == pytest.approx(1.0086, abs=5e-5)
    assert make_schedule(e3.OptimizerConfig(learning_rate=1.0, warmup_ratio=0.0, schedule="legacy"), 1)(0) == 2.0
    assert rate(25) > rate(17)
    with pytest.raises(e3.UserError, match="at least 1 step"):
        make_schedule(e3.OptimizerConfig(schedule="legacy"), 0)

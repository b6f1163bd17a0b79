"""Gradients, padding, metrics and refusals on fixed tiny problems, under both numerics."""

from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import eagle3fn as e3
from eagle3fn.base.tree import equal
from eagle3fn.base.types import Batch, Frozen, Params
from eagle3fn.train.bind import Functions
from tests.factories import make_batch, make_config, make_frozen, make_unaligned, pad_batch


class Problem(NamedTuple):
    """A configuration, what is bound to it, and first parameters."""

    config: e3.Config
    frozen: Frozen
    fns: Functions
    params: Params


@pytest.fixture(params=["fast", "plain"])
def numerics(request: pytest.FixtureRequest) -> str:
    return request.param


def make_problem(numerics: str, dtype: str = "float32", **objective: Any) -> Problem:
    config = make_config(dtype, numerics=numerics, **objective)
    frozen = make_frozen(config)
    fns = e3.bind(config, frozen)
    return Problem(config, frozen, fns, fns.init(0))


def gradient(fns: Functions, params: Params, batch: Batch) -> Params:
    _, grads = e3.value_and_grad(fns.forward_loss, has_aux=True)(params, batch)
    return grads


def test_value_and_grad_has_the_bits_of_backward(numerics):
    problem = make_problem(numerics, "bfloat16")
    batch = make_batch(0, lengths=(7, 5))

    leaves = {name: value.clone().requires_grad_() for name, value in problem.params.items()}
    loss, _ = problem.fns.forward_loss(leaves, batch)
    loss.backward()

    compute = e3.value_and_grad(problem.fns.forward_loss, has_aux=True)
    (value, _), grads = compute(problem.params, batch)
    assert torch.equal(value, loss)
    for name, leaf in leaves.items():
        assert leaf.grad is not None, name
        assert torch.equal(grads[name], leaf.grad), name


def test_value_and_grad_refuses_a_vector():
    with pytest.raises(ValueError, match="scalar"):
        e3.value_and_grad(lambda x: x * 2)(torch.ones(3))


def test_module_level_functions_equal_the_bound_ones(numerics):
    config, frozen, fns, params = make_problem(numerics)
    batch = make_batch(2, lengths=(6, 3))

    loss, _ = e3.forward_loss(params, batch, config=config, frozen=frozen)
    assert torch.equal(fns.forward_loss(params, batch)[0], loss)

    state = e3.init_state(params, config=config)
    after, _ = e3.step(state, batch, config=config, frozen=frozen)
    assert equal(fns.step(state, batch)[0], after)


def test_padding_does_not_change_loss_or_gradients(numerics):
    _, _, fns, params = make_problem(numerics, "float64")
    batch = make_batch(4, lengths=(6,))
    padded = pad_batch(batch, 3)

    loss, _ = fns.forward_loss(params, batch)
    loss_padded, _ = fns.forward_loss(params, padded)
    assert torch.allclose(loss, loss_padded, rtol=1e-12)

    grads = gradient(fns, params, batch)
    grads_padded = gradient(fns, params, padded)
    for name in params:
        assert torch.allclose(grads[name], grads_padded[name], rtol=1e-9, atol=1e-12), name


def test_decayed_sum_of_step_losses_is_the_loss_over_micro_batches(numerics):
    config, _, fns, params = make_problem(numerics, "float64", normalization="rows")
    parts = tuple(make_batch(seed, lengths=(7,)) for seed in (6, 7))
    _, metrics = fns.step(fns.init_state(params), parts)

    weights = config.objective.decay ** torch.arange(4.0)
    total = (weights * metrics["aux"].losses).sum()
    assert torch.allclose(total, metrics["loss"], rtol=1e-6)


def test_values_without_gradients_are_the_same(numerics):
    _, _, fns, params = make_problem(numerics, "float64")
    batch = make_batch(2, lengths=(9, 5))
    with torch.no_grad():
        loss, aux = fns.forward_loss(params, batch)

    (expected, expected_aux), _ = e3.value_and_grad(fns.forward_loss, has_aux=True)(params, batch)
    assert torch.equal(loss, expected)
    assert equal(aux, expected_aux)


def test_micro_batches_without_global_counts_are_refused(numerics):
    _, _, fns, params = make_problem(numerics)
    parts = tuple(make_batch(seed, lengths=(7,)) for seed in (6, 7))
    with pytest.raises(e3.UserError, match=r"batch\.row_counts is missing"):
        fns.step(fns.init_state(params), parts)
    with pytest.raises(e3.UserError, match="empty tuple"):
        fns.step(fns.init_state(params), ())


def test_empty_mask_gives_zero_loss_and_zero_gradients(numerics):
    _, _, fns, params = make_problem(numerics)
    batch = make_batch(8, lengths=(5,))
    batch = batch._replace(row_mask=torch.zeros_like(batch.row_mask))

    (loss, aux), grads = e3.value_and_grad(fns.forward_loss, has_aux=True)(params, batch)
    assert loss == 0
    assert all(grad.abs().sum() == 0 for grad in grads.values())
    assert aux.greedy == 0


def test_simulated_accepted_length_equals_plain_loops(numerics):
    """A draft with a zero head always proposes draft id 0."""
    _, frozen, fns, params = make_problem(numerics, "float64", ttt_length=3)
    unaligned = make_unaligned(9, lengths=(40,))
    batch = unaligned.aligned(3)
    params = params | {"lm_head.weight": torch.zeros_like(params["lm_head.weight"])}
    aux = fns.forward_loss(params, batch)[1]

    logits = unaligned.last_hidden.double() @ frozen.target_head.double().T
    choices = logits.argmax(-1)[0]  # (S,)
    proposed = int(frozen.d2t[0])
    mask = unaligned.row_mask[0].tolist()
    accepted = 0
    for row in range(40):
        for i in range(3):
            label = row + i
            if label + 1 >= 40 or not mask[label] or int(choices[label + 1]) != proposed:
                break
            accepted += 1
    assert int(aux.greedy) == accepted


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"row_mask": torch.ones(1, 6)}, r"batch\.row_mask has shape"),
        ({"aux_hidden": torch.zeros(1, 6, 7)}, r"batch\.aux_hidden has shape"),
        ({"label_hidden": torch.zeros(1, 6, 16, dtype=torch.int64)}, "floating point"),
        ({"next_ids": torch.zeros(9, dtype=torch.int64)}, "must be"),
        ({"next_ids": torch.zeros(1, 9)}, "dtype"),
        ({"survives": torch.zeros(1, 6)}, "dtype"),
        ({"row_counts": torch.ones(9)}, r"batch\.row_counts has shape"),
        ({"survives": torch.ones(6, dtype=torch.int64)}, r"batch\.survives has shape"),
    ],
)
def test_batch_that_does_not_fit_is_refused(numerics, change: dict[str, Tensor], message):
    _, _, fns, params = make_problem(numerics)
    with pytest.raises(e3.UserError, match=message):
        fns.forward_loss(params, make_batch(0, lengths=(6,))._replace(**change))


def test_sequence_beyond_the_position_limit_is_refused(numerics):
    config, frozen, _, params = make_problem(numerics)
    short = replace(config, draft=replace(config.draft, max_position_embeddings=5))
    with pytest.raises(e3.UserError, match="max_position_embeddings = 5"):
        e3.forward_loss(params, make_batch(0, lengths=(6,)), config=short, frozen=frozen)


def test_parameters_of_another_draft_are_refused(numerics):
    _, _, fns, params = make_problem(numerics)
    batch = make_batch(0, lengths=(6,))
    without = {name: value for name, value in params.items() if name != "fc.weight"}
    with pytest.raises(e3.UserError, match=r"fc\.weight is missing"):
        fns.forward_loss(without, batch)
    with pytest.raises(e3.UserError, match=r"norm\.weight has shape"):
        fns.forward_loss(params | {"norm.weight": torch.ones(3)}, batch)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("normalization", ["mask", "rows"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_default_dtype_does_not_change_a_bit(
    numerics, dtype, normalization, default, restored_default_dtype
):
    """First parameters, a loss with its metrics and gradients, and two updates."""
    config = make_config(dtype, numerics=numerics, normalization=normalization)
    frozen = make_frozen(config)
    batch = make_batch(3, lengths=(61, 5, 5, 5, 5))  # 305 rows: bf16 does not have this number

    def compute() -> Any:
        fns = e3.bind(config, frozen)
        params = fns.init(0)
        loss_and_gradients = e3.value_and_grad(fns.forward_loss, has_aux=True)(params, batch)
        first, metrics = fns.step(fns.init_state(params), batch)
        second, later = fns.step(first, batch)
        norms = (metrics["grad_norm"], later["grad_norm"])
        return {"params": params, "loss": loss_and_gradients, "state": second, "norms": norms}

    expected = compute()
    torch.set_default_dtype(default)
    found = compute()
    for name, tree in expected.items():
        assert equal(found[name], tree), name


@pytest.fixture
def restored_default_dtype():
    before = torch.get_default_dtype()
    yield
    torch.set_default_dtype(before)


def test_autocast_of_the_caller_is_refused_in_one_sentence(numerics):
    _, _, fns, params = make_problem(numerics)
    batch = make_batch(3, lengths=(9, 5))
    state = fns.init_state(params)
    calls = (lambda: fns.forward_loss(params, batch), lambda: fns.step(state, batch))
    for call in calls:
        with (
            torch.autocast("cpu", dtype=torch.bfloat16),
            pytest.raises(e3.UserError, match=r"torch\.autocast is on for 'cpu'") as error,
        ):
            call()
        assert len(str(error.value).splitlines()) == 1

    # Inside a disabled autocast the bits are those outside of it.
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.autocast("cpu", enabled=False):
        inside, _ = fns.step(state, batch)
    assert equal(inside, fns.step(state, batch)[0])

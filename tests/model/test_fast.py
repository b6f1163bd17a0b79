"""The fast numerics are the plain mathematics: on drawn cases both are compared to fp64.

The fp64 values are computed on the CPU, whatever the device.
"""

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import eagle3fn as e3
from eagle3fn.base.rows import over_steps, plan_rows
from eagle3fn.base.tree import named_leaves
from eagle3fn.testing.builders import Unaligned, on
from tests.factories import make_batch, make_config, make_draft, make_frozen, make_unaligned
from tests.model.blocks import error, vjp

# Relative gradient error against fp64, leaf by leaf: a few units of the dtype's rounding, as for
# the plain numerics.
BOUND = {"float64": 1e-12, "float32": 2e-5, "bfloat16": 0.15}


class Problem(NamedTuple):
    batch: e3.Batch
    row_mask: torch.Tensor  # (B, S), of step 0
    objective: dict[str, Any]
    head_dim: int = 6


def problem(samples: Unaligned, head_dim: int = 6, **objective: Any) -> Problem:
    """These samples, aligned for the objective."""
    batch = samples.aligned(objective["ttt_length"])
    return Problem(batch, samples.row_mask, objective, head_dim)


@st.composite
def cases(draw):
    """A batch with a mask of some kind, the objective's settings, and a head size."""
    lengths = tuple(draw(st.lists(st.integers(1, 24), min_size=1, max_size=3)))
    s = max(lengths)
    samples = make_unaligned(draw(st.integers(0, 10**6)), lengths)

    kind = draw(st.sampled_from(["drawn", "full", "empty", "one", "block"]))
    row = draw(st.integers(0, s - 1))
    mask = torch.zeros_like(samples.row_mask)
    if kind == "drawn":
        mask = samples.row_mask
    elif kind == "full":
        mask = samples.attention_mask
    elif kind == "one":
        mask[0, row] = 1
    elif kind == "block":
        mask[:, row : row + 7] = 1
    mask = mask * samples.attention_mask

    reversed_positions = torch.arange(s).flip(0).expand(len(lengths), -1)
    positions = draw(st.sampled_from([None, reversed_positions]))
    objective = {
        "ttt_length": draw(st.integers(1, 8)),
        "normalization": draw(st.sampled_from(["mask", "rows"])),
    }
    head_dim = draw(st.sampled_from([6, 8]))  # the flash kernel takes multiples of 8
    samples = samples._replace(row_mask=mask, position_ids=positions)
    return problem(samples, head_dim, **objective)


def run(case, dtype, numerics, device="cpu"):
    """Loss and metrics, and gradients, all on the CPU."""
    kind = getattr(torch, dtype)
    draft = make_draft(head_dim=case.head_dim)
    config = make_config(dtype, draft=draft, numerics=numerics, **case.objective)

    # The same values in every dtype: drawn in fp32, then cast.
    start = make_config("float32", draft=draft, **case.objective)
    params = {name: x.to(kind) for name, x in e3.bind(start, make_frozen(start)).init(0).items()}
    drawn = make_frozen(start)
    assert drawn.embed_tokens is not None
    frozen = drawn._replace(
        embed_tokens=drawn.embed_tokens.to(kind), target_head=drawn.target_head.to(kind)
    )

    fns = e3.bind(config, on(device, frozen))
    evaluate = e3.value_and_grad(fns.forward_loss, has_aux=True)
    (loss, aux), grads = evaluate(on(device, params), on(device, case.batch))
    return (loss.cpu(), on("cpu", aux)), on("cpu", grads)


def bound(dtype, numerics, device):
    """Functions, parameters and a batch of two samples on the device."""
    config = make_config(dtype, numerics=numerics)
    fns = e3.bind(config, on(device, make_frozen(config)))
    return fns, on(device, fns.init(0)), on(device, make_batch(6, (9, 5)))


def pull_back_of(fns, params, batch):
    """The loss and its pull-back to the parameters."""
    return vjp(lambda p: fns.forward_loss(p, batch)[0], params)


# Against the plain numerics.


@given(case=cases())
def test_fast_is_plain_in_fp64(device, case):
    (loss, aux), grads = run(case, "float64", "fast", device)
    (want, want_aux), want_grads = run(case, "float64", "plain")

    assert torch.allclose(loss, want, rtol=1e-12)
    for name, value in named_leaves(aux).items():
        assert torch.allclose(value, getattr(want_aux, name), rtol=1e-6), name
        assert value.dtype == getattr(want_aux, name).dtype, name
    for name, grad in grads.items():
        assert error(grad, want_grads[name]) < BOUND["float64"], name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@given(case=cases())
def test_fast_is_as_near_to_fp64_as_plain(dtype, device, case):
    (_, _), truth = run(case, "float64", "plain")
    (loss, _), fast = run(case, dtype, "fast", device)
    (want, _), plain = run(case, dtype, "plain", device)

    rtol = 2e-2 if dtype == "bfloat16" else 1e-4
    assert torch.allclose(loss.float(), want.float(), rtol=rtol, atol=1e-6)
    for name in truth:
        limit = max(BOUND[dtype], 2 * error(plain[name], truth[name]))
        assert error(fast[name], truth[name]) < limit, name


def test_training_by_fast_follows_plain(device):
    batch = on(device, make_batch(7, (16,)))
    states = {}
    losses = {}
    for numerics in ("fast", "plain"):
        config = make_config("float64", numerics=numerics)
        fns = e3.bind(config, on(device, make_frozen(config)))
        state = fns.init_state(on(device, fns.init(0)))
        for _ in range(5):
            state, metrics = fns.step(state, batch)
        states[numerics] = state
        losses[numerics] = float(metrics["loss"])

    assert losses["fast"] == pytest.approx(losses["plain"], rel=1e-9)
    for name, master in states["plain"].masters.items():
        assert error(states["fast"].masters[name], master) < 1e-7, name


# Rows and chunks.


@given(cases())
def test_planned_rows_and_pairs_are_those_that_the_mask_trains(case):
    """By loops: a row is computed up to its last trained step, each trained one is a pair."""
    k = case.objective["ttt_length"]
    mask = over_steps(case.row_mask, k)
    b, _, s = mask.shape
    rows = {}  # place: its steps
    wanted = set()  # (step, place of the row, place of the label)
    for sample in range(b):
        for step in range(k):
            for t in range(s):
                if mask[sample, step, t]:
                    rows[sample * s + t] = step + 1
                    wanted.add((step, sample * s + t, sample * s + t + step))
    if not wanted:
        rows = {0: 1}
        wanted = {(0, 0, 0)}

    plan = plan_rows(mask)
    places = plan.rows.tolist()
    assert places == sorted(rows, key=lambda place: (-rows[place], place))
    sizes = [sum(steps > step for steps in rows.values()) for step in range(k)]
    assert plan.sizes.tolist() == [size for size in sizes if size]
    assert plan.labels.tolist() == sorted({label for _, _, label in wanted})

    # Pairs, by label and step.
    of_steps = [place for size in plan.sizes for place in places[:size]]
    found = []
    for label, row, step, state in zip(plan.label, plan.row, plan.step, plan.state, strict=True):
        found.append((int(step), places[row], int(plan.labels[label])))
        assert of_steps[state] == places[row]
    assert set(found) == wanted and len(found) == len(wanted)
    assert found == sorted(found, key=lambda pair: (pair[2], pair[0]))
    counts = plan.label.bincount(minlength=len(plan.labels))
    assert plan.first.tolist() == [0, *counts.cumsum(0).tolist()]


def test_a_plan_of_other_steps_is_not_scored_where_the_mask_trains_nothing():
    """The mask decides: a pair that it does not train weighs nothing."""
    case = problem(make_unaligned(3, (20, 9)), ttt_length=3)
    batch = case.batch
    every = torch.ones_like(batch.row_mask)
    (want, want_aux), _ = run(case, "float64", "fast")
    more = case._replace(batch=batch._replace(plan=plan_rows(every)))
    (loss, aux), _ = run(more, "float64", "fast")
    assert torch.allclose(loss, want, rtol=1e-12)
    assert torch.equal(aux.rows, want_aux.rows)


def test_small_chunks_change_nothing(monkeypatch):
    case = problem(make_unaligned(4, (20, 9)), ttt_length=3)
    (want, want_aux), want_grads = run(case, "float64", "fast")
    monkeypatch.setattr("eagle3fn.model.head_loss._CHUNK_BYTES", 4 * 3 * 24 * 5)
    (loss, aux), grads = run(case, "float64", "fast")
    assert torch.allclose(loss, want, rtol=1e-12)
    assert torch.equal(aux.correct, want_aux.correct)
    for name, grad in grads.items():
        assert error(grad, want_grads[name]) < 1e-12, name


# Under torch.func.


def test_vmap_over_parameters(device):
    config = make_config("float64", numerics="fast")
    fns = e3.bind(config, on(device, make_frozen(config)))
    batch = on(device, make_batch(5, (12,)))
    two = [on(device, fns.init(seed)) for seed in (0, 1)]
    stacked = {name: torch.stack([params[name] for params in two]) for name in two[0]}

    def gradient(params):
        return e3.value_and_grad(lambda p: fns.forward_loss(p, batch)[0])(params)

    losses, grads = torch.func.vmap(gradient)(stacked)
    for i, params in enumerate(two):
        loss, grad = gradient(params)
        assert torch.allclose(losses[i], loss, rtol=1e-12)
        for name in grad:
            assert error(grads[name][i], grad[name]) < 1e-12, name


@pytest.mark.parametrize("numerics", ["fast", "plain"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_second_pull_back_returns_new_tensors(dtype, numerics, device):
    """A caller may clip the first result in place: the second is bit-identical to the first."""
    fns, params, batch = bound(dtype, numerics, device)
    loss, pull_back = pull_back_of(fns, params, batch)
    with torch.no_grad():
        (first,) = pull_back(torch.ones_like(loss))
        wanted = {name: gradient.clone() for name, gradient in first.items()}
        for gradient in first.values():
            gradient.mul_(0.01)
        (second,) = pull_back(torch.ones_like(loss))

    for name, gradient in wanted.items():
        assert torch.equal(second[name], gradient), name
        if device == "cpu":
            assert second[name].data_ptr() != first[name].data_ptr(), name


@pytest.mark.parametrize("numerics", ["fast", "plain"])
def test_a_pull_back_scales_the_gradient(numerics, device):
    """By 3 it is three times that by 1, also in the last, which overwrites saved tensors."""
    fns, params, batch = bound("float64", numerics, device)
    loss, pull_back = pull_back_of(fns, params, batch)
    with torch.no_grad():
        (one,) = pull_back(torch.ones_like(loss))
        (three,) = pull_back(torch.full_like(loss, 3.0), retain_graph=False)
    for name in one:
        assert error(three[name].cpu(), 3 * one[name].cpu()) < 1e-12, name


@pytest.mark.parametrize("numerics", ["fast", "plain"])
@pytest.mark.parametrize("keep", [False, True])
def test_vmap_over_cotangents_of_one_graph(numerics, keep, device):
    """`vmap` over `torch.autograd.grad`: its entries share the saved tensors."""
    fns, params, batch = bound("float64", numerics, device)
    factors = torch.tensor([2.0, 3.0], dtype=torch.float64, device=device)

    def gradients(pull):
        leaves = {name: leaf.clone().requires_grad_() for name, leaf in params.items()}
        loss = fns.forward_loss(leaves, batch)[0]
        return pull(loss, list(leaves.values()))

    def at_once(loss, leaves):
        def one(factor):
            return torch.autograd.grad(loss, leaves, factor, retain_graph=keep)

        return torch.vmap(one)(factors.to(loss.dtype))

    single = gradients(torch.autograd.grad)
    for found, wanted in zip(gradients(at_once), single, strict=True):
        assert error(found[0].cpu(), 2 * wanted.cpu()) < 1e-12
        assert error(found[1].cpu(), 3 * wanted.cpu()) < 1e-12


def test_a_second_derivative_raises_and_names_plain_which_has_it():
    batch = make_batch(6, (9,))

    def curvature(numerics):
        config = make_config("float64", numerics=numerics)
        fns = e3.bind(config, make_frozen(config))
        params = fns.init(0)
        direction = {name: torch.ones_like(x) for name, x in params.items()}

        def slope(p):
            grads = torch.func.grad(lambda q: fns.forward_loss(q, batch)[0])(p)
            return sum((grads[name] * direction[name]).sum() for name in grads)

        return torch.func.grad(slope)(params)

    assert all(torch.isfinite(x).all() for x in curvature("plain").values())
    with pytest.raises(RuntimeError, match=r"differentiated once.*objective\.numerics = 'plain'"):
        curvature("fast")

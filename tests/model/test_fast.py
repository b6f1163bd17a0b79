"""The fast profile is the legacy mathematics: on drawn cases both are held against an fp64 evaluation.

The truth is computed on the CPU, whatever the device.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import eagle3fn as e3
from eagle3fn.base.rows import contributing_rows
from eagle3fn.base.tree import named_leaves
from eagle3fn.testing.builders import on
from tests.small import batch_of, config_of, frozen_of

# Relative gradient error against fp64, leaf by leaf: a few units of the dtype's rounding, as for the legacy profile.
BOUND = {"float64": 1e-12, "float32": 2e-5, "bfloat16": 0.15}


@st.composite
def cases(draw):
    lengths = tuple(draw(st.lists(st.integers(1, 24), min_size=1, max_size=3)))
    batch = batch_of(draw(st.integers(0, 10**6)), lengths)
    kind = draw(st.sampled_from(["drawn", "full", "empty", "one", "block"]))
    mask = batch.row_mask if kind == "drawn" else torch.zeros_like(batch.row_mask)
    row = draw(st.integers(0, max(lengths) - 1))
    if kind == "full":
        mask = batch.attention_mask
    elif kind == "one":
        mask[0, row] = 1
    elif kind == "block":
        mask[:, row : row + 7] = 1
    mask = mask * batch.attention_mask
    positions = draw(
        st.sampled_from([None, torch.arange(max(lengths)).flip(0).expand(len(lengths), -1)])
    )
    objective = {
        "ttt_length": draw(st.integers(1, 8)),
        "normalization": draw(st.sampled_from(["mask", "rows"])),
        "head_dim": draw(st.sampled_from([6, 8])),  # the flash kernel takes multiples of 8
    }
    return batch._replace(row_mask=mask, position_ids=positions), objective


def run(case, dtype, numerics, device="cpu"):
    """Loss and metrics, and gradients, all on the CPU."""
    batch, objective = case
    config = config_of(dtype, numerics=numerics, **objective)
    start = config_of("float32", **objective)
    params = {
        k: v.to(getattr(torch, dtype)) for k, v in e3.bind(start, frozen_of(start)).init(0).items()
    }
    embed, target_head, t2d, d2t = frozen_of(start)
    kind = getattr(torch, dtype)
    frozen = e3.Frozen(None if embed is None else embed.to(kind), target_head.to(kind), t2d, d2t)
    fns = e3.bind(config, on(device, frozen))
    (loss, aux), grads = e3.value_and_grad(fns.forward_loss, has_aux=True)(
        on(device, params), on(device, batch)
    )
    return (loss.cpu(), on("cpu", aux)), on("cpu", grads)


def error(a, b):
    a, b = a.double(), b.double()
    return float((a - b).norm() / b.norm()) if b.norm() > 0 else float(a.norm())


@given(case=cases())
def test_fast_is_plain_in_fp64(device, case):
    (loss, aux), grads = run(case, "float64", "fast", device)
    (want, want_aux), want_grads = run(case, "float64", "plain")
    assert torch.allclose(loss, want, rtol=1e-12)
    for name, value in named_leaves(aux).items():
        assert torch.allclose(value, getattr(want_aux, name), rtol=1e-6), name
        assert value.dtype == getattr(want_aux, name).dtype, name
    assert all(error(grads[k], want_grads[k]) < BOUND["float64"] for k in grads)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@given(case=cases())
def test_fast_is_as_near_to_fp64_as_plain(dtype, device, case):
    (_, _), truth = run(case, "float64", "plain")
    (loss, _), fast = run(case, dtype, "fast", device)
    (want, _), plain = run(case, dtype, "plain", device)
    assert torch.allclose(
        loss.float(), want.float(), rtol=2e-2 if dtype == "bfloat16" else 1e-4, atol=1e-6
    )
    for name in truth:
        assert error(fast[name], truth[name]) < max(
            BOUND[dtype], 2 * error(plain[name], truth[name])
        ), name


@given(cases())
def test_rows_that_contribute(case):
    batch, objective = case
    k, mask = objective["ttt_length"], batch.row_mask
    rows = contributing_rows(mask, k, bucket=1)
    b, s = mask.shape
    wanted = [r * s + t for r in range(b) for t in range(s) if mask[r, t : t + k].any()]
    assert rows.tolist() == (wanted or [0])
    wide = contributing_rows(mask, k, bucket=16)
    assert torch.equal(wide.unique(), rows)
    assert torch.equal(wide.sort().values, wide)
    assert all(int((wide // s == r).sum()) % 16 == 0 for r in range(b))


def test_given_rows_change_nothing():
    batch, objective = batch_of(3, (20, 9)), {"ttt_length": 3}
    given_rows = batch._replace(
        rows=contributing_rows(batch.row_mask, 3, bucket=1),
        labels=contributing_rows(batch.row_mask, 1, bucket=7),
    )
    (a, _), ga = run((batch, objective), "float64", "fast")
    (b, _), gb = run((given_rows, objective), "float64", "fast")
    assert torch.allclose(a, b, rtol=1e-12)
    assert all(error(ga[k], gb[k]) < 1e-12 for k in ga)


def test_small_chunks_change_nothing(monkeypatch):
    batch, objective = batch_of(4, (20, 9)), {"ttt_length": 3}
    (a, aux), ga = run((batch, objective), "float64", "fast")
    monkeypatch.setattr("eagle3fn.model.head_loss._CHUNK_BYTES", 4 * 3 * 24 * 5)
    (b, again), gb = run((batch, objective), "float64", "fast")
    assert torch.allclose(a, b, rtol=1e-12)
    assert torch.equal(aux.correct, again.correct)
    assert all(error(ga[k], gb[k]) < 1e-12 for k in ga)


def test_vmap_over_parameters(device):
    config = config_of("float64", numerics="fast")
    fns, batch = e3.bind(config, on(device, frozen_of(config))), on(device, batch_of(5, (12,)))
    two = [on(device, fns.init(seed)) for seed in (0, 1)]
    stacked = {k: torch.stack([p[k] for p in two]) for k in two[0]}

    def gradient(params):
        return e3.value_and_grad(lambda p: fns.forward_loss(p, batch)[0])(params)

    losses, grads = torch.func.vmap(gradient)(stacked)
    for i, params in enumerate(two):
        loss, grad = gradient(params)
        assert torch.allclose(losses[i], loss, rtol=1e-12)
        assert all(error(grads[k][i], grad[k]) < 1e-12 for k in grad)


@pytest.mark.parametrize("numerics", ["fast", "plain"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_second_pull_back_does_not_see_what_was_done_with_the_first(dtype, numerics, device):
    """Its own saved tensors must not be what a pull-back hands out: a caller may clip them in place."""
    config = config_of(dtype, numerics=numerics)
    fns, batch = e3.bind(config, on(device, frozen_of(config))), on(device, batch_of(6, (9, 5)))
    loss, pull_back = torch.func.vjp(
        lambda p: fns.forward_loss(p, batch)[0], on(device, fns.init(0))
    )  # pyright: ignore
    with torch.no_grad():
        (first,) = pull_back(torch.ones_like(loss))
        wanted = {name: gradient.clone() for name, gradient in first.items()}
        for gradient in first.values():
            gradient.mul_(0.01)
        (second,) = pull_back(torch.ones_like(loss))
    assert all(torch.equal(second[name], wanted[name]) for name in wanted)
    assert all(
        second[name].data_ptr() != first[name].data_ptr() for name in wanted if device == "cpu"
    )


@pytest.mark.parametrize("numerics", ["fast", "plain"])
def test_a_pull_back_scales_the_gradient(numerics, device):
    """By 3 the gradient is three times that by 1; the last pull-back of a graph writes over what it saved."""
    config = config_of("float64", numerics=numerics)
    fns, batch = e3.bind(config, on(device, frozen_of(config))), on(device, batch_of(6, (9, 5)))
    loss, pull_back = torch.func.vjp(
        lambda p: fns.forward_loss(p, batch)[0], on(device, fns.init(0))
    )  # pyright: ignore
    with torch.no_grad():
        (one,) = pull_back(torch.ones_like(loss))
        (three,) = pull_back(torch.full_like(loss, 3.0), retain_graph=False)
    assert all(error(three[name].cpu(), 3 * one[name].cpu()) < 1e-12 for name in one)


@pytest.mark.parametrize("numerics", ["fast", "plain"])
@pytest.mark.parametrize("keep", [False, True])
def test_gradients_of_many_cotangents_at_once(numerics, keep, device):
    """By `vmap` over `torch.autograd.grad`: the entries share what was saved."""
    config = config_of("float64", numerics=numerics)
    fns, batch = e3.bind(config, on(device, frozen_of(config))), on(device, batch_of(6, (9, 5)))
    factors = torch.tensor([2.0, 3.0], dtype=torch.float64, device=device)

    def slopes(of_many):
        params = {
            name: leaf.clone().requires_grad_() for name, leaf in on(device, fns.init(0)).items()
        }
        loss = fns.forward_loss(params, batch)[0]
        return of_many(loss, list(params.values()), factors.to(loss.dtype))

    one = slopes(lambda loss, leaves, _: torch.autograd.grad(loss, leaves))
    mapped = slopes(
        lambda loss, leaves, v: torch.vmap(
            lambda x: torch.autograd.grad(loss, leaves, x, retain_graph=keep)
        )(v)
    )
    for found, single in zip(mapped, one, strict=True):
        assert (
            error(found[0].cpu(), 2 * single.cpu()) < 1e-12
            and error(found[1].cpu(), 3 * single.cpu()) < 1e-12
        )


def test_differentiating_twice_raises_and_plain_does_it():
    batch = batch_of(6, (9,))

    def curvature(numerics):
        config = config_of("float64", numerics=numerics)
        fns = e3.bind(config, frozen_of(config))
        params = fns.init(0)
        direction = {k: torch.ones_like(v) for k, v in params.items()}

        def slope(p):
            grads = torch.func.grad(lambda q: fns.forward_loss(q, batch)[0])(p)
            return sum((grads[k] * direction[k]).sum() for k in grads)

        return torch.func.grad(slope)(params)

    assert all(torch.isfinite(x).all() for x in curvature("plain").values())
    with pytest.raises(RuntimeError, match="differentiated once"):
        curvature("fast")


def test_training_by_fast_follows_plain(device):
    batch = on(device, batch_of(7, (16,)))
    ends = []
    for numerics in ("fast", "plain"):
        config = config_of("float64", numerics=numerics)
        fns = e3.bind(config, on(device, frozen_of(config)))
        state = fns.init_state(on(device, fns.init(0)))
        for _ in range(5):
            state, metrics = fns.step(state, batch)
        ends.append((state, float(metrics["loss"])))
    assert ends[0][1] == pytest.approx(ends[1][1], rel=1e-9)
    assert all(error(ends[0][0].masters[k], v) < 1e-7 for k, v in ends[1][0].masters.items())

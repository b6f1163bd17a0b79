"""Laws that every loss of the table keeps, and a user's own loss in place of one."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

import eagle3fn as e3
from eagle3fn.base.weights import Weights
from eagle3fn.model import head_loss
from eagle3fn.model.checks import check_loss
from eagle3fn.model.losses import LOSSES, RowLoss, acceptance, step_loss
from eagle3fn.model.named_loss import find_loss
from eagle3fn.specforge.recipes import RECIPE
from eagle3fn.testing.strategies import LOSS_SUMS
from tests.factories import make_batch, make_config, make_frozen
from tests.model.blocks import batch_of, case_of, error, frozen_of
from tests.reference import loops

OWN = "tests.model.test_losses:own"
SUMS = [*LOSS_SUMS, Weights({"nla": 0.5, OWN: 2.0})]  # the last one has no closed form
EVERY = pytest.mark.parametrize("name", [*LOSSES, *SUMS], ids=str)
WITHOUT_OWN = pytest.mark.parametrize("name", [*LOSSES, *LOSS_SUMS], ids=str)
SETTINGS = st.sampled_from([{}, {"kl_scale": 0.5, "kl_decay": 1.0}])

Name = str | Weights
"""What `objective.loss` can be."""


class Rows(NamedTuple):
    """Draft logits of some rows, and their teacher; `p_full` misses what is in other tokens."""

    logits: Tensor  # (B, S, D)
    p_draft: Tensor  # (B, S, D)
    p_full: Tensor  # (B, S, D)


def rows_of(seed: int, d: int, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> Rows:
    """Two samples of three rows, over `d` draft tokens of `d + 2`."""
    source = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 3, d, generator=source, dtype=torch.float64) * scale
    target = torch.randn(2, 3, d + 2, generator=source, dtype=torch.float64) * scale
    p_full = torch.softmax(target, -1)[..., :d]
    p_draft = torch.softmax(target[..., :d], -1)
    return Rows(logits.to(dtype), p_draft.to(dtype), p_full.to(dtype))


def drawn_rows() -> st.SearchStrategy[Rows]:
    return st.builds(
        rows_of, st.integers(0, 10**6), st.integers(1, 9), st.sampled_from([0.1, 1.0, 5.0])
    )


def objective_of(name: Name, **settings: Any) -> e3.ObjectiveConfig:
    """The objective of a loss; settings that it does not read are left out."""
    read = {need for part in parts_of(name) if part in LOSSES for need in LOSSES[part].needs}
    given = {setting: value for setting, value in settings.items() if setting in read}
    return e3.ObjectiveConfig(loss=name, **given)


def parts_of(name: str | Mapping[str, float]) -> list[str]:
    return [name] if isinstance(name, str) else list(name)


def loss_of(name: Name, **settings: Any) -> RowLoss:
    return find_loss(objective_of(name, **settings))


def gradient_of(loss: RowLoss, rows: Rows) -> Tensor:
    """The gradient of the rows' sum by their logits."""
    return torch.func.grad(lambda logits: loss.value(logits, *rows[1:]).sum())(rows.logits)


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-10, atol=1e-12)


# The table


@WITHOUT_OWN
@given(rows=drawn_rows(), settings=SETTINGS)
def test_value_is_its_formula_in_plain_numbers(name: Name, rows: Rows, settings: dict) -> None:
    """A loss without a formula in `tests/reference/loops.py` has to keep the other laws."""
    if not loops.LOSSES.keys() >= {*parts_of(name)}:
        pytest.skip("no formula by loops")
    objective = objective_of(name, **settings)
    draft = torch.softmax(rows.logits, -1)
    expected = []
    columns = [x.flatten(0, 1).tolist() for x in (rows.p_draft, rows.p_full, draft)]
    for p_draft, p_full, s in zip(*columns, strict=True):
        expected.append(loops.row_loss(p_draft, p_full, s, objective))
    found = find_loss(objective).value(*rows).flatten().tolist()
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)


@WITHOUT_OWN
@given(rows=drawn_rows(), settings=SETTINGS)
def test_closed_form_is_the_value_and_its_gradient(name: Name, rows: Rows, settings: dict) -> None:
    loss = loss_of(name, **settings)
    if loss.closed is None:
        pytest.skip("its gradient is the vjp of its value")
    before = [x.clone() for x in rows]
    values, gradient = loss.closed(rows.logits, torch.softmax(rows.logits, -1), *rows[1:])
    assert close(values, loss.value(*rows))
    assert close(gradient, gradient_of(loss, rows))
    assert all(map(torch.equal, rows, before))


@EVERY
@given(rows=drawn_rows())
def test_a_row_does_not_depend_on_the_others(name: Name, rows: Rows) -> None:
    """Its value alone is its value among others, which get no gradient from it."""
    loss = loss_of(name)
    alone = Rows(*(x[1:, 2:] for x in rows))
    assert close(loss.value(*alone), loss.value(*rows)[1:, 2:])

    slope = torch.func.grad(lambda logits: loss.value(logits, *rows[1:])[1, 2])(rows.logits)
    assert slope.flatten(0, 1)[:-1].count_nonzero() == 0


@EVERY
@given(rows=drawn_rows(), shift=st.floats(-5, 5))
def test_logits_of_one_softmax_have_one_value(name: Name, rows: Rows, shift: float) -> None:
    loss = loss_of(name)
    assert torch.allclose(loss.value(*rows), loss.value(rows.logits + shift, *rows[1:]), atol=1e-9)
    assert gradient_of(loss, rows).sum(-1).abs().max() < 1e-9


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(data=st.data())
def test_extreme_logits_have_finite_values_and_gradients(
    name: Name, dtype: torch.dtype, data: st.DataObject
) -> None:
    """Probabilities of draft and teacher underflow to zero, at the same tokens or at others.

    A row counts only where the target's choice is in the draft vocabulary.
    """
    entries = st.sampled_from([0.0, 200.0, -200.0, 2000.0, 1e4, -1e4])
    draft = data.draw(st.lists(entries, min_size=4, max_size=4))
    target = data.draw(st.lists(entries, min_size=6, max_size=6))
    assume(max(target[:4]) >= max(target[4:]))
    z = torch.tensor(target, dtype=dtype)
    p_full = torch.softmax(z, -1)[:4]
    rows = Rows(torch.tensor(draft, dtype=dtype), torch.softmax(z[:4], -1), p_full)

    loss = loss_of(name)
    assert loss.value(*rows).isfinite()
    assert gradient_of(loss, rows).isfinite().all()
    if loss.closed:
        values, gradient = loss.closed(rows.logits, torch.softmax(rows.logits, -1), *rows[1:])
        assert values.isfinite()
        assert gradient.isfinite().all()


@EVERY
def test_settings_reach_the_losses_that_read_them(name: Name) -> None:
    """And are refused where they would change nothing."""
    rows = rows_of(0, 5)
    values = loss_of(name).value(*rows)
    for setting, changed in (("kl_scale", 0.3), ("kl_decay", 1.0)):
        objective = replace(e3.ObjectiveConfig(loss=name), **{setting: changed})
        if "lk" in parts_of(name):
            assert not torch.equal(values, find_loss(objective).value(*rows))
            continue
        message = (
            rf"objective\.{setting} = .*: objective\.loss = .* does not read it; "
            rf"set objective\.{setting}=[13]\.0, its default,"
        )
        with pytest.raises(e3.UserError, match=message + r" or objective\.loss = 'lk'"):
            find_loss(objective)


def test_settings_that_a_given_loss_does_not_read_are_refused() -> None:
    """A user's own `RowLoss` may read any setting, whatever the loss that is named."""
    objective = e3.ObjectiveConfig(kl_scale=0.5)
    scaled = RowLoss(lambda logits, scale: scale * logits.sum(-1), needs=("kl_scale",))
    rows = rows_of(0, 5)
    assert torch.equal(find_loss(objective, scaled).value(*rows), 0.5 * rows.logits.sum(-1))
    with pytest.raises(e3.UserError, match=r"kl_scale = 0\.5: the loss that was given does not"):
        find_loss(objective, own)


def test_weight_of_lk_is_a_constant() -> None:
    """The gradient is that of the two terms, with the weight of these logits."""
    rows = rows_of(1, 6)
    weight = 0.5 * torch.exp(-2 * acceptance(rows.logits, rows.p_full))

    def fixed(logits: Tensor) -> Tensor:
        kl = loss_of("kl").value(logits, *rows[1:])
        return (weight * kl + (1 - weight) * (1 - acceptance(logits, rows.p_full))).sum()

    found = gradient_of(loss_of("lk", kl_scale=0.5, kl_decay=2.0), rows)
    assert close(found, torch.func.grad(fixed)(rows.logits))


def test_nla_has_a_gradient_where_the_acceptance_rate_underflows() -> None:
    logits = torch.tensor([0.0, 300.0])
    p_full = torch.tensor([0.5, 0.0])
    loss = loss_of("nla")
    assert acceptance(logits, p_full) == 0
    gradient = gradient_of(loss, Rows(logits, p_full, p_full))
    assert gradient.tolist() == [pytest.approx(-1.0, abs=1e-3), pytest.approx(1.0, abs=1e-3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("name", "apart", "alike"),
    [("jsd", math.log(2), 0.0), ("tv", 1.0, 0.0), ("ce", 2e4, 0.0), ("kl", 2e4, 0.0)],
)
def test_limits_of_certain_drafts(
    name: str, apart: float, alike: float, dtype: torch.dtype
) -> None:
    """Draft and teacher are each sure of one token, and all other probabilities underflow to 0."""
    sure = torch.tensor([1e4, -1e4, -1e4], dtype=dtype)
    loss = loss_of(name)
    for logits, wanted in ((sure, alike), (sure.roll(1), apart)):
        teacher = torch.softmax(sure, -1)
        rows = Rows(logits, teacher, teacher)
        assert float(loss.value(*rows)) == pytest.approx(wanted, rel=1e-6)
        assert loss.closed is not None
        value, gradient = loss.closed(logits, torch.softmax(logits, -1), *rows[1:])
        assert float(value) == pytest.approx(wanted, rel=1e-6)

        # Logits of the teacher's token up, of the draft's own down, where the loss has a slope.
        slope = wanted != 0 and name in ("ce", "kl")
        assert gradient.tolist() == [-1.0 * slope, 1.0 * slope, 0.0]


def test_cross_entropy_takes_the_first_of_equal_tokens() -> None:
    p_draft = torch.tensor([0.2, 0.4, 0.4])
    logits = torch.tensor([0.0, 1.0, 2.0])
    loss = loss_of("ce")
    wanted = -float(torch.log_softmax(logits, -1)[1])
    assert float(loss.value(logits, p_draft, p_draft)) == pytest.approx(wanted)
    assert loss.closed is not None
    _, gradient = loss.closed(logits, torch.softmax(logits, -1), p_draft, p_draft)
    assert gradient.sign().tolist() == [1, -1, 1]


# Sums


@given(
    rows=drawn_rows(),
    weights=st.dictionaries(st.sampled_from([*LOSSES, OWN]), st.floats(1e-3, 10), min_size=1),
)
def test_a_table_is_the_weighted_sum_of_its_losses(rows: Rows, weights: dict[str, float]) -> None:
    """In any order of the table; its closed form exists if all parts have one."""
    found = loss_of(Weights(weights))
    wanted = sum(weight * loss_of(name).value(*rows) for name, weight in weights.items())
    slope = sum(weight * gradient_of(loss_of(name), rows) for name, weight in weights.items())
    assert torch.is_tensor(wanted) and torch.is_tensor(slope)
    assert close(found.value(*rows), wanted)
    assert close(gradient_of(found, rows), slope)

    turned = e3.ObjectiveConfig(loss=dict(reversed(weights.items())))
    assert torch.equal(find_loss(turned).value(*rows), found.value(*rows))
    assert parts_of(turned.loss) == sorted(weights)
    assert (found.closed is None) == (OWN in weights)
    if found.closed:
        values, gradient = found.closed(rows.logits, torch.softmax(rows.logits, -1), *rows[1:])
        assert close(values, wanted)
        assert close(gradient, slope)


@EVERY
def test_a_name_alone_with_weight_one_is_the_name(name: Name) -> None:
    for part in parts_of(name):
        alone = e3.ObjectiveConfig(loss={part: 1})
        assert alone == e3.ObjectiveConfig(loss=part)
        assert alone.loss == part


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ({}, "loss = {}: names nothing; write a name"),
        ({"kl": 0.0}, "loss: the weight of 'kl' is 0.0: must be a number from 1e-06 to 1e+06"),
        ({"kl": -1.0, "tv": 1.0}, "loss: the weight of 'kl' is -1.0: must be"),
        ({"kl": 9e-7}, "loss: the weight of 'kl' is 9e-07: must be a number from 1e-06 to 1e+06"),
        ({"kl": 1.1e6}, "loss: the weight of 'kl' is 1100000.0: must be a number from"),
        ({"kl": math.nan}, "loss: the weight of 'kl' is nan: must be"),
        ({"kl": math.inf}, "loss: the weight of 'kl' is inf: must be"),
        ({"kl": True}, "loss: the weight of 'kl' is True: must be"),
        ({"kl": "x"}, "loss: the weight of 'kl' is 'x': must be"),
        ({1: 0.5}, "loss = {1: 0.5}: must be a name, or a table of names"),
        (3, "loss = 3: must be a name, or a table of names"),
        ("{m:f = 1}", "loss = '{m:f = 1}': is no TOML table; write {name = 0.1"),
        ({"kl": 0.5, "kls": 0.5}, "loss = 'kls': must be one of 'kl', 'rkl'"),
        ({"kl": 0.5, "math:sqrt": 0.5}, "loss = 'math:sqrt': must be a function of (logits,"),
        ({"kl": 0.5, "lk_alpha": 0.5}, "loss = 'lk_alpha': must be one of 'kl', 'rkl'"),
    ],
)
def test_tables_of_no_loss_are_refused_in_one_line(loss: Any, message: str) -> None:
    with pytest.raises(e3.UserError) as caught:
        find_loss(e3.ObjectiveConfig(loss=loss))
    assert f"objective.{message}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_means_over_the_batch_are_refused_in_a_sum_and_with_settings_that_they_do_not_read() -> (
    None
):
    config = make_config(loss={"kl": 0.5, "lk_alpha": 0.5})
    with pytest.raises(
        e3.UserError, match=r"objective\.loss\.lk_alpha: .* take one of 'kl', 'rkl'"
    ):
        check_loss(config, RECIPE.batch_means)

    alpha = make_config(loss="lk_alpha", kl_scale=0.5)
    with pytest.raises(e3.UserError, match=r"kl_scale = 0\.5: .*'lk_alpha' does not read it"):
        check_loss(alpha, RECIPE.batch_means)
    check_loss(make_config(loss="lk_lambda", kl_scale=0.5), RECIPE.batch_means)


# One step's loss


@EVERY
@pytest.mark.parametrize("count", [None, torch.tensor(4.0)])
@given(rows=drawn_rows(), mask=st.lists(st.integers(0, 2), min_size=6, max_size=6))
def test_step_loss_is_the_sum_over_rows_with_a_mask(
    name: Name, count: Tensor | None, rows: Rows, mask: list[int]
) -> None:
    loss = loss_of(name)
    counts = torch.tensor(mask).view(2, 3, 1)
    found = step_loss(*rows, counts, count, loss)
    values = loss.value(*rows).flatten().tolist()
    total = sum(value for value, counted in zip(values, mask, strict=True) if counted)
    assert float(found) == pytest.approx(total / (6 if count is None else 4), abs=1e-12)


@EVERY
@pytest.mark.parametrize("where", Rows._fields)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_without_mask_cannot_poison_the_step(name: Name, where: str, bad: float) -> None:
    """Loss and gradient are those of other numbers there, and its own gradient is exactly zero."""
    rows = rows_of(2, 5)
    mask = torch.tensor([[1, 0, 1], [1, 1, 0]])[..., None]
    poisoned = rows._replace(**{where: torch.where(mask == 0, bad, getattr(rows, where))})

    def loss(logits: Tensor, rows: Rows) -> Tensor:
        return step_loss(logits, *rows[1:], mask, torch.tensor(4.0), loss_of(name))

    expected, expected_gradient = e3.value_and_grad(loss)(rows.logits, rows)
    found, gradient = e3.value_and_grad(loss)(poisoned.logits, poisoned)
    assert torch.equal(found, expected)
    assert torch.equal(gradient, expected_gradient)
    assert gradient[mask[..., 0] == 0].count_nonzero() == 0


# A user's own


def own(logits: Tensor, p_draft: Tensor, p_full: Tensor) -> Tensor:
    """Total variation, as a user may write it: `½ Σ |p - s|`."""
    assert logits.shape == p_draft.shape == p_full.shape
    assert logits.dtype in (torch.float32, torch.float64)
    return (p_draft - logits.softmax(-1)).abs().sum(-1) / 2


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
@pytest.mark.parametrize("numerics", ["plain", "fast"])
def test_a_users_function_is_taken_where_a_name_is(numerics: Any, dtype: str) -> None:
    """Given to `bind`, as a `RowLoss` too, or named as "module:function"."""
    config = make_config(dtype, numerics=numerics)
    frozen = make_frozen(config)
    named = replace(config.objective, loss=OWN)
    choices = [
        e3.bind(config, frozen, loss=own),
        e3.bind(config, frozen, loss=RowLoss(own)),
        e3.bind(replace(config, objective=named), frozen),
    ]
    kind = getattr(torch, dtype)
    batch = make_batch(3, (9, 6))
    batch = batch._replace(
        aux_hidden=batch.aux_hidden.to(kind), label_hidden=batch.label_hidden.to(kind)
    )
    results = []
    for fns in choices:
        params = fns.init(0)
        (loss, aux), gradients = e3.value_and_grad(fns.forward_loss, has_aux=True)(params, batch)
        _, metrics = fns.step(fns.init_state(params), batch)
        assert torch.equal(metrics["loss"], loss)
        results.append([loss, aux.losses, *gradients.values()])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))

    # The value is a total variation over the trained rows whose token is known.
    kl, _ = e3.forward_loss(choices[0].init(0), batch, config=config, frozen=frozen)
    assert not torch.equal(results[0][0], kl)
    assert 0 < float(results[0][1][0]) < 1


def test_what_is_no_loss_is_refused() -> None:
    config = make_config()
    frozen = make_frozen(config)
    for name in ("kls", "lk_alpha"):
        wrong = replace(config, objective=replace(config.objective, loss=name))
        with pytest.raises(e3.UserError, match=rf"objective\.loss = '{name}': must be one of 'kl'"):
            e3.bind(wrong, frozen)

    def mean(logits: Tensor, p_draft: Tensor, p_full: Tensor) -> Tensor:
        return own(logits, p_draft, p_full).mean()

    batch = make_batch(3, (9, 6))
    for numerics in ("plain", "fast"):
        config = make_config(numerics=numerics)
        params = e3.bind(config, frozen).init(0)
        with pytest.raises(e3.UserError, match=r"returned shape \(\).*one value a row"):
            e3.bind(config, frozen, loss=mean)
        with pytest.raises(e3.UserError, match=r"returned shape \(\).*one value a row"):
            e3.forward_loss(params, batch, config=config, frozen=frozen, loss=mean)


def naive(logits: Tensor, p_draft: Tensor, p_full: Tensor) -> Tensor:
    """Neither its value nor its gradient is finite where the teacher chooses other tokens alone."""
    return own(logits, p_draft, p_full) / p_full.sum(-1)


def test_pairs_that_do_not_count_cannot_poison_the_fast_numerics(monkeypatch) -> None:
    """A teacher so sure of tokens outside the draft vocabulary that `p_full` is zero."""
    monkeypatch.setattr(head_loss, "_CHUNK_BYTES", 8 * (3 * 64 + 130) * 5)
    results = []
    for numerics in ("plain", "fast"):
        config, frozen, params, batch = case_of(
            batch_of(3, (20, 11), 130), (130, 64), "float64", numerics, "float32", ttt_length=3
        )
        frozen = frozen._replace(target_head=frozen_of(130, 64).target_head.double() * 1000)
        fns = e3.bind(config, frozen, loss=naive)
        results.append(e3.value_and_grad(fns.forward_loss, has_aux=True)(params, batch))

    ((loss, aux), gradients), ((fast_loss, fast_aux), fast_gradients) = results
    assert (aux.rows > aux.accept_rows).all()
    assert fast_loss.isfinite()
    assert torch.allclose(fast_loss, loss, rtol=1e-12)
    assert torch.allclose(fast_aux.losses, aux.losses, rtol=1e-12)
    for name, gradient in gradients.items():
        assert error(fast_gradients[name], gradient) < 1e-11, name


# Training


@EVERY
def test_acceptance_rises_within_twelve_updates(name: Name) -> None:
    config = make_config(loss=name)
    config = replace(config, optimizer=e3.OptimizerConfig(learning_rate=0.03))
    fns = e3.bind(config, make_frozen(config))
    batch = make_batch(1, (12,))
    state = fns.init_state(fns.init(0))
    rates = []
    for _ in range(12):
        state, metrics = fns.step(state, batch)
        aux = metrics["aux"]
        rates.append(float(aux.accept.sum() / aux.accept_rows.sum()))
    assert rates[-1] > rates[0] + 0.05


@pytest.mark.parametrize(
    ("name", "value"),
    [("kl_scale", 1.1), ("kl_scale", -0.1), ("kl_decay", -1.0), ("kl_decay", float("inf"))],
)
def test_weights_out_of_range_are_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(e3.UserError, match=f"objective.{name} = "):
        replace(e3.ObjectiveConfig(), **{name: value})


@EVERY
@pytest.mark.parametrize("offset", [0.0, 1e4, 1e6, -1e6])
def test_common_part_of_the_logits_costs_no_accuracy(name: Name, offset: float) -> None:
    """The logits are exact in fp32: only a difference of two large numbers would lose digits."""
    source = torch.Generator().manual_seed(0)
    logits = torch.randint(-64, 64, (50, 600), generator=source) / 16
    p = torch.softmax(torch.randn(50, 900, generator=source), -1)[:, :600]
    teacher = p / p.sum(-1, keepdim=True), p
    loss = loss_of(name)
    want = loss.value(logits.double(), *(x.double() for x in teacher))

    shifted = logits + offset
    assert torch.allclose(loss.value(shifted, *teacher).double(), want, rtol=2e-6)
    if loss.closed:
        found, _ = loss.closed(shifted, torch.softmax(shifted, -1), *teacher)
        assert torch.allclose(found.double(), want, rtol=2e-6)

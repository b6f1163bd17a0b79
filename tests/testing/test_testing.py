"""The public test helpers: drawn cases, what `assert_equivalent` finds, and what snippets repeat.

One property of each: cases are valid and spread over the options, failures shrink, a failure is
named and repeated by its snippet, and `ulps` lets rounding pass but nothing else.
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import fields, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st
from torch import Tensor

import eagle3fn as e3
from eagle3fn.base.types import Batch
from eagle3fn.model.named_loss import find_loss
from eagle3fn.testing import Case, Side, assert_case, assert_equivalent
from eagle3fn.testing.builders import tiny_batch, tiny_frozen, tiny_params, tiny_unaligned
from eagle3fn.testing.results import (
    differences,
    nontrivial,
    run_forward,
    ulps,
    ulps_at_largest,
)
from eagle3fn.testing.strategies import LOSS_SUMS, VALUES, cases, drawn, nth, simplest
from tests.tally import Tally

MANY = settings(max_examples=200, derandomize=True, database=None, phases=tuple(Phase))


@pytest.fixture(scope="module")
def many() -> list[Case]:
    return drawn(400, 0)


# Seeded lists


def test_the_same_seed_draws_the_same_cases(many):
    assert drawn(20, 5) == drawn(40, 5)[:20] != drawn(20, 6)
    assert len(many) == 400
    assert nth(7, 5) == drawn(40, 5)[7]


def test_every_kind_is_drawn(many):
    check_spread(many)


def check_spread(many: list[Case]) -> None:
    """Every value of an enumerated field, and the shapes that break hidden assumptions."""
    # Grouped, single-key and full multi-head attention.
    assert {case.heads[1] for case in many} == {1, 2}
    assert {case.heads[0] // case.heads[1] for case in many} == {1, 2, 3}
    assert {case.heads[0] * case.head_dim == case.hidden for case in many} == {True, False}

    # Batches of every size; the longest sample is anywhere, and longer or shorter than the unroll.
    longest = [max(case.lengths) for case in many]
    assert {4, 10} <= set(longest) <= set(range(33))
    assert min(longest) <= 3
    assert max(longest) > 25
    assert {len(case.lengths) for case in many} == {1, 2, 3, 4}
    assert all(len(case.lengths) * max(case.lengths) <= 64 for case in many)
    assert {case.lengths.index(max(case.lengths)) for case in many} == {0, 1, 2, 3}
    assert {len(set(case.lengths)) > 1 for case in many} == {True, False}
    assert {case.steps > max(case.lengths) for case in many} == {True, False}

    # Chunks of the teacher that are larger than the vocabulary, divide it, or don't.
    assert {case.chunk > case.vocab for case in many} == {True, False}
    assert {case.vocab % case.chunk > 0 for case in many} == {True, False}

    # Vocabularies and widths that are the same, or not.
    assert {case.draft_vocab == case.vocab for case in many} == {True, False}
    assert {case.target_hidden == case.hidden for case in many} == {True, False}

    for field in fields(Case):
        values = {getattr(case, field.name) for case in many}
        choices = set(VALUES[field.name])
        if len(choices) <= 8 and field.name != "lengths":
            assert values == choices, field.name


def test_weights_are_kept(many):
    """Most cases have four to ten tokens at most and a mask that leaves something to compare."""
    share = {
        "4 to 10 tokens": sum(4 <= max(case.lengths) <= 10 for case in many) / len(many),
        "whole vocabulary": sum(case.draft_vocab == case.vocab for case in many) / len(many),
        "same width": sum(case.target_hidden == case.hidden for case in many) / len(many),
    }
    assert share == pytest.approx(
        {"4 to 10 tokens": 0.75, "whole vocabulary": 0.5, "same width": 2 / 3}, abs=0.1
    )
    masks = Counter(case.mask for case in many)
    assert masks["drawn"] > masks["full"] > masks["one"] + masks["empty"]
    tokens = Counter(case.tokens for case in many)
    assert tokens["mixed"] > tokens["inside"] > tokens["outside"]


def test_a_new_value_leaves_the_other_fields_as_they_were(monkeypatch):
    before = drawn(50, 3)
    monkeypatch.setitem(VALUES, "loss", (*VALUES["loss"], "new loss"))
    after = drawn(50, 3)
    assert "new loss" in {case.loss for case in after}
    same = {"loss": "kl", "kl_scale": 1.0, "kl_decay": 3.0}  # which depend on the loss
    assert [replace(case, **same) for case in after] == [replace(case, **same) for case in before]


def test_settings_of_a_loss_are_drawn_where_it_reads_them() -> None:
    """Elsewhere they would be refused; sums of losses are drawn too."""
    scaled = set()
    for case in drawn(400, 3):
        find_loss(case.config().objective)
        if case.kl_scale != Case.kl_scale:
            scaled.add(case.loss)
    assert scaled == {"lk", LOSS_SUMS[1]}


@pytest.mark.parametrize("name", sorted(VALUES.keys() - {"hidden", "vocab", "draft_vocab", "loss"}))
def test_a_pin_leaves_the_other_fields_as_they_were(name: str) -> None:
    """So a new field does too. Other fields depend on those left out."""
    pin = {name: getattr(Case(), name)}
    assert drawn(20, 3, **pin) == [replace(case, **pin) for case in drawn(20, 3)]


def test_four_of_five_are_nontrivial(many, tally: Tally):
    for case in many[:150]:
        tally.add(case, nontrivial(run_forward(e3.forward_loss, case)))
    tally.check()


def test_a_strategy_is_no_pin_of_a_list():
    with pytest.raises(ValueError, match=r"steps = .*: must be a value; `cases` takes"):
        drawn(1, 0, steps=st.integers(1, 3))


# The Hypothesis strategy


def test_the_strategy_is_spread_over_the_options():
    """200 examples are nearly as many different cases; few repeat most of the one before."""
    seen: list[Case] = []

    @MANY
    @given(cases())
    def collect(case: Case) -> None:
        seen.append(case)

    collect()
    assert len(set(seen)) >= 195
    check_spread(seen)
    steps = Counter(case.steps for case in seen)
    assert max(steps.values()) <= 50
    assert min(steps.values()) >= 12

    varied = [name for name, values in VALUES.items() if len(set(values)) > 1]
    similar = 0
    for one, two in pairwise(seen):
        same = sum(getattr(one, name) == getattr(two, name) for name in varied)
        similar += same >= len(varied) - 5
    assert similar <= 20


def test_the_strategys_cases_are_nontrivial(tally: Tally):
    @settings(max_examples=100)
    @given(cases(loss="nla"))
    def look(case: Case) -> None:
        assert case.loss == "nla"
        tally.add(case, nontrivial(run_forward(e3.forward_loss, case)))

    look()
    tally.check()


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        (lambda case: True, Case(lengths=(1,), steps=1)),
        (lambda case: len(case.lengths) == 3, Case(lengths=(1, 1, 1), steps=1)),
        (lambda case: case.steps >= 2, Case(lengths=(1,), steps=2)),
        (
            lambda case: len(case.lengths) >= 3 and case.steps >= 2,
            Case(lengths=(1, 1, 1), steps=2),
        ),
        (lambda case: max(case.lengths) >= 12, Case(lengths=(12,), steps=1)),
        (lambda case: case.mask == "padding", Case(lengths=(1,), steps=1, mask="padding")),
        (
            lambda case: case.target_hidden != case.hidden,
            Case(lengths=(1,), steps=1, target_hidden=20),
        ),
        (
            lambda case: case.draft_vocab == case.vocab,
            Case(lengths=(1,), steps=1, draft_vocab=40),
        ),
        (
            lambda case: case.draft_vocab >= 45,
            Case(lengths=(1,), steps=1, vocab=45, draft_vocab=45),
        ),
    ],
)
def test_hypothesis_shrinks_to_the_simplest_case(
    condition: Callable[[Case], bool], expected: Case
) -> None:
    assert find(cases(), condition, settings=settings(MANY, max_examples=1000)) == expected


@given(cases(vocab=st.integers(1, 60), steps=st.sampled_from([9, 11]), dtype="float64"))
def test_pins_are_values_or_strategies(case: Case):
    assert case.steps in (9, 11)
    assert case.dtype == "float64"
    assert 1 <= case.draft_vocab <= case.vocab <= 60
    case.draft()  # refuses sizes that don't fit together


@pytest.mark.parametrize(
    "pins", [{"draft_vocab": 45}, {"draft_vocab": 70}, {"hidden": 32}, {"vocab": 1}]
)
def test_fields_follow_the_pins_that_they_depend_on(pins: dict[str, int]) -> None:
    strategy = cases(**pins)
    for check in (lambda case: True, lambda case: case.steps > 3):
        case = find(strategy, check, settings=MANY)
        assert all(getattr(case, name) == value for name, value in pins.items())
        case.draft()
    for case in drawn(50, 0, **pins):
        assert all(getattr(case, name) == value for name, value in pins.items())
        assert case.target_hidden in (case.hidden, 20)
        case.draft()


@pytest.mark.parametrize("function", [cases, lambda **pins: nth(0, 0, **pins)])
def test_an_unknown_pin_is_refused(function: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="step: not a field of Case; it has heads, "):
        function(step=3)


# Cases and their tensors


def test_a_case_prints_what_is_not_default(many):
    assert repr(Case()) == "Case()"
    assert repr(Case(lengths=(1, 1, 1), steps=2)) == "Case(lengths=(1, 1, 1), steps=2)"
    assert repr(Case(dtype="bfloat16", tied=True)) == "Case(dtype='bfloat16', tied=True)"
    assert all(eval(repr(case)) == case for case in many)


def test_hypothesis_prints_a_failing_case_by_its_non_default_fields():
    @MANY
    @given(cases())
    def fails(case: Case) -> None:
        assert len(case.lengths) < 3 or case.steps < 2

    with pytest.raises(AssertionError) as failure:
        fails()
    notes = "\n".join(failure.value.__notes__)
    assert "case=Case(lengths=(1, 1, 1), steps=2)," in notes


def test_every_field_has_values_and_its_default_among_them():
    """`lengths` apart, whose values are the longest sample's."""
    assert list(VALUES) == [field.name for field in fields(Case)]
    assert all(
        field.default in VALUES[field.name] for field in fields(Case) if field.name != "lengths"
    )


@given(cases())
def test_batches_are_what_the_case_says(case: Case):
    batch = tiny_unaligned(case)
    frozen = tiny_frozen(case)
    params = tiny_params(case)

    assert batch.input_ids.shape == (len(case.lengths), max(case.lengths))
    assert batch.attention_mask.sum(1).tolist() == list(case.lengths)

    trained = int(batch.row_mask.sum())
    real = int(batch.attention_mask.sum())
    padded = int((batch.row_mask * (1 - batch.attention_mask)).sum())
    expected = {"empty": 0, "one": 1, "full": real}
    assert trained == expected.get(case.mask, trained)
    assert padded == 0 or case.mask == "padding"

    assert torch.equal(frozen.t2d.nonzero()[:, 0], frozen.d2t + torch.arange(case.draft_vocab))
    if case.target_hidden == case.hidden:
        assert (frozen.target_head is frozen.embed_tokens) == case.tied
    else:
        assert frozen.embed_tokens is None

    if batch.position_ids is not None:
        places = torch.arange(max(case.lengths)).expand_as(batch.input_ids)
        assert torch.equal(batch.position_ids.sort(1).values, places)

    tensors = (*params.values(), batch.aux_hidden, frozen.target_head)
    assert all(value.dtype == case.torch_dtype for value in tensors)
    assert all(float(value.abs().max()) < 8 for value in params.values())


def test_the_targets_choices_are_where_the_case_says(many):
    inside: Counter[str] = Counter()
    real: Counter[str] = Counter()
    for case in many:
        if case.draft_vocab == case.vocab:
            continue
        batch = tiny_unaligned(case)
        frozen = tiny_frozen(case)
        logits = batch.last_hidden.double() @ frozen.target_head.double().T
        choice = logits.argmax(-1)[batch.attention_mask > 0]
        inside[case.tokens] += int(frozen.t2d[choice].sum())
        real[case.tokens] += len(choice)
    share = {kind: inside[kind] / real[kind] for kind in real}
    assert share["outside"] < 0.5 < share["mixed"] < 0.8 < share["inside"]


def test_another_index_is_another_batch():
    case = Case()
    one = tiny_batch(case)
    two = tiny_batch(case, 1)
    assert not torch.equal(one.aux_hidden, two.aux_hidden)
    assert torch.equal(tiny_batch(replace(case)).aux_hidden, one.aux_hidden)


# Simpler cases without Hypothesis


def test_simplest_keeps_what_a_failure_needs():
    case = drawn(1, 0)[0]
    plain = Case(lengths=(1,), steps=1)
    assert case.seed > 100  # beyond the values that are tried
    assert simplest(case, lambda simpler: simpler.seed == case.seed) == replace(
        plain, seed=case.seed
    )
    assert simplest(case, lambda simpler: False) == case

    wide = replace(case, vocab=50, draft_vocab=45)
    expected = replace(plain, vocab=45, draft_vocab=45)
    assert simplest(wide, lambda simpler: simpler.draft_vocab == 45) == expected

    long = replace(case, lengths=(3, 15, 9, 2), steps=7)
    found = simplest(long, lambda simpler: sum(simpler.lengths) >= 11 and simpler.steps > 4)
    assert found == Case(lengths=(9, 2), steps=5)  # no single change keeps the sum


def test_simplest_leaves_pinned_fields():
    case = Case(lengths=(8, 8, 6), dtype="bfloat16", loss="nla")
    found = simplest(case, lambda simpler: len(simpler.lengths) == 3, pinned=("dtype", "steps"))
    assert found == Case(lengths=(1, 1, 1), dtype="bfloat16")


# assert_equivalent


def reordered(params, batch: Batch, *, config, frozen):
    """The objective with its last step's weight rounded otherwise."""
    loss, aux = e3.forward_loss(params, batch, config=config, frozen=frozen)
    return (loss * 3) / 3, aux


def blind(params, batch: Batch, *, config, frozen):
    """An objective that forgets the last position."""
    mask = batch.row_mask.clone()
    mask[:, 0, -2:-1] = 0
    return e3.forward_loss(params, batch._replace(row_mask=mask), config=config, frozen=frozen)


def without_fc(params, batch: Batch, *, config, frozen):
    """An objective with a leaf that gets no gradient."""
    fixed = params | {"fc.weight": params["fc.weight"].detach()}
    return e3.forward_loss(fixed, batch, config=config, frozen=frozen)


def test_the_objective_is_equivalent_to_itself():
    assert_equivalent(e3.forward_loss, cases=15)
    assert_equivalent(e3.forward_loss, against=e3.forward_loss, cases=5, seed=3, dtype="bfloat16")


def count_calls(counter: Counter):
    def counted(params, batch, *, config, frozen):
        counter[config.objective.loss, str(params["fc.weight"].dtype)] += 1
        return e3.forward_loss(params, batch, config=config, frozen=frozen)

    return counted


def test_number_of_cases_and_pinned_fields_are_used():
    seen = Counter()
    assert_equivalent(count_calls(seen), cases=12, loss="nla", dtype="float32")
    assert dict(seen) == {("nla", "torch.float32"): 12}


@pytest.mark.parametrize(
    ("function", "name"), [(reordered, "loss:"), (blind, "losses:"), (without_fc, "fc.weight:")]
)
def test_a_difference_is_named_and_its_snippet_repeats_it(function, name):
    with pytest.raises(AssertionError) as failure:
        assert_equivalent(function, cases=40)
    names, code = str(failure.value).split("to repeat it:\n")
    assert name in names
    with pytest.raises(AssertionError, match=name):
        exec(compile(code, "snippet", "exec"), {})


def test_the_reported_case_is_simple_and_keeps_the_pins():
    def three_samples(params, batch, *, config, frozen):
        loss, aux = e3.forward_loss(params, batch, config=config, frozen=frozen)
        return loss + (len(batch.aux_hidden) == 3), aux

    with pytest.raises(AssertionError) as failure:
        assert_equivalent(three_samples, cases=40, dtype="bfloat16")
    assert "Case(lengths=(1, 1, 1), steps=1, dtype='bfloat16')" in str(failure.value)


def forward_loss(params, batch: Batch, *, config, frozen):
    """A wrong one, named as the one that it is compared against."""
    return reordered(params, batch, config=config, frozen=frozen)


def test_functions_of_one_name_stay_apart_in_the_snippet():
    with pytest.raises(AssertionError) as failure:
        assert_equivalent(forward_loss, against=e3.forward_loss, cases=40)
    with pytest.raises(AssertionError, match="loss:"):
        exec(compile(str(failure.value).split("to repeat it:\n")[1], "snippet", "exec"), {})


class Model:
    def forward_loss(self, params, batch: Batch, *, config, frozen):
        return reordered(params, batch, config=config, frozen=frozen)


def test_a_methods_snippet_runs_where_the_method_is_in_scope():
    method = Model().forward_loss
    with pytest.raises(AssertionError) as failure:
        assert_equivalent(method, cases=40)
    code = str(failure.value).split("to repeat it:\n")[1]
    with pytest.raises(AssertionError, match="loss:"):
        exec(compile(code, "snippet", "exec"), {"forward_loss": method})


def fragile(params, batch: Batch, *, config, frozen):
    """Wrong in bf16; with KL it cannot be run."""
    if config.objective.loss == "kl":
        raise RuntimeError("no KL here")
    loss, aux = e3.forward_loss(params, batch, config=config, frozen=frozen)
    return loss + (config.train.dtype == "bfloat16"), aux


def test_an_exception_has_a_note_that_repeats_it():
    with pytest.raises(RuntimeError, match="no KL here") as failure:
        assert_equivalent(fragile, cases=3, loss="kl")
    with pytest.raises(RuntimeError, match="no KL here"):
        exec(compile(failure.value.__notes__[0].split("to repeat it:\n")[1], "snippet", "exec"), {})


def test_a_case_that_cannot_be_run_is_not_a_simpler_failure():
    with pytest.raises(AssertionError, match="loss: ") as failure:
        assert_case(fragile, Case(loss="lk", dtype="bfloat16"))
    expected = Case(lengths=(1,), steps=1, dtype="bfloat16", loss="rkl")
    assert repr(expected) in str(failure.value)


@pytest.mark.parametrize("count", [0, -1])
def test_no_case_is_no_pass(count: int):
    with pytest.raises(ValueError, match="must be at least 1"):
        assert_equivalent(reordered, cases=count)


def test_metrics_are_compared():
    def miscounted(params, batch, *, config, frozen):
        loss, aux = e3.forward_loss(params, batch, config=config, frozen=frozen)
        return loss, aux._replace(correct=aux.correct + 1, accept=aux.accept + 1)

    with pytest.raises(AssertionError, match=r"acceptance: .*\n.*correct: 1 ulps") as failure:
        assert_case(miscounted, Case())
    assert "fc.weight" not in str(failure.value)


def test_an_unknown_other_side_is_refused():
    with pytest.raises(ValueError, match="'plain', a function or a Side"):
        assert_case(e3.forward_loss, Case(), against="lagacy")


def one_layout(case: Case) -> Case:
    return replace(case, own_positions=False)


def biased(case: Case) -> dict[str, Tensor]:
    """A side that can run one layout alone, and is wrong."""
    assert not case.own_positions
    return run_forward(reordered, case)


def test_a_side_runs_the_cases_that_it_can_and_names_itself():
    line = "from tests.testing.test_testing import SIDE"
    with pytest.raises(AssertionError, match="loss:") as failure:
        assert_equivalent(e3.forward_loss, against=SIDE, cases=40)
    code = str(failure.value).split("to repeat it:\n")[1]
    assert code.startswith(line) and code.endswith("against=SIDE)")
    with pytest.raises(AssertionError, match="loss:"):
        exec(compile(code, "snippet", "exec"), {})


SIDE = Side("SIDE", biased, one_layout, ("from tests.testing.test_testing import SIDE",))


# Equal to rounding


def rounded(params, batch: Batch, *, config, frozen):
    """The objective with the loss, and with it every gradient, scaled by about three roundings."""
    loss, aux = e3.forward_loss(params, batch, config=config, frozen=frozen)
    eps = torch.finfo(loss.dtype).eps
    return loss * (1 + 3 * eps), aux


def test_rounding_passes_within_ulps_alone():
    assert_equivalent(rounded, cases=15, ulps=64, dtype="float32")
    with pytest.raises(AssertionError, match=r"loss: \d+ ulps\n"):
        assert_equivalent(rounded, cases=15, dtype="float32")
    with pytest.raises(AssertionError, match="ulps at its largest magnitude, 1 allowed") as failure:
        assert_equivalent(rounded, cases=15, ulps=1, dtype="float32")
    code = str(failure.value).split("to repeat it:\n")[1]
    assert code.endswith("against='plain', ulps=1)")
    with pytest.raises(AssertionError, match="1 allowed"):
        exec(compile(code, "snippet", "exec"), {})


@pytest.mark.parametrize("function", [blind, without_fc])
def test_ulps_hide_no_fault(function):
    with pytest.raises(AssertionError, match="not equal"):
        assert_equivalent(function, cases=40, ulps=64, dtype="float32")


def test_negative_ulps_are_refused():
    with pytest.raises(ValueError, match="ulps = -1: must be a whole number"):
        assert_equivalent(e3.forward_loss, cases=1, ulps=-1)


def test_ulps_are_counted_at_the_leafs_largest_magnitude():
    """An element that is small by cancellation has the error of what was cancelled."""
    left = {"x": torch.tensor([1.5, 1e-6])}
    eps = torch.finfo(torch.float32).eps
    right = {"x": torch.tensor([1.5, 1e-6 + 3.9 * eps])}
    assert ulps(left["x"], right["x"]) > 1e6
    assert 3.8 < ulps_at_largest(left["x"], right["x"]) < 4
    assert differences(left, right, 4) == []
    assert differences(left, right, 3) == ["x"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_one_ulp_at_the_largest_is_the_next_value(dtype):
    for value in (1.0, 1.75, 3e-5, -2.5):
        x = torch.tensor([value, 0.0], dtype=dtype)
        outwards = torch.tensor(math.copysign(math.inf, value), dtype=dtype)
        assert ulps_at_largest(x, x) == 0
        assert ulps_at_largest(x, torch.nextafter(x, outwards)) == 1
    assert ulps_at_largest(torch.zeros(1, dtype=dtype), -torch.zeros(1, dtype=dtype)) == 0
    assert ulps_at_largest(torch.zeros(0, dtype=dtype), torch.zeros(0, dtype=dtype)) == 0
    tiny = one_off(torch.zeros(1, dtype=dtype))
    assert ulps_at_largest(tiny, -tiny) == 2


def test_shapes_dtypes_integers_and_infinities_are_exact_whatever_the_ulps():
    inf = torch.tensor([1.0, math.inf])
    nan = torch.tensor([1.0, math.nan])
    left = {"same": inf, "inf": inf, "sign": inf, "nan": nan, "int": torch.tensor([1])}
    right = {"same": inf, "inf": inf[:1].repeat(2), "sign": -inf, "nan": nan}
    right["int"] = torch.tensor([2])
    left |= {"shape": torch.ones(2), "dtype": torch.ones(2), "alone": torch.ones(2)}
    right |= {"shape": torch.ones(3), "dtype": torch.ones(2).double()}
    wrong = ["inf", "sign", "nan", "int", "shape", "dtype", "alone"]
    assert differences(left, right, 2**30) == wrong
    assert differences(left, right) == wrong


def one_off(x: Tensor) -> Tensor:
    return torch.nextafter(x, torch.tensor(torch.inf, dtype=x.dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_ulps_count_representable_values(dtype):
    x = torch.tensor([1.0, -2.0, 0.0, 3e-5], dtype=dtype)
    assert ulps(x, x) == 0
    assert ulps(x, one_off(x)) == 1
    assert ulps(x, one_off(one_off(x))) == 2
    tiny = one_off(torch.zeros(1, dtype=dtype))
    assert ulps(tiny, -tiny) == 2
    assert ulps(torch.zeros(1, dtype=dtype), -torch.zeros(1, dtype=dtype)) == 0
    assert ulps(x, torch.full_like(x, torch.nan)) == -1
    assert ulps(x, x[:2]) == -1


def test_differences_see_dtype_shape_and_absence():
    ones = torch.ones(2)
    left = {"a": ones, "b": ones, "c": ones, "d": ones}
    right = {"a": ones, "b": ones.double(), "c": torch.ones(3), "e": ones}
    assert differences(left, right) == ["b", "c", "d", "e"]

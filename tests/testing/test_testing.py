"""The public testing room: what is drawn, what `assert_equivalent` finds, and that its snippet repeats a failure."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

import eagle3fn as e3
from eagle3fn.base.types import Batch
from eagle3fn.specforge.oracle import Oracle
from eagle3fn.testing import Case, assert_case, assert_equivalent
from eagle3fn.testing.builders import tiny_batch, tiny_frozen, tiny_params
from eagle3fn.testing.results import differences, nontrivial, run_forward, ulps
from eagle3fn.testing.strategies import cases, drawn, for_oracle, nth, oracle_cases, simplest
from tests.tally import Tally


@pytest.fixture(scope="module")
def many() -> list[Case]:
    return drawn(400, 0)


def test_the_same_seed_draws_the_same_cases(many):
    assert drawn(20, 5) == drawn(40, 5)[:20] != drawn(20, 6)
    assert len(many) == 400 and nth(7, 5) == drawn(40, 5)[7]


def test_every_kind_is_drawn(many):
    """Every value of an enumerated field, and the shapes that break hidden assumptions."""
    n, j = zip(*(case.heads for case in many), strict=True)
    assert set(j) == {1, 2} and {a // b for a, b in zip(n, j, strict=True)} == {
        1,
        2,
        3,
    }  # GQA, MQA and neither
    longest = [max(case.lengths) for case in many]
    assert {1, 2, 3, 4, 10, 32} <= set(longest) and set(longest) <= set(range(33))
    assert all(len(case.lengths) * max(case.lengths) <= 64 for case in many)
    assert {case.steps > max(case.lengths) for case in many} == {True, False}
    assert (
        {case.chunk > case.vocab for case in many}
        == {case.vocab % case.chunk > 0 for case in many}
        == {True, False}
    )
    assert {case.lengths.index(max(case.lengths)) for case in many} == {0, 1, 2, 3}
    seen = {name: {getattr(case, name) for case in many} for name in Case.__dataclass_fields__}
    assert seen["dtype"] == {"float32", "bfloat16"}
    assert seen["teacher"] == {"full", "compact"} and seen["normalization"] == {"rows", "mask"}
    assert seen["loss"] == {"kl", "lk_alpha", "lk_lambda"}
    assert seen["mask"] == {"drawn", "padding", "full", "one", "empty"}
    assert seen["tokens"] == {"mixed", "inside", "outside"}
    assert seen["steps"] == set(range(1, 9))
    assert {len(lengths) for lengths in seen["lengths"]} == {1, 2, 3, 4}
    assert all(len(seen[name]) == 2 for name in ("tied", "own_positions"))
    assert all(
        len(seen[name]) >= 3
        for name in ("eps", "theta", "kl_scale", "kl_decay", "heads", "head_dim")
    )
    assert {case.draft_vocab == case.vocab for case in many} == {True, False}
    assert {case.heads[0] * case.head_dim == case.hidden for case in many} == {True, False}
    assert {case.target_hidden == case.hidden for case in many} == {True, False}
    assert {len(set(case.lengths)) > 1 for case in many} == {True, False}


def test_four_of_five_are_nontrivial(many, tally: Tally):
    for case in many[:150]:
        tally.add(case, nontrivial(run_forward(e3.forward_loss, case)))
    tally.check()


@given(cases())
def test_batches_are_what_the_case_says(case: Case):
    batch, frozen, params = tiny_batch(case), tiny_frozen(case), tiny_params(case)
    assert batch.input_ids.shape == (len(case.lengths), max(case.lengths))
    assert batch.attention_mask.sum(1).tolist() == list(case.lengths)
    trained, real = int(batch.row_mask.sum()), int(batch.attention_mask.sum())
    outside = int((batch.row_mask * (1 - batch.attention_mask)).sum())
    assert {"empty": trained == 0, "one": trained == 1, "full": trained == real}.get(
        case.mask, True
    )
    assert outside == 0 or case.mask == "padding"
    assert torch.equal(frozen.t2d.nonzero()[:, 0], frozen.d2t + torch.arange(case.draft_vocab))
    if case.target_hidden == case.hidden:
        assert (frozen.target_head is frozen.embed_tokens) == case.tied
    if batch.position_ids is not None:
        assert torch.equal(
            batch.position_ids.sort(1).values,
            torch.arange(max(case.lengths)).expand_as(batch.input_ids),
        )
    assert all(
        value.dtype == case.torch_dtype
        for value in (*params.values(), batch.aux_hidden, frozen.target_head)
    )
    assert all(float(value.abs().max()) < 8 for value in params.values())


def test_the_targets_choices_lie_where_the_case_says(many):
    inside, real = Counter(), Counter()
    for case in (case for case in many if case.draft_vocab < case.vocab):
        batch, frozen = tiny_batch(case), tiny_frozen(case)
        choice = (batch.last_hidden.double() @ frozen.target_head.double().T).argmax(-1)[
            batch.attention_mask > 0
        ]
        inside[case.tokens] += int(frozen.t2d[choice].sum())
        real[case.tokens] += len(choice)
    share = {kind: inside[kind] / real[kind] for kind in real}
    assert share["outside"] < 0.5 < share["mixed"] < 0.8 < share["inside"]


@given(oracle_cases())
def test_oracle_cases_are_what_the_old_tool_knows(case: Case):
    assert (
        case.target_hidden == case.hidden
        and case.normalization == "rows"
        and for_oracle(case) == case
    )


def test_the_strategy_draws_like_the_list(tally: Tally):
    """Hypothesis draws evenly, four of five non-trivial too, and pins what is asked for."""

    @settings(max_examples=100)
    @given(cases(loss="lk_alpha"))
    def look(case: Case) -> None:
        tally.add(case, nontrivial(run_forward(e3.forward_loss, case)))

    look()
    tally.check()
    steps = Counter(case.steps for case in tally.cases)
    assert {case.loss for case in tally.cases} == {"lk_alpha"} and set(steps) == set(range(1, 9))
    assert max(steps.values()) <= 30


def test_a_failing_case_is_made_plain():
    case = drawn(1, 0)[0]
    assert simplest(case, lambda simpler: simpler.seed == case.seed) == replace(
        Case(), seed=case.seed
    )
    assert simplest(case, lambda simpler: False) == case
    wide = replace(case, vocab=50, draft_vocab=45)
    assert simplest(wide, lambda simpler: simpler.draft_vocab == 45) == replace(
        Case(), vocab=50, draft_vocab=45
    )


def test_a_cases_text_rebuilds_it(many):
    assert all(eval(repr(case)) == case for case in many)


def reordered(params, batch: Batch, *, config, frozen):
    """The objective with its last step's weight rounded otherwise."""
    loss, aux = e3.forward_loss(params, batch, config=config, frozen=frozen)
    return (loss * 3) / 3, aux


def blind(params, batch: Batch, *, config, frozen):
    """An objective that forgets the last position."""
    mask = batch.row_mask.clone()
    mask[:, -2] = 0
    return e3.forward_loss(params, batch._replace(row_mask=mask), config=config, frozen=frozen)


def without_fc(params, batch: Batch, *, config, frozen):
    """An objective with a leaf that gets no gradient."""
    fixed = params | {"fc.weight": params["fc.weight"].detach()}
    return e3.forward_loss(fixed, batch, config=config, frozen=frozen)


def test_the_objective_is_equivalent_to_itself():
    assert_equivalent(e3.forward_loss, cases=15)
    assert_equivalent(e3.forward_loss, against=e3.forward_loss, cases=5, seed=3, dtype="bfloat16")


def test_our_objective_is_equivalent_to_the_old_tool(oracle: Oracle):
    assert_equivalent(e3.forward_loss, against="oracle", cases=30, seed=1)


def count_calls(counter: Counter):
    def counted(params, batch, *, config, frozen):
        counter[config.objective.loss, str(params["fc.weight"].dtype)] += 1
        return e3.forward_loss(params, batch, config=config, frozen=frozen)

    return counted


def test_number_of_cases_and_pinned_fields_are_used():
    seen = Counter()
    assert_equivalent(count_calls(seen), cases=12, loss="lk_alpha", dtype="float32")
    assert dict(seen) == {("lk_alpha", "torch.float32"): 12}


@pytest.mark.parametrize(
    ("function", "name"), [(reordered, "loss:"), (blind, "losses:"), (without_fc, "fc.weight:")]
)
def test_a_difference_is_named_and_its_snippet_repeats_it(function, name):
    with pytest.raises(AssertionError) as failure:
        assert_equivalent(function, cases=40)
    text = str(failure.value)
    told, code = text.split("to repeat it:\n")
    assert name in told
    with pytest.raises(AssertionError, match=name):
        exec(compile(code, "snippet", "exec"), {})


def forward_loss(params, batch: Batch, *, config, frozen):
    """A wrong one, named as the one it is held against."""
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
    return (reordered if config.train.dtype == "bfloat16" else e3.forward_loss)(
        params, batch, config=config, frozen=frozen
    )


def test_what_is_raised_says_how_to_repeat_it():
    with pytest.raises(RuntimeError, match="no KL here") as failure:
        assert_equivalent(fragile, cases=3, loss="kl")
    with pytest.raises(RuntimeError, match="no KL here"):
        exec(compile(failure.value.__notes__[0].split("to repeat it:\n")[1], "snippet", "exec"), {})


def test_a_case_that_cannot_be_run_is_no_plainer_one():
    with pytest.raises(AssertionError, match="loss: 1 ulps") as failure:
        assert_equivalent(fragile, cases=40, loss="lk_alpha")
    assert "loss='lk_alpha'" in str(failure.value)


@pytest.mark.parametrize("count", [0, -1])
def test_no_case_is_no_pass(count: int):
    with pytest.raises(ValueError, match="must be at least 1"):
        assert_equivalent(reordered, cases=count)


def test_metrics_are_compared():
    def miscounted(params, batch, *, config, frozen):
        loss, aux = e3.forward_loss(params, batch, config=config, frozen=frozen)
        return loss, aux._replace(correct=aux.correct + 1, accept=aux.accept * 2)

    with pytest.raises(AssertionError, match=r"acceptance: .*\n.*correct: 1 ulps") as failure:
        assert_case(miscounted, Case())
    assert "fc.weight" not in str(failure.value)


def test_what_it_is_held_against_is_checked():
    with pytest.raises(ValueError, match="'plain', 'oracle' or a function"):
        assert_case(e3.forward_loss, Case(), against="lagacy")


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
    assert ulps(x, torch.full_like(x, torch.nan)) == ulps(x, x[:2]) == -1


def test_differences_see_dtype_shape_and_absence():
    left = {"a": torch.ones(2), "b": torch.ones(2), "c": torch.ones(2), "d": torch.ones(2)}
    right = {
        "a": torch.ones(2),
        "b": torch.ones(2).double(),
        "c": torch.ones(3),
        "e": torch.ones(2),
    }
    assert differences(left, right) == ["b", "c", "d", "e"]


def test_another_index_is_another_batch():
    case = Case()
    one, two = tiny_batch(case), tiny_batch(case, 1)
    assert not torch.equal(one.aux_hidden, two.aux_hidden)
    assert torch.equal(tiny_batch(replace(case)).aux_hidden, one.aux_hidden)

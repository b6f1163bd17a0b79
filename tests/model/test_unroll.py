"""One unroll under two records of operations: the same hidden states, on any list of rows."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import eagle3fn as e3
from eagle3fn.base.types import Params
from eagle3fn.model.fast import FAST
from eagle3fn.model.plain import PLAIN
from eagle3fn.model.unroll import Ops, Rows, unroll
from eagle3fn.testing.builders import Case, normal, tiny_batch, tiny_frozen, tiny_params
from eagle3fn.testing.strategies import cases
from tests.model.blocks import error

ROUNDING = 1e-12
AUX = "aux_hidden"


def choose_rows(data: st.DataObject, case: Case, drop: bool) -> Rows:
    """Some real rows in any order; with `drop` the last of them end before a later step."""
    real = tiny_batch(case).attention_mask.flatten().nonzero()[:, 0].tolist()
    chosen = data.draw(st.lists(st.sampled_from(real), min_size=1, unique=True))
    sizes = [len(chosen)]
    for _ in range(case.steps - 1):
        sizes.append(data.draw(st.integers(1, sizes[-1])) if drop else sizes[-1])
    return Rows(torch.tensor(chosen), sizes)


def states_and_gradients(
    case: Case, chosen: Rows, ops: Ops, rows: Rows | None
) -> tuple[list[Tensor], Params]:
    """The chosen places' states `(T, H)` of every step, and the gradients of a weighted sum of
    them, by the parameters and by the features.
    """
    config = case.config()
    frozen = tiny_frozen(case)
    batch = tiny_batch(case)
    source = torch.Generator().manual_seed(case.seed)
    shape = (case.steps, batch.attention_mask.numel(), case.hidden)
    weights = normal(shape, 1.0, source, torch.float64)  # (K, B·S, H)

    def total(leaves: Params) -> tuple[Tensor, list[Tensor]]:
        params = {name: leaf for name, leaf in leaves.items() if name != AUX}
        given_batch = batch._replace(aux_hidden=leaves[AUX])
        states = []
        terms = []
        steps = unroll(params, given_batch, rows, config, frozen, ops)
        for state, size, weight in zip(steps, chosen.sizes, weights, strict=True):
            places = chosen.places[:size]
            at_places = state if rows is not None else state.flatten(0, 1)[places]
            states.append(at_places)
            terms.append((at_places * weight[places]).sum())
        return torch.stack(terms).sum(), states

    leaves = tiny_params(case) | {AUX: batch.aux_hidden}
    (_, states), gradients = e3.value_and_grad(total, has_aux=True)(leaves)
    return states, gradients


def check_fast_is_plain(case: Case, chosen: Rows) -> None:
    """States, and gradients that flow back through all steps."""
    wanted, wanted_gradients = states_and_gradients(case, chosen, PLAIN, None)
    found, found_gradients = states_and_gradients(case, chosen, FAST, chosen)
    for step, (a, b) in enumerate(zip(found, wanted, strict=True)):
        assert a.shape == b.shape
        assert error(a, b) < ROUNDING, step
    for name, gradient in wanted_gradients.items():
        assert error(found_gradients[name], gradient) < ROUNDING, name


@given(data=st.data())
def test_fast_states_of_listed_rows_are_those_of_plain(data: st.DataObject) -> None:
    case = data.draw(cases(dtype="float64"))
    check_fast_is_plain(case, choose_rows(data, case, drop=False))


@given(data=st.data())
def test_rows_that_end_early_leave_the_others_as_they_are(data: st.DataObject) -> None:
    """Plain has every row at every step; a row that ended adds nothing to the sum from there on."""
    case = data.draw(cases(dtype="float64", steps=st.integers(2, 6)))
    check_fast_is_plain(case, choose_rows(data, case, drop=True))


def test_rows_may_end_at_several_steps() -> None:
    """A fixed case: all go on to step 1, two of three to step 2, one to step 3."""
    case = Case(dtype="float64", lengths=(7, 5), steps=4, mask="full")
    check_fast_is_plain(case, Rows(torch.tensor([8, 1, 4]), [3, 3, 2, 1]))


def test_the_unroll_ends_with_the_last_step_that_has_rows() -> None:
    case = Case(dtype="float64", lengths=(7,), steps=4)
    parts = tiny_params(case), tiny_batch(case), Rows(torch.tensor([2, 0]), [2, 1])
    states = [*unroll(*parts, case.config(), tiny_frozen(case), FAST)]
    assert [len(state) for state in states] == [2, 1]


def test_a_step_is_made_when_it_is_asked_for() -> None:
    """The caller takes a step's loss before the next: SpecForge's bits depend on this order."""
    case = Case(dtype="float64", steps=3)
    made = []

    def mlp(*args: Tensor) -> Tensor:
        made.append("step")
        return PLAIN.mlp(*args)  # pyright: ignore[reportArgumentType]

    ops = PLAIN._replace(mlp=mlp)
    states = unroll(
        tiny_params(case), tiny_batch(case), None, case.config(), tiny_frozen(case), ops
    )
    assert made == []
    for count in range(1, 4):
        next(states)
        assert len(made) == count

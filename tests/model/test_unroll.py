"""One unroll under two records of operations: the same hidden states, on any list of rows."""

from typing import NamedTuple

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


class Chosen(NamedTuple):
    """Rows of a batch that go through the unroll."""

    rows: Rows  # as `unroll` takes them
    places: list[Tensor]  # of each step, the places `b·S + t` of the rows that are left


def some_of(data: st.DataObject, count: int) -> Tensor:
    """At least one of `count` indices, ascending."""
    chosen = data.draw(st.sets(st.integers(0, count - 1), min_size=1))
    return torch.tensor(sorted(chosen))


def choose_rows(data: st.DataObject, case: Case, drop: bool) -> Chosen:
    """Some real rows; with `drop` some of them end before a later step."""
    real = tiny_batch(case).attention_mask.flatten().nonzero()[:, 0]
    places = [real[some_of(data, len(real))]]
    rows: list[Tensor | None] = [places[0]]
    for _ in range(case.steps - 1):
        kept = None
        if drop and data.draw(st.booleans()):
            kept = some_of(data, len(places[-1]))
        rows.append(kept)
        places.append(places[-1] if kept is None else places[-1][kept])
    return Chosen(rows, places)


def states_and_gradients(
    case: Case, chosen: Chosen, ops: Ops, rows: Rows
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
        for state, places, weight in zip(steps, chosen.places, weights, strict=True):
            at_places = state if rows[0] is not None else state.flatten(0, 1)[places]
            states.append(at_places)
            terms.append((at_places * weight[places]).sum())
        return torch.stack(terms).sum(), states

    leaves = tiny_params(case) | {AUX: batch.aux_hidden}
    (_, states), gradients = e3.value_and_grad(total, has_aux=True)(leaves)
    return states, gradients


def check_fast_is_plain(case: Case, chosen: Chosen) -> None:
    """States, and gradients that flow back through all steps."""
    every: Rows = [None] * case.steps
    wanted, wanted_gradients = states_and_gradients(case, chosen, PLAIN, every)
    found, found_gradients = states_and_gradients(case, chosen, FAST, chosen.rows)
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
    """A fixed case of `rows`: all go on to step 1, two of three to step 2, one to step 3."""
    case = Case(dtype="float64", lengths=(7, 5), steps=4, mask="full")
    first = torch.tensor([1, 4, 8])
    kept = torch.tensor([0, 2])
    last = torch.tensor([1])
    places = [first, first, first[kept], first[kept][last]]
    check_fast_is_plain(case, Chosen([first, None, kept, last], places))


def test_a_step_is_made_when_it_is_asked_for() -> None:
    """The caller takes a step's loss before the next: SpecForge's bits depend on this order."""
    case = Case(dtype="float64", steps=3)
    made = []

    def mlp(*args: Tensor) -> Tensor:
        made.append("step")
        return PLAIN.mlp(*args)  # pyright: ignore[reportArgumentType]

    ops = PLAIN._replace(mlp=mlp)
    states = unroll(
        tiny_params(case), tiny_batch(case), [None] * 3, case.config(), tiny_frozen(case), ops
    )
    assert made == []
    for count in range(1, 4):
        next(states)
        assert len(made) == count

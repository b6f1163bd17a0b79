"""A sliding window of attention, `draft.draft_window`: every kind of attention follows it.

With a window of `W ≥ K` the row at place `t` of step `i`, whose position is `t + i`, sees the keys
of step 0 at places `t + i - W + 1 … t`, and its own keys of steps 1 … i.
"""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import eagle3fn as e3
from eagle3fn.base.types import Params, VocabMap
from eagle3fn.model import block_attention
from eagle3fn.model.fast import FAST
from eagle3fn.model.forward import forward
from eagle3fn.model.named_loss import find_loss
from eagle3fn.model.plain import PLAIN, logits
from eagle3fn.model.unroll import Ops, Rows, unroll
from eagle3fn.testing.builders import Case, tiny_batch, tiny_frozen, tiny_params
from eagle3fn.testing.results import Result, named
from eagle3fn.testing.strategies import cases
from eagle3fn.use.drafter import Drafter
from eagle3fn.use.export import Draft
from tests.model.blocks import error

ROUNDING = 1e-12
SERVED = ("drawn", "full", "one", "empty")
"""Masks without a trained padded row: there the two numerics are different."""

OPERATIONS = {"plain": PLAIN, "fast": FAST}
BOTH = pytest.mark.parametrize("numerics", OPERATIONS)


def windowed(case: Case, window: int | None) -> Case:
    """The case with this window in place of its own; None: full attention."""
    others = tuple(switch for switch in case.switches if switch[0] != "draft_window")
    if window is None:
        return replace(case, switches=others)
    return replace(case, switches=(*others, ("draft_window", window)))


def evaluate(case: Case, ops: Ops, window: int | None) -> Result:
    """Loss, metrics and gradients by some operations; None: full attention."""
    case = windowed(case, window)
    config = case.config()
    batch = tiny_batch(case)
    frozen = tiny_frozen(case)
    loss = find_loss(config.objective)

    def loss_of(params: Params) -> Any:
        return forward(params, batch, config, frozen, ops, loss)

    (value, aux), gradients = e3.value_and_grad(loss_of, has_aux=True)(tiny_params(case))
    return named(value, aux, gradients)


def assert_near(found: Result, wanted: Result) -> None:
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        assert error(found[name], value) < ROUNDING or torch.equal(found[name], value), name


# Both numerics.


@given(data=st.data())
def test_fast_is_plain_with_a_window(data: st.DataObject) -> None:
    """Blocks of any size; windows from the unroll's length on, and longer than a sample."""
    mask = data.draw(st.sampled_from(SERVED))
    case = data.draw(cases(dtype="float64", mask=mask, steps=st.integers(1, 4)))
    window = data.draw(st.integers(case.steps, max(case.lengths) + case.steps))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_attention, "_BLOCK", data.draw(st.sampled_from([1, 3, 128])))
        patch.setattr(block_attention, "_STRIDE", data.draw(st.sampled_from([1, 4, 64])))
        fast = evaluate(case, FAST, window)
    plain = evaluate(case, PLAIN, window)
    for name in ("losses", "acceptance"):  # fast computes these metrics in fp32
        torch.testing.assert_close(fast.pop(name), plain.pop(name), rtol=1e-6, atol=1e-7)
    assert_near(fast, plain)


def test_a_window_is_seen_by_every_step() -> None:
    """The window of these tests hides something: at each step it changes the loss."""
    case = Case(dtype="float64", lengths=(9, 6), steps=4, mask="full")
    for ops in OPERATIONS.values():
        full = evaluate(case, ops, None)["losses"]
        for window in (4, 5):
            assert ((evaluate(case, ops, window)["losses"] - full).abs() > 1e-6).all()


@BOTH
@given(data=st.data())
def test_a_window_of_the_whole_sequence_is_full_attention(
    numerics: str, data: st.DataObject
) -> None:
    """Bit for bit: the same keys are hidden."""
    mask = data.draw(st.sampled_from(SERVED))
    case = data.draw(cases(mask=mask, switches=()))
    window = max(case.lengths) + case.steps + data.draw(st.integers(0, 3))
    found = evaluate(case, OPERATIONS[numerics], window)
    wanted = evaluate(case, OPERATIONS[numerics], None)
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


# Against the definition.


def attend_by_loops(window: int) -> Any:
    """`PLAIN.attend` by loops over samples, heads, rows and keys; it reads no mask."""

    def attend(query: Tensor, keys: list[Tensor], values: list[Tensor], mask: Tensor) -> Tensor:
        b, n, s, size = query.shape
        step = len(keys) - 1
        samples = []
        for sample in range(b):
            heads = []
            for head in range(n):
                rows = []
                for t in range(s):
                    seen_keys = []
                    seen_values = []
                    for u in range(s):
                        if u <= t and u > t + step - window:
                            seen_keys.append(keys[0][sample, head, u])
                            seen_values.append(values[0][sample, head, u])
                    for i in range(1, step + 1):
                        seen_keys.append(keys[i][sample, head, t])
                        seen_values.append(values[i][sample, head, t])
                    scores = torch.stack(seen_keys) @ query[sample, head, t] / math.sqrt(size)
                    rows.append(torch.softmax(scores, 0) @ torch.stack(seen_values))
                heads.append(torch.stack(rows))
            samples.append(torch.stack(heads))
        return torch.stack(samples)

    return attend


@settings(max_examples=max(8, settings().max_examples // 8))  # loops are slow
@given(data=st.data())
def test_plain_with_a_window_is_attention_by_its_definition(data: st.DataObject) -> None:
    mask = data.draw(st.sampled_from(SERVED))
    case = data.draw(cases(dtype="float64", mask=mask, steps=st.integers(1, 4)))
    case = replace(case, lengths=tuple(min(length, 7) for length in case.lengths[:2]))
    window = data.draw(st.integers(case.steps, 9))
    by_loops = PLAIN._replace(attend=attend_by_loops(window))
    assert_near(evaluate(case, PLAIN, window), evaluate(case, by_loops, None))


@BOTH
@settings(max_examples=max(10, settings().max_examples // 4))
@given(data=st.data())
def test_features_outside_the_window_have_exactly_zero_gradient(
    numerics: str, data: st.DataObject
) -> None:
    """Of row t at any step: those after t, and those before step 0's window, `t - W + 1`.

    The row's hidden states of earlier steps, which it reads, have seen no more.
    """
    one_layer = st.sampled_from([(), (("norm_output", True),), (("qk_norm", True),)])
    steps = st.integers(1, 3)
    case = data.draw(cases(dtype="float64", mask="full", switches=one_layer, steps=steps))
    sample = data.draw(st.integers(0, len(case.lengths) - 1))
    row = data.draw(st.integers(0, case.lengths[sample] - 1))
    window = data.draw(st.integers(case.steps, case.lengths[sample] + case.steps))
    case = windowed(case, window)
    config = case.config()
    batch = tiny_batch(case)
    step = data.draw(st.integers(0, case.steps - 1))
    place = sample * max(case.lengths) + row

    def state(aux_hidden: Tensor) -> Tensor:
        rows = None
        if numerics == "fast":
            rows = Rows(torch.tensor([place]), [1] * case.steps)
        states = unroll(
            tiny_params(case),
            batch._replace(aux_hidden=aux_hidden),
            rows,
            config,
            tiny_frozen(case),
            OPERATIONS[numerics],
        )
        found = [*states][step]
        return found.sum() if numerics == "fast" else found[sample, row].sum()

    _, slope = e3.value_and_grad(state)(batch.aux_hidden)

    seen = torch.zeros(slope.shape[:2], dtype=torch.bool)
    seen[sample, max(row - window + 1, 0) : row + 1] = True
    reached = slope.abs().sum(-1) > 0
    assert torch.equal(reached, seen)


# The draft at inference.


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("window", [4, 5, 6, 20])
def test_drafted_rows_are_those_of_the_unroll_with_a_window(window: int, layers: int) -> None:
    """Logits of unroll step i at row t: the drafted row i after committed rows 0 … t."""
    case = Case(steps=4, lengths=(9,), dtype="float64", seed=5)
    case = replace(case, switches=(("num_hidden_layers", layers), ("draft_window", window)))
    params = tiny_params(case)
    frozen = tiny_frozen(case)
    batch = tiny_batch(case)
    config = case.config()
    states = unroll(params, batch, None, config, frozen, PLAIN)
    trained = [logits(params, config.draft, hidden) for hidden in states]

    assert frozen.embed_tokens is not None
    draft = Draft(config.draft, params, VocabMap(frozen.t2d, frozen.d2t), frozen.embed_tokens)
    aux = batch.aux_hidden
    ids = batch.next_ids  # entry t is token t + 1
    checked = 0
    for row in range(8):
        drafter = Drafter(draft, 20, frozen.embed_tokens)
        first = min(row + 1, 2)  # committed in two pieces, as after verifications
        hidden = drafter.commit(aux[:, :first], ids[:, :first])
        if row + 1 > first:
            hidden = drafter.commit(aux[:, first : row + 1], ids[:, first : row + 1])
        for step in range(min(case.steps, 8 - row)):
            if step:
                hidden = drafter.extend(hidden, ids[:, row + step, None], step)
            torch.testing.assert_close(
                drafter.logits(hidden)[:, 0], trained[step][:, row], atol=1e-12, rtol=1e-10
            )
            checked += 1
    assert checked == 26

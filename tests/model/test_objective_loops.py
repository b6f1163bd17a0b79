"""`forward_loss` in fp64 equals the objective by loops over rows, `tests/reference/loops.py`."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import eagle3fn as e3
from eagle3fn.testing.builders import (
    Case,
    Unaligned,
    tiny_batch,
    tiny_frozen,
    tiny_params,
    tiny_unaligned,
)
from eagle3fn.testing.strategies import LOSS_SUMS, VALUES, cases
from tests.reference.loops import LOSSES, objective_by_loops


def samples_of(batch: Unaligned, lengths: tuple[int, ...]) -> list[Unaligned]:
    """The samples of a batch, without padding and without the batch axis."""
    samples = []
    for b, length in enumerate(lengths):
        fields = (None if field is None else field[b, :length] for field in batch)
        samples.append(Unaligned(*fields))  # pyright: ignore[reportArgumentType]
    return samples


def check(case: Case, numerics: Any = "plain") -> None:
    """Loss, counts and acceptance of a case on both sides."""
    config = case.config()
    config = replace(config, objective=replace(config.objective, numerics=numerics))
    params = tiny_params(case)
    frozen = tiny_frozen(case)
    unaligned = tiny_unaligned(case)

    samples = samples_of(unaligned, case.lengths)
    expected = objective_by_loops(params, frozen, config, samples, unaligned.input_ids.numel())
    loss, aux = e3.forward_loss(params, tiny_batch(case), config=config, frozen=frozen)

    assert float(loss) == pytest.approx(expected.loss, rel=1e-9, abs=1e-12)
    assert aux.losses.tolist() == pytest.approx(expected.losses, rel=1e-9, abs=1e-12)
    assert aux.correct.tolist() == expected.sums.correct
    assert aux.rows.tolist() == expected.sums.rows
    assert aux.chain_rows.tolist() == expected.sums.chain_rows
    assert aux.chain_correct.tolist() == expected.sums.chain_correct
    assert aux.accept.tolist() == pytest.approx(expected.sums.accept, rel=1e-9, abs=1e-12)
    assert aux.accept_rows.tolist() == expected.sums.known


@settings(max_examples=max(8, settings().max_examples // 8))  # loops over numbers are slow
@given(
    cases(dtype="float64", loss=st.sampled_from([*LOSSES, *LOSS_SUMS])),
    st.sampled_from(["drawn", "full", "one", "empty"]),
)
def test_plain_numerics_equal_plain_loops(case: Case, mask: Any) -> None:
    """Any unroll length. No padded row is trained, as the loops have none."""
    lengths = tuple(min(length, 8) for length in case.lengths[:2])
    check(replace(case, mask=mask, lengths=lengths))


@pytest.mark.parametrize("loss", [*LOSSES, *LOSS_SUMS], ids=str)
@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("normalization", ["rows", "mask"])
def test_fast_numerics_equal_plain_loops(normalization: Any, steps: int, loss: Any) -> None:
    case = Case(
        dtype="float64",
        steps=steps,
        loss=loss,
        normalization=normalization,
        lengths=(7, 4),
        own_positions=True,
        eps=1e-2,
    )
    check(case, numerics="fast")


@pytest.mark.parametrize("numerics", ["plain", "fast"])
@pytest.mark.parametrize("taps", [1, 4])
@pytest.mark.parametrize("switches", VALUES["switches"], ids=str)
def test_each_switch_equals_plain_loops(switches: Any, taps: int, numerics: Any) -> None:
    case = Case(dtype="float64", steps=3, lengths=(8, 4), taps=taps, switches=switches, mask="full")
    check(case, numerics=numerics)

"""The package equals the reference by `torch.equal`, one rank, on drawn cases, on the CPU and on a card.

Level 2: on a card our loss is the plain expression too, not the kernel.

The reference is itself held against the old tool in `test_reference_oracle`. One number is compared to rounding
alone: `Aux.sampled`, which the old tool does not have and whose order of summation nothing prescribes.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, note, settings
from hypothesis import strategies as st
from torch import Tensor

import eagle3fn as e3
from eagle3fn import specforge
from eagle3fn.base.config import OptimizerConfig
from eagle3fn.base.grad import value_and_grad
from eagle3fn.base.types import Aux, Batch, Params
from eagle3fn.testing.builders import Case, on, tiny_batch, tiny_frozen, tiny_params
from eagle3fn.testing.equivalence import assert_same
from eagle3fn.testing.results import Result, differences
from eagle3fn.testing.strategies import cases, drawn
from eagle3fn.train.optimizer import cosine_schedule
from eagle3fn.train.recipe import OURS
from tests.reference import Metrics, Trainer, mask_counts
from tests.reference import model as reference_model
from tests.reference.adapter import reference_draft, run_reference
from tests.small import GATE
from tests.tally import Tally

ROUNDED = "aux.sampled"


def named(loss: Tensor, metrics: Aux | Metrics, gradients: Params) -> Result:
    """Everything that is compared, by name."""
    seen = {f"aux.{name}": value for name, value in metrics._asdict().items()}
    return {"loss": loss.detach(), **seen, **gradients}


def ours(case: Case, device: str = "cpu") -> Result:
    functions = e3.bind(case.config(), on(device, tiny_frozen(case)))
    batch = on(device, tiny_batch(case))
    compute = value_and_grad(lambda params: functions.forward_loss(params, batch), has_aux=True)
    (loss, aux), gradients = compute(on(device, tiny_params(case)))
    return named(loss, aux, gradients)


def theirs(case: Case, device: str = "cpu") -> Result:
    return named(*run_reference(case, device))


def hold(case: Case, device: str = "cpu") -> Result:
    """Both sides on one case, compared; the reference's result."""
    left, right = ours(case, device), theirs(case, device)
    assert list(left) == list(right)
    if set(differences(left, right)) - {ROUNDED}:
        assert_same(
            exact(ours, device), exact(theirs, device), case, lambda case: repeat(case, device)
        )
    assert torch.allclose(left[ROUNDED], right[ROUNDED], rtol=1e-5, atol=1e-6)
    return right


def repeat(case: Case, device: str) -> str:
    where = "" if device == "cpu" else f", {device!r}"
    return f"from tests.model.test_reference_parity import Case, hold\n\nhold({case}{where})"


def exact(side: Callable[[Case, str], Result], device: str) -> Callable[[Case], Result]:
    """A side without the metric that is compared to rounding."""
    return lambda case: {
        name: value for name, value in side(case, device).items() if name != ROUNDED
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_forward_and_gradients_equal_the_reference(dtype: str, device: str, tally: Tally) -> None:
    """Losses, metrics and every gradient leaf."""

    @given(cases(dtype=dtype))
    def check(case: Case) -> None:
        seen = hold(case, device)
        tally.add(
            case, all(bool(seen[name].count_nonzero()) for name in ["loss", *tiny_params(case)])
        )

    check()
    tally.check()


@pytest.mark.parametrize("normalization", ["rows", "mask"])
@pytest.mark.parametrize("teacher", ["full", "compact"])
def test_fp64_equals_the_reference(teacher: Any, normalization: Any, device: str) -> None:
    hold(
        Case(dtype="float64", teacher=teacher, normalization=normalization, lengths=(8, 5)), device
    )


@pytest.mark.parametrize("loss", ["kl", "lk_alpha", "lk_lambda"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_old_gates_own_shapes_equal_the_reference(dtype: Any, loss: Any, device: str) -> None:
    """Target and draft of SpecForge's equivalence gates."""
    hold(replace(GATE, dtype=dtype, loss=loss), device)


def test_a_failure_ends_with_lines_that_repeat_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As simple as it still fails: a sample of one token trains no row."""
    monkeypatch.setattr(reference_model.RMSNorm, "forward", lambda self, x: self.weight * x)
    with pytest.raises(AssertionError, match=r"lm_head\.weight: .* ulps") as failure:
        hold(drawn(3, 0)[2])
    code = str(failure.value).split("to repeat it:\n")[1]
    assert code.endswith("hold(Case(lengths=(2,), steps=1))")
    with pytest.raises(AssertionError, match="not equal"):
        exec(compile(code, "snippet", "exec"), {})


def test_given_counts_are_used() -> None:
    """`Batch.n` replaces the batch's own counts under "mask" and does nothing under "rows"."""
    case = Case(normalization="mask")
    batch = tiny_batch(case)
    given_n = batch._replace(row_counts=2 * mask_counts(batch.row_mask, case.steps))
    params, frozen = tiny_params(case), tiny_frozen(case)
    for kind, ratio in (("mask", 2), ("rows", 1)):
        functions = e3.bind(replace(case, normalization=kind).config(), frozen)
        assert (
            functions.forward_loss(params, batch)[0]
            == ratio * functions.forward_loss(params, given_n)[0]
        )


@pytest.mark.parametrize("change", ["norm", "rope"])
def test_a_reordering_is_detected(
    monkeypatch: pytest.MonkeyPatch, change: str, device: str
) -> None:
    """The control: the same mathematics in another order of operations must not pass."""
    case = Case(dtype="bfloat16", lengths=(8, 6), steps=4)
    hold(case, device)

    def cast_last(self: reference_model.RMSNorm, x: Tensor) -> Tensor:
        wide = x.float()
        scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (self.weight * scaled).to(x.dtype)

    def scaled_query(self: reference_model.Rotary, x: Tensor, positions: Tensor) -> Tensor:
        return turn(self, x / 3, positions) * 3

    turn = reference_model.Rotary.turn
    if change == "norm":
        monkeypatch.setattr(reference_model.RMSNorm, "forward", cast_last)
    else:
        monkeypatch.setattr(reference_model.Rotary, "turn", scaled_query)
    found = differences(ours(case, device), theirs(case, device))
    assert "lm_head.weight" in found and "loss" in found


@st.composite
def optimizers(draw: st.DrawFn) -> OptimizerConfig:
    return OptimizerConfig(
        learning_rate=draw(st.sampled_from([3e-3, 1e-2])),
        warmup_ratio=draw(st.sampled_from([0.0, 0.015, 0.3])),
        max_grad_norm=draw(st.sampled_from([0.5, 5.0])),
        weight_decay=draw(st.sampled_from([0.0, 0.01])),
        accumulation=draw(st.sampled_from(["fp32", "params"])),
    )


def micro_batches(case: Case, step: int, count: int) -> tuple[Batch, ...]:
    """Micro-batches that carry the whole batch's counts where the loss needs them."""
    batches = [tiny_batch(case, step * count + index) for index in range(count)]
    if case.normalization == "rows":
        return tuple(batches)
    n = mask_counts(torch.cat([batch.row_mask for batch in batches]), case.steps)
    return tuple(batch._replace(row_counts=n) for batch in batches)


def train_both(
    case: Case,
    choice: OptimizerConfig,
    total: int,
    micro: int,
    device: str = "cpu",
    recursive: bool = False,
) -> bool:
    """Ten updates on both sides: loss, norm and rate of each; then the whole state. True if every leaf has moved."""
    config = case.config(choice, total)
    frozen, params = on(device, tiny_frozen(case)), on(device, tiny_params(case))
    schedule = specforge.schedule if recursive else cosine_schedule
    functions = e3.bind(config, frozen, recipe=OURS._replace(schedule=schedule))
    trainer = Trainer(config, reference_draft(case, device), frozen.target_head, recursive)
    state = functions.init_state(params)
    for index in range(10):
        batches, before = (
            tuple(on(device, batch) for batch in micro_batches(case, index, micro)),
            state,
        )
        state, metrics = functions.step(before, batches)
        expected = trainer.step(list(batches))
        assert torch.equal(metrics["loss"], expected["loss"]), index
        assert torch.equal(metrics["grad_norm"], expected["grad_norm"]), index
        assert float(metrics["learning_rate"]) == expected["learning_rate"], index
        if index == 0:  # a state is a value: the same update again
            again = functions.step(before, batches)[1]["grad_norm"]
            assert torch.equal(again, expected["grad_norm"])
    leaves, moments = trainer.draft.trainable(), trainer.moments()
    assert int(state.step) == 10
    assert list(state.params) == list(leaves)
    for name in leaves:
        assert state.params[name].dtype == leaves[name].dtype
        assert torch.equal(state.params[name], leaves[name]), name
        assert torch.equal(state.masters[name], trainer.masters[name]), name
        assert torch.equal(state.opt.mu[name], moments[name][0]), name
        assert torch.equal(state.opt.nu[name], moments[name][1]), name
    return all(not torch.equal(state.masters[name], params[name].float()) for name in params)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_equals_the_reference(dtype: str, device: str, tally: Tally) -> None:
    """Some of the updates lie past the schedule's end."""

    @settings(
        max_examples=max(12, settings().max_examples // 4)
    )  # one costs twenty passes and more
    @given(
        cases(dtype=dtype),
        optimizers(),
        st.sampled_from([8, 10, 17]),
        st.sampled_from([1, 2]),
        st.booleans(),
    )
    def check(case: Case, choice: OptimizerConfig, total: int, micro: int, recursive: bool) -> None:
        case = (
            case if micro == 1 else replace(case, loss="kl")
        )  # the others have means over the whole batch
        note(
            f"from tests.model.test_reference_parity import *\n\ntrain_both({case}, {choice}, {total}, {micro}, {device!r}, {recursive})"
        )
        tally.add(case, train_both(case, choice, total, micro, device, recursive))

    check()
    tally.check()

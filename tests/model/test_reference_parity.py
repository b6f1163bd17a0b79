"""The plain numerics equal the reference by `torch.equal`, on drawn cases.

One rank, on the CPU and on a card. The reference is itself compared with SpecForge, in
`tests/specforge/test_reference_oracle`. One number is compared to rounding alone: `Aux.sampled`,
which SpecForge does not have and whose order of summation nothing prescribes. The reference has no
switches of the draft (`DraftConfig`'s last fields).
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, note, settings
from hypothesis import strategies as st
from torch import Tensor

import eagle3fn as e3
from eagle3fn.base.sections import OptimizerConfig
from eagle3fn.base.types import Aux, Batch, Frozen, Params
from eagle3fn.model.forward import forward
from eagle3fn.specforge.arithmetic import SPECFORGE, kl_loss, score
from eagle3fn.specforge.recipes import RECIPE
from eagle3fn.specforge.recipes import schedule as recursive_schedule
from eagle3fn.testing.builders import (
    Case,
    Unaligned,
    on,
    tiny_batch,
    tiny_frozen,
    tiny_params,
    tiny_unaligned,
)
from eagle3fn.testing.equivalence import assert_same
from eagle3fn.testing.results import Result, differences
from eagle3fn.testing.strategies import cases, drawn
from eagle3fn.train.recipe import OURS, Recipe
from eagle3fn.train.schedules import cosine
from tests.factories import GATE
from tests.reference import Metrics, Trainer, mask_counts
from tests.reference import model as reference_model
from tests.reference.adapter import reference_draft, run_reference
from tests.tally import Tally

ROUNDED = "aux.sampled"
UPDATES = 10
LOSSES = ("kl", "lk_alpha", "lk_lambda")  # SpecForge's


def named(loss: Tensor, metrics: Aux | Metrics, gradients: Params) -> Result:
    """Everything that is compared, by name."""
    seen = {f"aux.{name}": value for name, value in metrics._asdict().items()}
    return {"loss": loss.detach(), **seen, **gradients}


def recipe_for(case: Case) -> Recipe:
    """Our own for the KL; SpecForge's means over the whole batch come with its recipe."""
    return OURS if case.loss == "kl" else RECIPE._replace(loss=eager_forward_loss)


def eager_forward_loss(
    params: Params, batch: Batch, *, config: e3.Config, frozen: Frozen, loss: None = None
) -> tuple[Tensor, Aux]:
    """SpecForge's losses with the plain expression as their KL, on every device."""
    ops = SPECFORGE._replace(score=partial(score, kl=kl_loss))
    return forward(params, batch, config, frozen, ops, loss)


def ours(case: Case, device: str = "cpu") -> Result:
    functions = e3.bind(case.config(), on(device, tiny_frozen(case)), recipe=recipe_for(case))
    compute = e3.value_and_grad(functions.forward_loss, has_aux=True)
    batch = on(device, tiny_batch(case))
    (loss, aux), gradients = compute(on(device, tiny_params(case)), batch)
    return named(loss, aux, gradients)


def theirs(case: Case, device: str = "cpu") -> Result:
    return named(*run_reference(case, device))


def hold(case: Case, device: str = "cpu") -> Result:
    """Compare both sides on a case; returns the reference's result."""
    left = ours(case, device)
    right = theirs(case, device)
    assert list(left) == list(right)
    if set(differences(left, right)) - {ROUNDED}:
        # Compare again, for the message: the simplest case that still differs.
        assert_same(
            exact(ours, device), exact(theirs, device), case, lambda case: repeat(case, device)
        )
    assert torch.allclose(left[ROUNDED], right[ROUNDED], rtol=1e-5, atol=1e-6)
    return right


def repeat(case: Case, device: str) -> str:
    """Lines of Python that repeat the comparison."""
    where = "" if device == "cpu" else f", {device!r}"
    return f"from tests.model.test_reference_parity import Case, hold\n\nhold({case}{where})"


def exact(side: Callable[[Case, str], Result], device: str) -> Callable[[Case], Result]:
    """A side without the metric that is compared to rounding."""

    def without(case: Case) -> Result:
        return {name: value for name, value in side(case, device).items() if name != ROUNDED}

    return without


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_forward_and_gradients_equal_the_reference(dtype: str, device: str, tally: Tally) -> None:
    """Losses, metrics and every gradient leaf."""

    @given(cases(dtype=dtype, switches=(), loss=st.sampled_from(LOSSES)))
    def check(case: Case) -> None:
        seen = hold(case, device)
        names = ["loss", *tiny_params(case)]
        tally.add(case, all(bool(seen[name].count_nonzero()) for name in names))

    check()
    tally.check()


@pytest.mark.parametrize("normalization", ["rows", "mask"])
@pytest.mark.parametrize("teacher", ["full", "compact"])
def test_fp64_equals_the_reference(teacher: Any, normalization: Any, device: str) -> None:
    case = Case(dtype="float64", teacher=teacher, normalization=normalization, lengths=(8, 5))
    hold(case, device)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shapes_of_specforges_own_tests_equal_the_reference(
    dtype: Any, loss: Any, device: str
) -> None:
    hold(replace(GATE, dtype=dtype, loss=loss), device)


def test_failure_ends_with_lines_that_repeat_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The case is the simplest one that still fails: a sample of one token would train no row."""
    monkeypatch.setattr(reference_model.RMSNorm, "forward", lambda self, x: self.weight * x)
    with pytest.raises(AssertionError, match=r"lm_head\.weight: .* ulps") as failure:
        hold(drawn(3, 0, switches=())[2])

    code = str(failure.value).split("to repeat it:\n")[1]
    assert code.endswith("hold(Case(lengths=(2,), steps=1))")
    with pytest.raises(AssertionError, match="not equal"):
        exec(compile(code, "snippet", "exec"), {})


def test_given_row_counts_divide_the_loss_under_mask_alone() -> None:
    """`Batch.row_counts` replaces the batch's own counts; under "rows" it is not read."""
    case = Case(normalization="mask")
    batch = tiny_batch(case)
    counts = mask_counts(tiny_unaligned(case).row_mask, case.steps)
    doubled = batch._replace(row_counts=2 * counts)
    params = tiny_params(case)
    frozen = tiny_frozen(case)
    for normalization, ratio in (("mask", 2), ("rows", 1)):
        functions = e3.bind(replace(case, normalization=normalization).config(), frozen)
        loss, _ = functions.forward_loss(params, batch)
        loss_of_doubled, _ = functions.forward_loss(params, doubled)
        assert loss == ratio * loss_of_doubled


@pytest.mark.parametrize("change", ["norm", "rope"])
def test_reordered_operations_are_detected(
    monkeypatch: pytest.MonkeyPatch, change: str, device: str
) -> None:
    """The control: the same mathematics in another order of operations must not pass."""
    case = Case(dtype="bfloat16", lengths=(8, 6), steps=4)
    hold(case, device)

    def cast_last(self: reference_model.RMSNorm, x: Tensor) -> Tensor:
        wide = x.float()
        scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (self.weight * scaled).to(x.dtype)

    rotate = reference_model.Rotary.rotate

    def scaled_query(self: reference_model.Rotary, x: Tensor, positions: Tensor) -> Tensor:
        return rotate(self, x / 3, positions) * 3

    if change == "norm":
        monkeypatch.setattr(reference_model.RMSNorm, "forward", cast_last)
    else:
        monkeypatch.setattr(reference_model.Rotary, "rotate", scaled_query)
    found = differences(ours(case, device), theirs(case, device))
    assert "lm_head.weight" in found
    assert "loss" in found


@st.composite
def optimizers(draw: st.DrawFn) -> OptimizerConfig:
    """Settings of the optimizer whose every choice can be seen within ten updates."""
    return OptimizerConfig(
        learning_rate=draw(st.sampled_from([3e-3, 1e-2])),
        warmup_ratio=draw(st.sampled_from([0.0, 0.015, 0.3])),
        max_grad_norm=draw(st.sampled_from([0.5, 5.0])),
        weight_decay=draw(st.sampled_from([0.0, 0.01])),
        accumulation=draw(st.sampled_from(["fp32", "params"])),
    )


def micro_batches(case: Case, step: int, count: int, device: str) -> list[Unaligned]:
    """Micro-batches of a step, with the whole batch's row counts where the loss needs them."""
    batches = [tiny_unaligned(case, step * count + index) for index in range(count)]
    if case.normalization == "mask":
        counts = mask_counts(torch.cat([batch.row_mask for batch in batches]), case.steps)
        batches = [batch._replace(row_counts=counts) for batch in batches]
    return [on(device, batch) for batch in batches]


def train_both(
    case: Case,
    choice: OptimizerConfig,
    total: int,
    micro: int,
    device: str = "cpu",
    recursive: bool = False,
) -> bool:
    """Ten updates on both sides, compared: loss, norm and rate of each, then the whole state.

    Args:
        case: the problem.
        choice: the optimizer's settings.
        total: steps that the schedule spans.
        micro: micro-batches of an update.
        device: of both sides.
        recursive: SpecForge's schedule in place of ours.

    Returns:
        True if every leaf has moved.
    """
    config = case.config(choice, total)
    frozen = on(device, tiny_frozen(case))
    params = on(device, tiny_params(case))
    schedule = recursive_schedule if recursive else cosine
    functions = e3.bind(config, frozen, recipe=recipe_for(case)._replace(schedule=schedule))
    trainer = Trainer(config, reference_draft(case, device), frozen.target_head, recursive)

    state = functions.init_state(params)
    for index in range(UPDATES):
        unaligned = micro_batches(case, index, micro, device)
        batches = tuple(batch.aligned(case.steps) for batch in unaligned)
        before = state
        state, metrics = functions.step(before, batches)
        expected = trainer.step(unaligned)
        assert torch.equal(metrics["loss"], expected["loss"]), index
        assert torch.equal(metrics["grad_norm"], expected["grad_norm"]), index
        assert float(metrics["learning_rate"]) == expected["learning_rate"], index

        # A state is a value: the same update again gives the same numbers.
        if index == 0:
            _, again = functions.step(before, batches)
            assert torch.equal(again["grad_norm"], expected["grad_norm"])

    leaves = trainer.draft.trainable()
    moments = trainer.moments()
    assert int(state.step) == UPDATES
    assert list(state.params) == list(leaves)
    for name in leaves:
        first, second = moments[name]
        assert state.params[name].dtype == leaves[name].dtype
        assert torch.equal(state.params[name], leaves[name]), name
        assert torch.equal(state.masters[name], trainer.masters[name]), name
        assert torch.equal(state.opt.mu[name], first), name
        assert torch.equal(state.opt.nu[name], second), name
    return all(not torch.equal(state.masters[name], params[name].float()) for name in params)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_equals_the_reference(dtype: str, device: str, tally: Tally) -> None:
    """Some of the updates are past the schedule's end."""
    few = max(12, settings().max_examples // 4)  # one costs twenty passes and more

    @settings(max_examples=few)
    @given(
        cases(dtype=dtype, switches=(), loss=st.sampled_from(LOSSES)),
        optimizers(),
        st.sampled_from([8, 10, 17]),
        st.sampled_from([1, 2]),
        st.booleans(),
    )
    def check(case: Case, choice: OptimizerConfig, total: int, micro: int, recursive: bool) -> None:
        # The losses by acceptance have means over the whole batch.
        if micro > 1:
            case = replace(case, loss="kl", kl_scale=Case.kl_scale, kl_decay=Case.kl_decay)
        arguments = f"{case}, {choice}, {total}, {micro}, {device!r}, {recursive}"
        note(f"from tests.model.test_reference_parity import *\n\ntrain_both({arguments})")
        tally.add(case, train_both(case, choice, total, micro, device, recursive))

    check()
    tally.check()

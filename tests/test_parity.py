"""The package equals the reference by `torch.equal`, one rank, on drawn cases.

The reference is itself held against the old tool in `test_reference_oracle`. One number is compared to rounding
alone: `Aux.sampled`, which the old tool does not have and whose order of summation nothing prescribes.
"""

from collections import Counter
from dataclasses import replace
from typing import Literal

import pytest
import torch
from hypothesis import given, note, settings
from hypothesis import strategies as st
from torch import Tensor

import eagle3fn as e3
from eagle3fn.base.config import OptimizerConfig
from eagle3fn.base.grad import value_and_grad
from eagle3fn.base.types import Aux, Batch, Params
from eagle3fn.testing.builders import Case, tame_batch, tame_frozen, tame_params
from eagle3fn.testing.strategies import cases
from tests import reference
from tests.reference import Draft, Metrics, Trainer, mask_counts, weighted_sum
from tests.reference import model as reference_model

NONTRIVIAL = 0.8
Result = dict[str, Tensor]


def named(loss: Tensor, metrics: Aux | Metrics, gradients: Params) -> Result:
    """Everything that is compared, by name."""
    seen = {f"aux.{name}": value for name, value in metrics._asdict().items()}
    return {"loss": loss.detach(), **seen, **gradients}


def run_ours(case: Case) -> Result:
    functions = e3.bind(case.config(), tame_frozen(case))
    batch = tame_batch(case)
    compute = value_and_grad(lambda params: functions.forward_loss(params, batch), has_aux=True)
    (loss, aux), gradients = compute(tame_params(case))
    return named(loss, aux, gradients)


def reference_draft(case: Case) -> Draft:
    frozen = tame_frozen(case)
    return Draft(case.draft(), frozen.embed_tokens, frozen.t2d, frozen.d2t).load(tame_params(case))


def run_reference(case: Case) -> Result:
    draft, objective = reference_draft(case), case.config().objective
    losses, metrics = reference.forward(draft, tame_frozen(case).target_head, tame_batch(case), objective)
    loss = weighted_sum(losses, objective.decay)
    loss.backward()
    return named(loss, metrics, {n: leaf.grad for n, leaf in draft.trainable().items() if leaf.grad is not None})


def same(name: str, ours: Tensor, theirs: Tensor) -> bool:
    if name == "aux.sampled":
        return torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    return ours.dtype == theirs.dtype and torch.equal(ours, theirs)


def differences(ours: Result, theirs: Result) -> list[str]:
    """Names of what is not equal; the names and their order must be the same."""
    assert list(ours) == list(theirs)
    return [name for name in ours if not same(name, ours[name], theirs[name])]


def share(parts: int) -> settings:
    """The profile's number of examples over `parts` parametrizations, at least twelve each."""
    return settings(max_examples=max(12, settings().max_examples // parts))


@pytest.mark.parametrize("normalization", ["rows", "mask"])
@pytest.mark.parametrize("teacher", ["full", "compact"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_forward_and_gradients_equal_the_reference(dtype: str, teacher: str, normalization: str) -> None:
    """Losses, metrics and every gradient leaf."""
    count = Counter()

    @share(8)
    @given(cases(dtype=dtype, teacher=teacher, normalization=normalization))
    def check(case: Case) -> None:
        theirs = run_reference(case)
        count["cases"] += 1
        count["nontrivial"] += all(bool(theirs[name].count_nonzero()) for name in ["loss", *tame_params(case)])
        assert differences(run_ours(case), theirs) == []

    check()
    print(dict(count))
    assert count["nontrivial"] >= NONTRIVIAL * count["cases"], count


@pytest.mark.parametrize("normalization", ["rows", "mask"])
@pytest.mark.parametrize("teacher", ["full", "compact"])
def test_fp64_equals_the_reference(teacher: str, normalization: str) -> None:
    case = Case(dtype="float64", teacher=teacher, normalization=normalization, lengths=(8, 5))  # pyright: ignore
    assert differences(run_ours(case), run_reference(case)) == []


def test_given_counts_are_used() -> None:
    """`Batch.n` replaces the batch's own counts under "mask" and does nothing under "rows"."""
    case = Case(normalization="mask")
    batch = tame_batch(case)
    given_n = batch._replace(n=2 * mask_counts(batch.loss_mask, case.steps))
    params, frozen = tame_params(case), tame_frozen(case)
    for kind, ratio in (("mask", 2), ("rows", 1)):
        functions = e3.bind(replace(case, normalization=kind).config(), frozen)
        assert functions.forward_loss(params, batch)[0] == ratio * functions.forward_loss(params, given_n)[0]


@pytest.mark.parametrize("change", ["norm", "rope"])
def test_a_reordering_is_detected(monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    """The control: the same mathematics in another order of operations must not pass."""
    case = Case(dtype="bfloat16", lengths=(8, 6), steps=4)
    assert differences(run_ours(case), run_reference(case)) == []

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
    found = differences(run_ours(case), run_reference(case))
    assert "lm_head.weight" in found and "loss" in found


@st.composite
def optimizers(draw: st.DrawFn, accumulation: Literal["fp32", "legacy"]) -> OptimizerConfig:
    return OptimizerConfig(
        learning_rate=draw(st.sampled_from([3e-3, 1e-2])),
        warmup_ratio=draw(st.sampled_from([0.0, 0.015, 0.3])),
        max_grad_norm=draw(st.sampled_from([0.5, 5.0])),
        weight_decay=draw(st.sampled_from([0.0, 0.01])),
        schedule=draw(st.sampled_from(["cosine", "legacy"])),
        accumulation=accumulation,
    )


def micro_batches(case: Case, step: int, count: int) -> tuple[Batch, ...]:
    """Micro-batches that carry the whole batch's counts where the loss needs them."""
    batches = [tame_batch(case, step * count + index) for index in range(count)]
    if case.normalization == "rows":
        return tuple(batches)
    n = mask_counts(torch.cat([batch.loss_mask for batch in batches]), case.steps)
    return tuple(batch._replace(n=n) for batch in batches)


@pytest.mark.parametrize(("micro", "accumulation"), [(1, "fp32"), (2, "fp32"), (2, "legacy")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_equals_the_reference(dtype: str, micro: int, accumulation: Literal["fp32", "legacy"]) -> None:
    """Ten updates, some past the schedule's end: loss, norm and rate of each; then the whole state."""
    count = Counter()
    loss = {"loss": "kl"} if micro > 1 else {}  # the others have means over the whole batch

    @share(6)
    @given(cases(dtype=dtype, **loss), optimizers(accumulation), st.sampled_from([8, 10, 17]))
    def check(case: Case, choice: OptimizerConfig, total: int) -> None:
        config = case.config(choice, total)
        frozen, params = tame_frozen(case), tame_params(case)
        functions = e3.bind(config, frozen)
        trainer = Trainer(config, reference_draft(case), frozen.target_head)
        state = functions.init_state(params)
        for index in range(10):
            note(f"update {index}")
            batches = micro_batches(case, index, micro)
            state, metrics = functions.step(state, batches)
            expected = trainer.step(list(batches))
            assert torch.equal(metrics["loss"], expected["loss"])
            assert torch.equal(metrics["grad_norm"], expected["grad_norm"])
            assert float(metrics["learning_rate"]) == expected["learning_rate"]
        leaves, moments = trainer.draft.trainable(), trainer.moments()
        assert int(state.step) == 10
        assert list(state.params) == list(leaves)
        for name in leaves:
            assert state.params[name].dtype == leaves[name].dtype
            assert torch.equal(state.params[name], leaves[name]), name
            assert torch.equal(state.masters[name], trainer.masters[name]), name
            assert torch.equal(state.opt.mu[name], moments[name][0]), name
            assert torch.equal(state.opt.nu[name], moments[name][1]), name
        count["cases"] += 1
        count["nontrivial"] += all(not torch.equal(state.masters[name], params[name].float()) for name in params)

    check()
    print(dict(count))
    assert count["nontrivial"] >= NONTRIVIAL * count["cases"], count

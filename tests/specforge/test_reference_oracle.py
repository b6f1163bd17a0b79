"""The reference and the package equal SpecForge by `torch.equal`.

Levels are those of `eagle3fn.specforge.oracle`: the reference is held at level 2. On a card the
package is held at level 1: each side computes its loss with its own Triton kernel.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from eagle3fn import specforge
from eagle3fn.base.sections import OptimizerConfig
from eagle3fn.model.table import EMBED
from eagle3fn.specforge.cases import specforge_cases
from eagle3fn.specforge.oracle import (
    Oracle,
    eager_loss,
    run_oracle,
    specforge_draft,
    specforge_forward,
)
from eagle3fn.testing.builders import (
    Case,
    on,
    tiny_batch,
    tiny_frozen,
    tiny_params,
    tiny_unaligned,
)
from eagle3fn.testing.results import Result, differences, nontrivial, run_forward
from tests.factories import GATE
from tests.reference import Trainer, weighted_sum
from tests.reference.adapter import reference_draft
from tests.specforge.helpers import (
    hold_package,
    hold_reference,
    loss_at,
    reference_result,
)
from tests.tally import Tally

CASES = [
    Case(seed=1),
    Case(seed=2, teacher="compact"),
    Case(seed=3, teacher="compact", chunk=40, own_positions=True),
    Case(seed=4, heads=(2, 2), head_dim=8, draft_vocab=40),
    Case(seed=5, heads=(3, 1), head_dim=4, hidden=24, target_hidden=24, lengths=(6,)),
    Case(seed=6, heads=(4, 4), head_dim=4, lengths=(9, 6, 4)),
    replace(GATE, seed=8),
    Case(
        seed=7, heads=(2, 1), head_dim=6, lengths=(5, 9), vocab=20, draft_vocab=20, mask="padding"
    ),
]


def our_result(case: Case) -> Result:
    return run_forward(specforge.forward_loss, case)


# Forward and backward


@pytest.mark.parametrize("steps", [1, 3, 7])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"seed{case.seed}")
@pytest.mark.parametrize("loss", ["kl", "lk_alpha", "lk_lambda"])
def test_reference_equals_specforge_on_fixed_cases(
    oracle: Oracle, case: Case, loss: Any, dtype: Any, steps: int
) -> None:
    case = replace(case, dtype=dtype, steps=steps, loss=loss)
    assert nontrivial(hold_reference(oracle, case))


@pytest.mark.parametrize("hold", [hold_reference, hold_package], ids=["reference", "package"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_drawn_cases_equal_specforge(
    oracle: Oracle, dtype: str, hold: Callable[..., Result], device: str, tally: Tally
) -> None:
    """SpecForge has neither a target of another width nor a division by trained rows."""

    @given(specforge_cases(dtype=dtype))
    def check(case: Case) -> None:
        tally.add(case, nontrivial(hold(oracle, case, device)))

    check()
    tally.check()


class Products(TorchDispatchMode):
    """Counts the matrix products inside by dtype, and by shape and stride of both factors."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[tuple] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default):
            factors = [(x.dtype, x.shape, x.stride()) for x in args]
            self.seen[(str(func), *factors)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("side", [reference_result, our_result], ids=["reference", "package"])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("heads", [(1, 1), (2, 1), (2, 2), (4, 2)])
@pytest.mark.parametrize("rows", [(10,), (7, 5)])
def test_products_have_specforges_memory_layout(
    oracle: Oracle,
    side: Callable[[Case], Result],
    steps: int,
    heads: tuple[int, int],
    rows: tuple[int, ...],
) -> None:
    """Forward and backward. A card's bits depend on it; a CPU does not tell these layouts apart."""
    case = Case(heads=heads, lengths=rows, steps=steps)
    with Products() as theirs:
        run_oracle(oracle, case)
    with Products() as ours:
        side(case)
    assert theirs.seen
    assert ours.seen == theirs.seen


def test_every_leaf_but_the_frozen_embedding_has_a_gradient(oracle: Oracle) -> None:
    """On every side, also where the target's head is its embedding."""
    for case in (CASES[0], replace(CASES[0], tied=True)):
        expected = {"loss", "losses", "acceptance", "correct", "rows", *tiny_params(case)}
        assert EMBED not in expected
        for result in (run_oracle(oracle, case), reference_result(case), our_result(case)):
            assert set(result) == expected


def test_a_reordering_is_detected(
    oracle: Oracle, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """The control: SpecForge with norms that multiply by their weight before the cast."""
    case = replace(CASES[0], dtype="bfloat16")
    sides = {
        "reference": reference_result(case, device),
        "package": run_forward(loss_at(2), case, device),
    }

    def cast_last(self: Any, x: Tensor) -> Tensor:
        wide = x.float()
        scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return (self.weight * scaled).to(x.dtype)

    expected = run_oracle(oracle, case, 2, "sdpa", device)
    for name, ours in sides.items():
        assert differences(expected, ours) == [], name

    monkeypatch.setattr(oracle.draft.LlamaRMSNorm, "forward", cast_last)
    changed = run_oracle(oracle, case, 2, "sdpa", device)
    for name, ours in sides.items():
        assert "lm_head.weight" in differences(changed, ours), name


def test_the_eager_loss_is_specforges_kernel_to_rounding(oracle: Oracle) -> None:
    """The expression that replaces the kernel at level 2; masked rows are among the rows."""
    case = replace(CASES[0], steps=1)
    frozen = tiny_frozen(case)
    batch = tiny_batch(case)
    objective = case.config().objective
    draft = specforge_draft(oracle, case.draft(), tiny_params(case), frozen)

    kernel = specforge_forward(oracle, draft, frozen, batch, objective).losses[0]
    with eager_loss(oracle):
        eager = specforge_forward(oracle, draft, frozen, batch, objective).losses[0]
    torch.testing.assert_close(kernel, eager, rtol=1e-6, atol=1e-6)


# The reference's updates


def optimizer_config(warmup_ratio: float) -> OptimizerConfig:
    return OptimizerConfig(
        learning_rate=1e-2, warmup_ratio=warmup_ratio, max_grad_norm=0.5, accumulation="params"
    )


def specforge_optimizer(oracle: Oracle, draft: Any, total: int, warmup_ratio: float) -> Any:
    return oracle.optimizer.BF16Optimizer(
        draft, lr=1e-2, max_grad_norm=0.5, total_steps=total, warmup_ratio=warmup_ratio
    )


def reference_trainer(case: Case, total: int, warmup_ratio: float, device: str) -> Trainer:
    config = case.config(optimizer_config(warmup_ratio), total)
    head = on(device, tiny_frozen(case)).target_head
    return Trainer(config, reference_draft(case, device), head, recursive_schedule=True)


@pytest.mark.parametrize("warmup_ratio", [0.0, 0.4])
@pytest.mark.parametrize("total", [5, 8])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_reference_updates_equal_specforges_optimizer(
    commit: Oracle, dtype: Any, total: int, warmup_ratio: float, device: str
) -> None:
    """Parameters, masters, moments, norm and rate; the last updates are past the schedule's end."""
    case = replace(CASES[0], dtype=dtype)
    trainer = reference_trainer(case, total, warmup_ratio, device)
    frozen = on(device, tiny_frozen(case))
    draft = specforge_draft(commit, case.draft(), on(device, tiny_params(case)), frozen)
    optimizer = specforge_optimizer(commit, draft, total, warmup_ratio)
    leaves = {name: leaf for name, leaf in draft.named_parameters() if leaf.requires_grad}
    assert list(leaves) == list(trainer.draft.trainable())

    clipped = 0
    rates = []
    for index in range(7):
        # The same gradients on both sides; every other update is small enough not to be clipped.
        source = torch.Generator().manual_seed(index)
        scale = 0.02 if index % 2 else 1.0
        gradients = {}
        for name, leaf in leaves.items():
            gradients[name] = (torch.randn(leaf.shape, generator=source) * scale).to(leaf)
            leaf.grad = gradients[name].clone()

        expected_rate = optimizer.get_learning_rate()
        expected_norm = optimizer.step()
        norm, rate = trainer.update({name: value.float() for name, value in gradients.items()})
        clipped += bool(norm > 0.5)
        rates.append(rate)
        assert torch.equal(norm, expected_norm)
        assert rate == expected_rate

        moments = trainer.moments()
        for (name, leaf), master in zip(leaves.items(), optimizer.fp32_params, strict=True):
            state = optimizer.optimizer.state[master]
            assert torch.equal(leaf, trainer.draft.trainable()[name]), name
            assert torch.equal(master, trainer.masters[name]), name
            assert torch.equal(state["exp_avg"], moments[name][0]), name
            assert torch.equal(state["exp_avg_sq"], moments[name][1]), name
    assert clipped
    assert max(rates) > 1e-2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_reference_accumulation_equals_specforges(commit: Oracle, dtype: Any, device: str) -> None:
    """Four updates of two micro-batches each: gradients are added in the compute dtype."""
    case = replace(CASES[0], dtype=dtype)
    objective = case.config().objective
    trainer = reference_trainer(case, 6, 0.3, device)
    frozen = on(device, tiny_frozen(case))
    params = on(device, tiny_params(case))
    draft = specforge_draft(commit, case.draft(), params, frozen)
    optimizer = specforge_optimizer(commit, draft, 6, 0.3)

    for index in range(4):
        batches = [on(device, tiny_unaligned(case, 2 * index + i)) for i in range(2)]
        with eager_loss(commit):
            for batch in batches:
                aligned = batch.aligned(case.steps)
                losses = specforge_forward(commit, draft, frozen, aligned, objective).losses
                (weighted_sum(losses, 0.8) / 2).backward()
        norm = optimizer.step()
        assert torch.equal(trainer.step(batches)["grad_norm"], norm)

    for name, leaf in trainer.draft.trainable().items():
        assert torch.equal(leaf, draft.get_parameter(name)), name
        assert not torch.equal(leaf, params[name]), name

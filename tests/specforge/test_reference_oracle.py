"""The reference equals SpecForge by `torch.equal`, at level 2 (see `eagle3fn.specforge.oracle`); so does the package.

On a card the package is held at level 1: each side computes its loss with its own Triton kernel.
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

from eagle3fn.base.config import OptimizerConfig
from eagle3fn.model.forward import forward_loss
from eagle3fn.model.table import EMBED
from eagle3fn.specforge import arithmetic
from eagle3fn.specforge.cases import for_specforge, specforge_cases
from eagle3fn.specforge.oracle import Oracle, eager_loss, old_draft, old_forward, run_oracle
from eagle3fn.testing.builders import Case, on, tiny_batch, tiny_frozen, tiny_params
from eagle3fn.testing.equivalence import assert_same
from eagle3fn.testing.results import Result, differences, named, nontrivial, run_forward
from tests.tally import Tally
from tests.reference import Trainer, weighted_sum
from tests.reference import model as reference_model
from tests.reference.adapter import reference_draft, run_reference
from tests.factories import GATE

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


def reference(case: Case, device: str = "cpu") -> Result:
    """Everything that is compared, by name; gradients under their leaf's."""
    loss, metrics, gradients = run_reference(case, device)
    return named(loss, metrics, gradients)  # pyright: ignore[reportArgumentType]


def hold(oracle: Oracle, case: Case, device: str = "cpu") -> Result:
    """SpecForge and the reference on one case, compared at level 2; SpecForge's result."""
    return compare(
        lambda c: run_oracle(oracle, c, 2, "sdpa", device),
        lambda c: reference(c, device),
        case,
        "hold",
    )


def hold_package(oracle: Oracle, case: Case, device: str = "cpu") -> Result:
    """SpecForge and the package on one case, compared at level 1 on a card, else at level 2; SpecForge's result."""
    level = 1 if device == "cuda" else 2
    function = arithmetic.forward_loss if level == 1 else forward_loss

    def ours(case: Case) -> Result:
        return run_forward(function, case, device)

    return compare(
        lambda c: run_oracle(oracle, c, level, "sdpa", device), ours, case, "hold_package"
    )


def compare(
    theirs: Callable[[Case], Result], ours: Callable[[Case], Result], case: Case, name: str
) -> Result:
    def repeat(case: Case) -> str:
        lines = ["import tests.conftest", "from tests.specforge.test_reference_oracle import *", ""]
        return "\n".join([*lines, f"{name}(load_oracle(), {case})"])

    old = theirs(case)
    if differences(old, ours(case)):
        assert_same(theirs, ours, case, repeat, can_run=lambda case: for_specforge(case) == case)
    return old


@pytest.mark.parametrize("steps", [1, 3, 7])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"seed{case.seed}")
@pytest.mark.parametrize("loss", ["kl", "lk_alpha", "lk_lambda"])
def test_forward_and_gradients_equal_the_old_tool(
    oracle: Oracle, case: Case, loss: str, dtype: str, steps: int
) -> None:
    case = replace(case, dtype=dtype, steps=steps, loss=loss)
    assert nontrivial(hold(oracle, case))


@pytest.mark.parametrize("side", [hold, hold_package], ids=["reference", "package"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_drawn_cases_equal_the_old_tool(
    oracle: Oracle, dtype: str, side: Callable[..., Result], device: str, tally: Tally
) -> None:
    """SpecForge knows neither a target of another width nor a division by trained rows."""

    @given(specforge_cases(dtype=dtype))
    def check(case: Case) -> None:
        tally.add(case, nontrivial(side(oracle, case, device)))

    check()
    tally.check()


class Products(TorchDispatchMode):
    """Counts the matrix products in here by dtype, and by shape and stride of both sides."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[tuple] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default):
            self.seen[(str(func), *((x.dtype, x.shape, x.stride()) for x in args))] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("side", ["reference", "package"])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("heads", [(1, 1), (2, 1), (2, 2), (4, 2)])
@pytest.mark.parametrize("rows", [(10,), (7, 5)])
def test_products_lie_in_memory_as_specforges(
    oracle: Oracle, side: str, steps: int, heads: tuple[int, int], rows: tuple[int, ...]
) -> None:
    """Forward and backward. A card's bits depend on it: layouts that a CPU does not tell apart differed on one."""
    case = Case(heads=heads, lengths=rows, steps=steps)
    with Products() as theirs:
        run_oracle(oracle, case)
    with Products() as ours:
        reference(case) if side == "reference" else run_forward(forward_loss, case)
    assert theirs.seen and ours.seen == theirs.seen


def test_the_frozen_embedding_has_no_gradient(oracle: Oracle) -> None:
    """On no side; every other leaf has one, that of a tied head's embedding not either."""
    for case in (CASES[0], replace(CASES[0], tied=True)):
        trained = {"loss", "losses", "acceptance", "correct", "rows", *tiny_params(case)}
        assert EMBED not in trained
        sides = run_oracle(oracle, case), reference(case), run_forward(forward_loss, case)
        assert [set(side) for side in sides] == [trained] * 3


def test_a_reordering_is_detected(
    oracle: Oracle, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """The control: a norm that multiplies by its weight before the cast must not pass."""
    case = replace(CASES[0], dtype="bfloat16")

    def cast_last(self: reference_model.RMSNorm, x: Tensor) -> Tensor:
        wide = x.float()
        scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (self.weight * scaled).to(x.dtype)

    old, again = (run_oracle(oracle, case, 2, "sdpa", device) for _ in range(2))
    assert differences(old, again) == []
    monkeypatch.setattr(reference_model.RMSNorm, "forward", cast_last)
    assert "lm_head.weight" in differences(old, reference(case, device))


def test_the_eager_loss_states_the_kernel(oracle: Oracle) -> None:
    """The expression put in for level 2 is the kernel's function: equal to rounding, masked rows included."""
    case = replace(CASES[0], steps=1)
    frozen, batch = tiny_frozen(case), tiny_batch(case)
    draft = old_draft(oracle, case.draft(), tiny_params(case), frozen)
    kernel = old_forward(oracle, draft, frozen, batch, case.config().objective).losses[0]
    with eager_loss(oracle):
        eager = old_forward(oracle, draft, frozen, batch, case.config().objective).losses[0]
    torch.testing.assert_close(kernel, eager, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("warmup_ratio", [0.0, 0.4])
@pytest.mark.parametrize("total", [5, 8])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_updates_equal_the_old_optimizer(
    commit: Oracle, dtype: Any, total: int, warmup_ratio: float, device: str
) -> None:
    """Five updates of parameters, masters, moments, norm and rate; the last ones lie past the end of the schedule."""
    oracle = commit
    case = replace(CASES[0], dtype=dtype)
    choice = OptimizerConfig(
        learning_rate=1e-2,
        warmup_ratio=warmup_ratio,
        schedule="legacy",
        accumulation="legacy",
        max_grad_norm=0.5,
    )
    frozen = on(device, tiny_frozen(case))
    trainer = Trainer(case.config(choice, total), reference_draft(case, device), frozen.target_head)
    draft = old_draft(oracle, case.draft(), on(device, tiny_params(case)), frozen)
    optimizer = oracle.optimizer.BF16Optimizer(
        draft, lr=1e-2, max_grad_norm=0.5, total_steps=total, warmup_ratio=warmup_ratio
    )
    leaves = {name: leaf for name, leaf in draft.named_parameters() if leaf.requires_grad}
    assert list(leaves) == list(trainer.draft.trainable())
    clipped, rates = 0, []
    for index in range(7):
        source = torch.Generator().manual_seed(index)
        scale = 0.02 if index % 2 else 1.0
        gradients = {
            n: (torch.randn(x.shape, generator=source) * scale).to(x) for n, x in leaves.items()
        }
        for name, leaf in leaves.items():
            leaf.grad = gradients[name].clone()
        old_rate = optimizer.get_learning_rate()
        old_norm = optimizer.step()
        norm, rate = trainer.update(
            {name: gradient.float() for name, gradient in gradients.items()}
        )
        clipped += bool(norm > 0.5)
        rates.append(rate)
        assert torch.equal(norm, old_norm)
        assert rate == old_rate
        for (name, leaf), master in zip(leaves.items(), optimizer.fp32_params, strict=True):
            assert torch.equal(master, trainer.masters[name]), name
            assert torch.equal(leaf, trainer.draft.trainable()[name]), name
            state = optimizer.optimizer.state[master]
            first, second = trainer.moments()[name]
            assert torch.equal(state["exp_avg"], first) and torch.equal(
                state["exp_avg_sq"], second
            ), name
    assert clipped and max(rates) > 1e-2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_with_accumulation_equals_the_old_loop(
    commit: Oracle, dtype: Any, device: str
) -> None:
    """Four updates of two micro-batches each: backward, gradients added in the compute dtype, update."""
    oracle = commit
    case = replace(CASES[0], dtype=dtype)
    choice = OptimizerConfig(
        learning_rate=1e-2, warmup_ratio=0.3, schedule="legacy", accumulation="legacy"
    )
    frozen, params = on(device, tiny_frozen(case)), on(device, tiny_params(case))
    trainer = Trainer(case.config(choice, 6), reference_draft(case, device), frozen.target_head)
    draft = old_draft(oracle, case.draft(), params, frozen)
    optimizer = oracle.optimizer.BF16Optimizer(
        draft, lr=1e-2, max_grad_norm=0.5, total_steps=6, warmup_ratio=0.3
    )
    for index in range(4):
        batches = [on(device, tiny_batch(case, 2 * index + i)) for i in range(2)]
        with eager_loss(oracle):
            for batch in batches:
                losses = old_forward(oracle, draft, frozen, batch, case.config().objective).losses
                (weighted_sum(losses, 0.8) / 2).backward()
        norm = optimizer.step()
        assert torch.equal(trainer.step(batches)["grad_norm"], norm)
    moved = 0
    for name, leaf in trainer.draft.trainable().items():
        assert torch.equal(leaf, draft.get_parameter(name)), name
        moved += not torch.equal(leaf, params[name])
    assert moved == len(params)

"""AdamW's operations, which decide its bits on a card, and the schedule's values."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from eagle3fn.base.config import OptimizerConfig
from eagle3fn.base.tree import tree_map
from eagle3fn.train.optimizer import Moments, adamw, cosine_schedule


class ListOperations(TorchDispatchMode):
    """Records the operations on lists of tensors: name, and the arguments that are numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, list]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "_foreach_" in str(func):
            numbers = [part for part in args if not _is_list_of_tensors(part)]
            self.calls.append((str(func), numbers))
        return func(*args, **(kwargs or {}))


def _is_list_of_tensors(value: Any) -> bool:
    return isinstance(value, list) and torch.is_tensor(value[0])


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("donate", [False, True])
def test_adamw_calls_the_list_operations_of_torch_adamw(decay: float, donate: bool) -> None:
    """On CUDA torch's own runs over lists of leaves, where a division is not by a reciprocal."""
    config = OptimizerConfig(learning_rate=1e-2, weight_decay=decay)
    torch.manual_seed(0)
    leaf = torch.randn(6, 4)
    grad = torch.randn(6, 4)

    reference = torch.optim.AdamW([leaf.clone()], lr=1e-2, weight_decay=decay, foreach=True)
    (reference_leaf,) = reference.param_groups[0]["params"]

    zero = {"a": torch.zeros(6, 4)}
    state = Moments(zero, tree_map(torch.clone, zero))
    masters = {"a": leaf.clone()}

    for step in range(3):
        grads = {"a": grad * (step + 1)}
        reference_leaf.grad = grads["a"].clone()
        with ListOperations() as expected:
            reference.step()
        with ListOperations() as found:
            masters, state = adamw(grads, state, masters, step, 1e-2, config, donate)

        assert found.calls == expected.calls[1:]  # the first one counts torch's steps
        assert torch.equal(masters["a"], reference_leaf)
        assert torch.equal(state.nu["a"], reference.state[reference_leaf]["exp_avg_sq"])


def test_cosine_schedule_rises_linearly_and_falls_to_zero():
    """Ten steps, two of them the warm-up: rate(n) = (1 + cos(π · (n - 2) / 8)) / 2 after it."""
    config = OptimizerConfig(learning_rate=1.0, warmup_ratio=0.2)
    rate = cosine_schedule(config, 10)
    assert [rate(0), rate(1), rate(2)] == [0.5, 1.0, 1.0]
    assert rate(6) == pytest.approx(0.5)
    assert rate(10) == rate(99) == 0.0


def test_schedule_steps_replace_the_runs_number_of_steps():
    short = OptimizerConfig(warmup_ratio=0.2, schedule_steps=10)
    whole = OptimizerConfig(warmup_ratio=0.2)
    rates = [cosine_schedule(short, 25)(step) for step in range(25)]
    assert rates == [cosine_schedule(whole, 10)(step) for step in range(25)]

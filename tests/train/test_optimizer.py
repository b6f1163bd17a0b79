"""AdamW's operations: on a card they decide its bits."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from eagle3fn.base.config import OptimizerConfig
from eagle3fn.base.tree import tree_map
from eagle3fn.train.optimizer import Moments, adamw


class Lists(TorchDispatchMode):
    """Notes the operations on lists of tensors: name and numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, list]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "_foreach_" in str(func):
            tensors = [isinstance(part, list) and torch.is_tensor(part[0]) for part in args]
            numbers = [part for part, is_list in zip(args, tensors, strict=True) if not is_list]
            self.calls.append((str(func), numbers))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("donate", [False, True])
def test_adamw_makes_the_operations_that_torchs_adamw_makes_on_cuda(
    decay: float, donate: bool
) -> None:
    """There torch chooses `foreach`, whose division is none by a reciprocal, as a tensor's is."""
    config = OptimizerConfig(learning_rate=1e-2, weight_decay=decay)
    torch.manual_seed(0)
    leaf, grad = torch.randn(6, 4), torch.randn(6, 4)
    theirs = torch.optim.AdamW([leaf.clone()], lr=1e-2, weight_decay=decay, foreach=True)
    (master,) = theirs.param_groups[0]["params"]
    zero = {"a": torch.zeros(6, 4)}
    state, masters = Moments(zero, tree_map(torch.clone, zero)), {"a": leaf.clone()}

    for step in range(3):
        grads = {"a": grad * (step + 1)}
        master.grad = grads["a"].clone()
        with Lists() as expected:
            theirs.step()
        with Lists() as found:
            masters, state = adamw(grads, state, masters, step, 1e-2, config, donate)
        assert found.calls == expected.calls[1:]  # the first counts the step
        assert torch.equal(masters["a"], master)
        assert torch.equal(state.nu["a"], theirs.state[master]["exp_avg_sq"])

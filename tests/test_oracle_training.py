"""The package's `step` equals the old script's own `run_forward` and `run_backward_and_update`, update by update.

Those two functions are read out of the commit's script and run as they stand. On a card each side computes its loss
with its own Triton kernel (level 1); on the CPU `Tensor.cuda` does nothing, and the loss kernel is replaced by its eager
expression (level 2). One rank.
"""

import contextlib
import importlib
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import eagle3fn as e3
from eagle3fn.base.config import OptimizerConfig
from eagle3fn.base.types import Batch, TrainState
from eagle3fn.testing.builders import Case, on, tame_batch, tame_frozen, tame_params
from eagle3fn.testing.oracle import LK, Oracle, eager_loss, old_draft
from eagle3fn.testing.oracle_online import on_cpu, script_functions
from eagle3fn.testing.results import plain_kl
from eagle3fn.testing.strategies import drawn, for_oracle
from tests.conftest import Tally
from tests.small import GATE


class Script(NamedTuple):
    """The old script's functions."""

    run_forward: Callable[..., Any]
    run_backward_and_update: Callable[..., Any]


@pytest.fixture(scope="module")
def script(commit: Oracle) -> Script:
    return Script(**script_functions(commit, *Script._fields))


@contextlib.contextmanager
def old_side(oracle: Oracle, device: str) -> Iterator[None]:
    """What stands in for a card on its side, where there is none."""
    with contextlib.ExitStack() as stack:
        if device != "cuda":
            stack.enter_context(on_cpu())
            stack.enter_context(eager_loss(oracle))
        yield


class OldTrainer:
    """The old script's loop on one rank."""

    def __init__(
        self, oracle: Oracle, script: Script, case: Case, choice: OptimizerConfig, total: int, device: str
    ) -> None:
        self.oracle, self.script, self.device, self.steps = oracle, script, device, 0
        frozen, params = on(device, tame_frozen(case)), on(device, tame_params(case))
        self.draft = old_draft(oracle, case.draft(), params, frozen)
        self.model = oracle.eagle3.OnlineEagle3Model(
            self.draft, length=case.steps, attention_backend="sdpa",
            lk_loss_type=LK[case.loss], kl_scale=case.kl_scale, kl_decay=case.kl_decay,
        )  # fmt: skip
        self.optimizer = oracle.optimizer.BF16Optimizer(
            self.draft, lr=choice.learning_rate, max_grad_norm=choice.max_grad_norm, total_steps=total,
            warmup_ratio=choice.warmup_ratio,
        )  # fmt: skip
        kind = importlib.import_module("specforge.modeling.target.target_head").TargetHead
        self.head = kind.__new__(kind)  # without a checkpoint's configuration
        torch.nn.Module.__init__(self.head)
        self.head.fc = torch.nn.Linear(*frozen.target_head.shape[::-1], bias=False)
        self.head.fc.weight = torch.nn.Parameter(frozen.target_head, requires_grad=False)
        self.case = case

    def micro_step(self, batch: Batch, accumulation: int) -> tuple[Tensor | None, list[Tensor]]:
        """The norm, where this micro-batch ends an update, and the steps' losses."""
        self.steps += 1
        compact = self.case.teacher == "compact"
        args = Namespace(
            is_vlm=False, target_model_backend="hf", compact_teacher=compact, draft_accumulation_steps=accumulation,
            compact_teacher_chunk_size=self.case.chunk,
        )  # fmt: skip
        data = {
            "input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "loss_mask": batch.loss_mask,
            "hidden_state": batch.aux_hidden, "target": batch.last_hidden,
        }  # fmt: skip
        data |= {} if batch.position_ids is None else {"position_ids": batch.position_ids}
        with old_side(self.oracle, self.device):
            losses = self.script.run_forward(args, self.model, data, self.head, is_online=False)[0]
            norm = self.script.run_backward_and_update(args, losses, self.optimizer, self.steps)
        return norm, losses

    def state(self) -> dict[str, tuple[Tensor, ...]]:
        """Weight, master and both moments of every trained leaf."""
        names = [name for name, leaf in self.draft.named_parameters() if leaf.requires_grad]
        moments = self.optimizer.optimizer.state
        rows = zip(names, self.optimizer.model_params, self.optimizer.fp32_params, strict=True)
        return {name: (leaf, m, moments[m]["exp_avg"], moments[m]["exp_avg_sq"]) for name, leaf, m in rows}


def same_state(state: TrainState, old: dict[str, tuple[Tensor, ...]]) -> bool:
    assert list(state.params) == list(old)
    ours = {name: (state.params[name], state.masters[name], state.opt.mu[name], state.opt.nu[name]) for name in old}
    return all(
        torch.equal(a, b) and a.dtype == b.dtype for name in old for a, b in zip(ours[name], old[name], strict=True)
    )


def train_both(
    oracle: Oracle, script: Script, case: Case, choice: OptimizerConfig, total: int, micro: int, device: str = "cpu"
) -> bool:
    """Five updates on both sides, the last past the schedule's end if `total` is 4; True if every leaf has moved."""
    config, params = case.config(choice, total), on(device, tame_params(case))
    fns = e3.bind(config, on(device, tame_frozen(case)))
    old = OldTrainer(oracle, script, case, choice, total, device)
    state = fns.init_state(params)
    for index in range(5):
        batches = tuple(on(device, tame_batch(case, index * micro + i)) for i in range(micro))
        rate = old.optimizer.get_learning_rate()
        with contextlib.nullcontext() if device == "cuda" else plain_kl():
            state, metrics = fns.step(state, batches)
        norm, summed = None, None
        for batch in batches:
            norm, losses = old.micro_step(batch, micro)
            steps = torch.stack([loss.detach() for loss in losses]) / micro
            summed = steps if summed is None else summed + steps
        assert norm is not None and torch.equal(metrics["grad_norm"], norm), index
        assert metrics["learning_rate"] == rate, index
        assert summed is not None and torch.equal(metrics["aux"].losses, summed), index
        assert same_state(state, old.state()), index
    return all(not torch.equal(state.masters[name], params[name].float()) for name in params)


@pytest.mark.parametrize("micro", [1, 2, 3])
def test_drawn_training_equals_the_old_script(
    commit: Oracle, script: Script, micro: int, device: str, tally: Tally
) -> None:
    """Fifteen drawn cases each; losses by acceptance with one micro-batch alone, as ours has them."""
    for index, drawn_case in enumerate(drawn(15, micro)):
        case = for_oracle(drawn_case if micro == 1 else replace(drawn_case, loss="kl"))
        choice = OptimizerConfig(
            learning_rate=(3e-3, 1e-2)[index % 2], warmup_ratio=(0.0, 0.3, 0.015)[index % 3],
            max_grad_norm=(0.5, 5.0)[index % 2], schedule="legacy", accumulation="legacy",
        )  # fmt: skip
        tally.add(case, train_both(commit, script, case, choice, (4, 10, 17)[index % 3], micro, device))
    tally.check()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_old_gates_own_shapes(commit: Oracle, script: Script, dtype: Any, device: str) -> None:
    choice = OptimizerConfig(learning_rate=1e-2, schedule="legacy", accumulation="legacy")
    assert train_both(commit, script, replace(GATE, dtype=dtype), choice, 10, 2, device)


def test_a_better_setting_is_told_apart(commit: Oracle, script: Script, device: str) -> None:
    """The control: the closed-form schedule and sums in fp32 are not the old script's."""
    for change in ({"schedule": "cosine"}, {"accumulation": "fp32"}):
        choice = replace(OptimizerConfig(schedule="legacy", accumulation="legacy"), **change)
        with pytest.raises(AssertionError):
            train_both(commit, script, GATE, choice, 10, 2, device)

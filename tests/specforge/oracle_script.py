"""SpecForge's training script on stored features: its own `run_forward` and `run_backward_and_update`, one rank.

The two functions are read out of the commit's script and run as they stand. Where no card is, `Tensor.cuda` does
nothing; at level 2 the loss kernel is replaced by its eager expression.
"""

import contextlib
import importlib
from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

import eagle3fn as e3
from eagle3fn.base.config import OptimizerConfig
from eagle3fn.base.types import Batch
from eagle3fn.model import forward as forward_file
from eagle3fn.model.forward import Operations
from eagle3fn.specforge.oracle import LK, Oracle, eager_loss, old_draft
from eagle3fn.testing.builders import Case, on, tiny_batch, tiny_frozen, tiny_params
from eagle3fn.testing.results import Result, run_forward
from tests.specforge.oracle_online import on_cpu, script_functions

ONE = OptimizerConfig(
    learning_rate=1e-2, warmup_ratio=0.0, schedule="legacy", accumulation="legacy"
)
UPDATES = 10  # what the schedule spans
PARTS = ("weight", "master", "mu", "nu")


class Script(NamedTuple):
    """The script's functions."""

    run_forward: Callable[..., Any]
    run_backward_and_update: Callable[..., Any]


def load_script(oracle: Oracle) -> Script:
    """The functions of the commit's script.

    Raises:
        OracleMissingError: its file is not there, or other bytes are.
    """
    return Script(**script_functions(oracle, *Script._fields))


class Seen(NamedTuple):
    """One micro-batch: what `run_forward` returned, and the norm where it ended an update."""

    losses: list[Tensor]
    acceptance: list[Tensor]
    correct: list[Tensor]
    rows: list[Tensor]
    gradients: dict[str, Tensor]  # before the clip; empty where no update ended
    norm: Tensor | None


class ScriptTrainer:
    """The script's model, target head and optimizer on a case; `micro_step` is the body of its loop."""

    def __init__(
        self, oracle: Oracle, script: Script, case: Case, choice: OptimizerConfig, total: int, device: str = "cpu",
        attention: str = "sdpa", level: Literal[1, 2] = 2,
    ) -> None:  # fmt: skip
        self.oracle, self.script, self.case, self.level, self.steps = oracle, script, case, level, 0
        self.on_card = device == "cuda"
        frozen, params = on(device, tiny_frozen(case)), on(device, tiny_params(case))
        self.draft = old_draft(oracle, case.draft(), params, frozen, attention)
        self.model = oracle.eagle3.OnlineEagle3Model(
            self.draft, length=case.steps, attention_backend=attention,
            lk_loss_type=LK[case.loss], kl_scale=case.kl_scale, kl_decay=case.kl_decay,
        )  # fmt: skip
        self.optimizer = oracle.optimizer.BF16Optimizer(
            self.draft, lr=choice.learning_rate, max_grad_norm=choice.max_grad_norm, total_steps=total,
            warmup_ratio=choice.warmup_ratio,
        )  # fmt: skip
        self.head = _target_head(frozen.target_head)

    @contextlib.contextmanager
    def _replaced(self) -> Iterator[None]:
        """What stands in for a card, and at level 2 for the loss kernel."""
        with contextlib.ExitStack() as stack:
            if not self.on_card:
                stack.enter_context(on_cpu())
            if self.level == 2:
                stack.enter_context(eager_loss(self.oracle))
            yield

    def micro_step(self, batch: Batch, accumulation: int = 1) -> Seen:
        """One micro-batch; the last of `accumulation` ends an update."""
        self.steps += 1
        args = Namespace(
            is_vlm=False, target_model_backend="hf", compact_teacher=self.case.teacher == "compact",
            draft_accumulation_steps=accumulation, compact_teacher_chunk_size=self.case.chunk,
        )  # fmt: skip
        data = {
            "input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "loss_mask": batch.row_mask,
            "hidden_state": batch.aux_hidden, "target": batch.last_hidden,
        }  # fmt: skip
        if batch.position_ids is not None:
            data["position_ids"] = batch.position_ids
        watched = _Watched(self.optimizer)
        with self._replaced():
            lists = self.script.run_forward(args, self.model, data, self.head, is_online=False)
            norm = self.script.run_backward_and_update(args, lists[0], watched, self.steps)
        return Seen(lists[0], lists[2], lists[3], lists[4], watched.gradients, norm)

    def state(self) -> dict[str, tuple[Tensor, ...]]:
        """Weight, master and both moments of every trained leaf."""
        moments = self.optimizer.optimizer.state
        rows = zip(
            _trained(self.draft),
            self.optimizer.model_params,
            self.optimizer.fp32_params,
            strict=True,
        )
        return {
            name: (leaf, m, moments[m]["exp_avg"], moments[m]["exp_avg_sq"])
            for name, leaf, m in rows
        }


class _Watched:
    """SpecForge's optimizer, whose gradients are noted before it steps: it drops them."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer, self.gradients = optimizer, dict[str, Tensor]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.optimizer, name)

    def step(self) -> Any:
        """Note the gradients, then step."""
        names = _trained(self.optimizer.model)
        self.gradients = {
            name: leaf.grad.clone()
            for name, leaf in zip(names, self.optimizer.model_params, strict=True)
        }
        return self.optimizer.step()


def _trained(draft: torch.nn.Module) -> list[str]:
    return [name for name, leaf in draft.named_parameters() if leaf.requires_grad]


def _target_head(weight: Tensor) -> Any:
    """SpecForge's target head around our tensor; it is made without a checkpoint's configuration."""
    kind = importlib.import_module("specforge.modeling.target.target_head").TargetHead
    head = kind.__new__(kind)
    torch.nn.Module.__init__(head)
    head.fc = torch.nn.Linear(1, 1, bias=False)
    head.fc.weight = torch.nn.Parameter(weight, requires_grad=False)
    return head


def run_script(
    oracle: Oracle,
    case: Case,
    level: Literal[1, 2] = 2,
    attention: str = "sdpa",
    device: str = "cpu",
) -> Result:
    """`testing.oracle.run_oracle` by the script's own functions, and the update's outcome.

    Beside loss, metrics and gradients: `grad_norm`, and `weight.`, `master.`, `mu.` and `nu.` of every leaf.
    """
    trainer = ScriptTrainer(
        oracle, load_script(oracle), case, ONE, UPDATES, device, attention, level
    )
    seen = trainer.micro_step(on(device, tiny_batch(case)))
    assert seen.norm is not None
    decay, start = case.config().objective.decay, torch.zeros((), device=device)
    result = {
        "loss": sum(
            (decay**i * value.detach() for i, value in enumerate(seen.losses)), start=start
        ),
        "losses": torch.stack([value.detach() for value in seen.losses]),
        "acceptance": torch.stack(seen.acceptance),
        "correct": torch.stack(seen.correct),
        "rows": torch.stack(seen.rows),
        "grad_norm": seen.norm,
    }
    return result | seen.gradients | _flat(trainer.state())


def run_step(operations: Callable[..., Operations], case: Case, device: str = "cpu") -> Result:
    """What `run_script` gives, from our `forward_loss` and `step` under the legacy numerics with these operations."""
    config, params = case.config(ONE, UPDATES), on(device, tiny_params(case))
    fns = e3.bind(config, on(device, tiny_frozen(case)))
    chosen = forward_file.legacy_operations
    forward_file.legacy_operations = operations
    try:
        result = run_forward(e3.forward_loss, case, device)
        after, metrics = fns.step(fns.init_state(params), on(device, tiny_batch(case)))
    finally:
        forward_file.legacy_operations = chosen
    state = {
        name: (after.params[name], after.masters[name], after.opt.mu[name], after.opt.nu[name])
        for name in params
    }
    return result | {"grad_norm": metrics["grad_norm"]} | _flat(state)


def _flat(state: dict[str, tuple[Tensor, ...]]) -> Result:
    return {
        f"{part}.{name}": value.detach().clone()
        for name, parts in state.items()
        for part, value in zip(PARTS, parts, strict=True)
    }

"""SpecForge's training script on stored features, one rank.

Its own `run_forward` and `run_backward_and_update` are read out of the commit's script and run as
they are. Without a card `Tensor.cuda` does nothing; at level 2 the loss kernel is replaced by its
eager expression.
"""

import contextlib
import importlib
from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

import eagle3fn as e3
from eagle3fn import specforge
from eagle3fn.base.sections import OptimizerConfig
from eagle3fn.base.types import Batch, Frozen, TrainState
from eagle3fn.specforge.oracle import LK, Oracle, eager_loss, specforge_draft, unaligned
from eagle3fn.testing.builders import Case, on, tiny_batch, tiny_frozen, tiny_params
from eagle3fn.testing.results import ForwardLoss, Result, run_forward
from tests.specforge.oracle_online import on_cpu, script_functions

ONE_UPDATE = OptimizerConfig(learning_rate=1e-2, warmup_ratio=0.0, accumulation="params")
"""The optimizer of `run_script` and `run_step`."""

UPDATES = 10
"""How many updates its schedule spans."""


class Script(NamedTuple):
    """The script's functions."""

    run_forward: Callable[..., Any]
    run_backward_and_update: Callable[..., Any]


def load_script(oracle: Oracle) -> Script:
    """The functions of the commit's script.

    Raises:
        OracleMissingError: its file is not there, or has other bytes.
    """
    return Script(**script_functions(oracle, *Script._fields))


class Seen(NamedTuple):
    """One micro-batch: what `run_forward` returned, and what an update began with if one ended."""

    losses: list[Tensor]  # a scalar a step
    acceptance: list[Tensor]
    correct: list[Tensor]
    rows: list[Tensor]
    gradients: dict[str, Tensor]  # before the clip; empty where no update ended
    norm: Tensor | None


class LeafState(NamedTuple):
    """What an update changes of one trained leaf."""

    weight: Tensor
    master: Tensor
    mu: Tensor
    nu: Tensor


class ScriptTrainer:
    """The script's model, target head and optimizer on a case; `micro_step` is its loop's body."""

    def __init__(
        self,
        oracle: Oracle,
        script: Script,
        case: Case,
        choice: OptimizerConfig,
        total: int,
        device: str = "cpu",
        attention: str = "sdpa",
        level: Literal[1, 2] = 2,
        frozen: Frozen | None = None,  # the case's own
    ) -> None:
        self.oracle = oracle
        self.script = script
        self.case = case
        self.level = level
        self.on_card = device == "cuda"
        self.steps = 0

        held: Frozen = on(device, frozen or tiny_frozen(case))
        params = on(device, tiny_params(case))
        self.draft = specforge_draft(oracle, case.draft(), params, held, attention)
        self.model = oracle.eagle3.OnlineEagle3Model(
            self.draft,
            length=case.steps,
            attention_backend=attention,
            lk_loss_type=LK[str(case.loss)],
            kl_scale=case.kl_scale,
            kl_decay=case.kl_decay,
        )
        self.optimizer = oracle.optimizer.BF16Optimizer(
            self.draft,
            lr=choice.learning_rate,
            max_grad_norm=choice.max_grad_norm,
            total_steps=total,
            warmup_ratio=choice.warmup_ratio,
        )
        self.head = _target_head(held.target_head)

    @contextlib.contextmanager
    def _replaced(self) -> Iterator[None]:
        """What replaces a card, and at level 2 the loss kernel, on SpecForge's side."""
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
            is_vlm=False,
            target_model_backend="hf",
            compact_teacher=self.case.teacher == "compact",
            compact_teacher_chunk_size=self.case.chunk,
            draft_accumulation_steps=accumulation,
        )
        data = {
            **unaligned(batch)._asdict(),
            "attention_mask": batch.attention_mask,
            "hidden_state": batch.aux_hidden,
        }
        if batch.position_ids is not None:
            data["position_ids"] = batch.position_ids

        watched = _Watched(self.optimizer)
        with self._replaced():
            lists = self.script.run_forward(args, self.model, data, self.head, is_online=False)
            losses, _, acceptance, correct, rows, *_ = lists
            norm = self.script.run_backward_and_update(args, losses, watched, self.steps)
        return Seen(losses, acceptance, correct, rows, watched.gradients, norm)

    def state(self) -> dict[str, LeafState]:
        """Of every trained leaf, by name."""
        moments = self.optimizer.optimizer.state
        leaves = zip(
            _trained(self.draft),
            self.optimizer.model_params,
            self.optimizer.fp32_params,
            strict=True,
        )
        found = {}
        for name, weight, master in leaves:
            moment = moments[master]
            found[name] = LeafState(weight, master, moment["exp_avg"], moment["exp_avg_sq"])
        return found


class _Watched:
    """SpecForge's optimizer; its gradients are copied before it steps, as it drops them."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        self.gradients: dict[str, Tensor] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.optimizer, name)

    def step(self) -> Any:
        """Copy the gradients, then step."""
        names = _trained(self.optimizer.model)
        for name, leaf in zip(names, self.optimizer.model_params, strict=True):
            self.gradients[name] = leaf.grad.clone()
        return self.optimizer.step()


def _trained(draft: torch.nn.Module) -> list[str]:
    return [name for name, leaf in draft.named_parameters() if leaf.requires_grad]


def _target_head(weight: Tensor) -> Any:
    """SpecForge's target head around our tensor; made without a checkpoint's configuration."""
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
    """`specforge.oracle.run_oracle` by the script's own functions, and the update's outcome.

    Besides loss, metrics and gradients: `grad_norm`, and `weight.`, `master.`, `mu.` and `nu.` of
    every leaf.
    """
    script = load_script(oracle)
    trainer = ScriptTrainer(oracle, script, case, ONE_UPDATE, UPDATES, device, attention, level)
    seen = trainer.micro_step(on(device, tiny_batch(case)))
    assert seen.norm is not None

    decay = case.config().objective.decay
    loss = torch.zeros((), device=device)
    for step, value in enumerate(seen.losses):
        loss = loss + decay**step * value.detach()

    result = {
        "loss": loss,
        "losses": torch.stack([value.detach() for value in seen.losses]),
        "acceptance": torch.stack(seen.acceptance),
        "correct": torch.stack(seen.correct),
        "rows": torch.stack(seen.rows),
        "grad_norm": seen.norm,
    }
    return result | seen.gradients | _flat(trainer.state())


def run_step(loss: ForwardLoss, case: Case, device: str = "cpu") -> Result:
    """What `run_script` returns, from our `step` by SpecForge's recipe with another `loss`."""
    config = case.config(ONE_UPDATE, UPDATES)
    params = on(device, tiny_params(case))
    recipe = specforge.RECIPE._replace(loss=loss)
    functions = e3.bind(config, on(device, tiny_frozen(case)), recipe=recipe)

    result = run_forward(loss, case, device)
    before = functions.init_state(params)
    after, metrics = functions.step(before, on(device, tiny_batch(case)))
    return result | {"grad_norm": metrics["grad_norm"]} | _flat(leaf_states(after))


def leaf_states(state: TrainState) -> dict[str, LeafState]:
    """Our state as `ScriptTrainer.state` has it."""
    found = {}
    for name, weight in state.params.items():
        found[name] = LeafState(weight, state.masters[name], state.opt.mu[name], state.opt.nu[name])
    return found


def _flat(states: dict[str, LeafState]) -> Result:
    found = {}
    for name, state in states.items():
        for part, value in state._asdict().items():
            found[f"{part}.{name}"] = value.detach().clone()
    return found

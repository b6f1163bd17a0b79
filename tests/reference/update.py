"""fp32 masters, clip, AdamW and the two learning-rate schedules, all from torch's own optimizer classes."""

import math
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR

from eagle3fn.base.config import Config
from eagle3fn.base.types import Batch
from tests.reference.model import Draft, at_least_fp32
from tests.reference.objective import Metrics, forward, weighted_sum


class RecursiveCosine:
    """Linear warm-up, then torch's recursive cosine, taken over with one extra `get_lr` at the hand-over.

    The cosine is no longer new by then, so the call lifts its whole phase by `2 / (1 + cos(pi / T))`, also
    without a warm-up.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, base: float, total: int, warmup: int
    ) -> None:
        self.group, self.base, self.warmup, self.count = optimizer.param_groups[0], base, warmup, 0
        self.cosine = CosineAnnealingLR(optimizer, total - warmup)
        self.set_rate()

    def set_rate(self) -> None:
        if self.count < self.warmup:
            self.group["lr"] = (self.count + 1) / self.warmup * self.base
        elif self.count == self.warmup:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.group["lr"] = self.cosine.get_lr()[0]
        else:
            self.cosine.step()

    def step(self) -> None:
        self.count += 1
        self.set_rate()


class ClosedCosine:
    """Linear warm-up, then `base * (1 + cos(pi * t / T)) / 2`, zero after the end."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, base: float, total: int, warmup: int
    ) -> None:
        self.group, self.base, self.total, self.warmup, self.count = (
            optimizer.param_groups[0],
            base,
            total,
            warmup,
            0,
        )
        self.set_rate()

    def set_rate(self) -> None:
        if self.count < self.warmup:
            rate = (self.count + 1) / self.warmup * self.base
        elif self.count >= self.total:
            rate = 0.0
        else:
            turn = math.pi * (self.count - self.warmup) / (self.total - self.warmup)
            rate = self.base * 0.5 * (1 + math.cos(turn))
        self.group["lr"] = rate

    def step(self) -> None:
        self.count += 1
        self.set_rate()


class Trainer:
    """One rank: micro-batches through `.backward()`, then one update of the masters and the draft's leaves."""

    def __init__(
        self, config: Config, draft: Draft, head: Tensor, recursive_schedule: bool = False
    ) -> None:
        choice = config.optimizer
        self.config, self.draft, self.head = config, draft, head
        self.masters = {
            name: at_least_fp32(leaf.detach()).clone() for name, leaf in draft.trainable().items()
        }
        self.optimizer = torch.optim.AdamW(
            list(self.masters.values()),
            lr=choice.learning_rate,
            betas=(choice.beta1, choice.beta2),
            eps=choice.eps,
            weight_decay=choice.weight_decay,
        )
        schedule = RecursiveCosine if recursive_schedule else ClosedCosine
        warmup = int(choice.warmup_ratio * config.train.steps)
        self.schedule = schedule(self.optimizer, choice.learning_rate, config.train.steps, warmup)

    def gradients(
        self, micro_batches: list[Batch]
    ) -> tuple[Tensor, list[Metrics], dict[str, Tensor]]:
        """Loss, metrics per micro-batch, gradients added in the compute dtype ("params") or in fp32."""
        objective, total, seen = self.config.objective, torch.zeros((), device=self.head.device), []
        leaves = self.draft.trainable()
        summed: dict[str, Tensor] = {}
        for batch in micro_batches:
            losses, metrics = forward(self.draft, self.head, batch, objective)
            loss = weighted_sum(losses, objective.decay)
            if objective.normalization == "rows":
                loss = loss / len(micro_batches)
            loss.backward()
            total = total + loss.detach()
            seen.append(metrics)
            if self.config.optimizer.accumulation == "fp32":
                for name, leaf in leaves.items():
                    assert leaf.grad is not None, name
                    gradient = at_least_fp32(leaf.grad)
                    summed[name] = summed[name] + gradient if name in summed else gradient
                    leaf.grad = None
        if self.config.optimizer.accumulation == "params":
            for name, leaf in leaves.items():
                assert leaf.grad is not None, name
                summed[name] = at_least_fp32(leaf.grad.detach())
                leaf.grad = None
        return total, seen, summed

    def update(self, gradients: dict[str, Tensor]) -> tuple[Tensor, float]:
        """Clip, AdamW, schedule, cast back; returns the norm before the clip and the rate that was applied."""
        for name, master in self.masters.items():
            master.grad = gradients[name].clone()
        norm = torch.nn.utils.clip_grad_norm_(
            self.masters.values(), self.config.optimizer.max_grad_norm
        )
        rate = float(self.optimizer.param_groups[0]["lr"])
        self.optimizer.step()
        self.schedule.step()
        with torch.no_grad():
            for name, leaf in self.draft.trainable().items():
                leaf.copy_(self.masters[name])
        return norm, rate

    def step(self, micro_batches: list[Batch]) -> dict[str, Any]:
        loss, seen, gradients = self.gradients(micro_batches)
        norm, rate = self.update(gradients)
        return {"loss": loss, "grad_norm": norm, "learning_rate": rate, "metrics": seen}

    def moments(self) -> dict[str, tuple[Tensor, Tensor]]:
        """AdamW's first and second moment per leaf."""
        state = self.optimizer.state
        return {
            name: (state[leaf]["exp_avg"], state[leaf]["exp_avg_sq"])
            for name, leaf in self.masters.items()
        }

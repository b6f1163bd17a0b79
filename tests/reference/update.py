"""Gradients and the update: fp32 masters, clip, AdamW and two schedules, by torch's own classes."""

import math
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR

from eagle3fn.base.config import Config
from eagle3fn.testing.builders import Unaligned
from tests.reference.model import Draft, at_least_fp32
from tests.reference.objective import Metrics, forward, weighted_sum


class RecursiveCosine:
    """Linear warm-up over `W` steps, then torch's recursive cosine, as SpecForge enters it.

    At the hand-over SpecForge calls `get_lr` once more. The cosine is not new by then, so that the
    call lifts its whole phase by `2 / (1 + cos(π / T))`, also without a warm-up.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, base: float, total: int, warmup: int
    ) -> None:
        self.group = optimizer.param_groups[0]
        self.base = base
        self.warmup = warmup
        self.count = 0
        self.cosine = CosineAnnealingLR(optimizer, total - warmup)
        self.set_rate()

    def set_rate(self) -> None:
        """Set the rate of the update number `count`."""
        if self.count < self.warmup:
            self.group["lr"] = (self.count + 1) / self.warmup * self.base
        elif self.count == self.warmup:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.group["lr"] = self.cosine.get_lr()[0]
        else:
            self.cosine.step()

    def step(self) -> None:
        """Go on to the next update."""
        self.count += 1
        self.set_rate()


class ClosedCosine:
    """Linear warm-up over `W` steps, then a cosine to zero at step `T`, by their formulas.

    `rate(n) = (n + 1) / W · base` for `n < W`; then `base · (1 + cos(π · (n - W) / (T - W))) / 2`;
    zero from `T` on.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, base: float, total: int, warmup: int
    ) -> None:
        self.group = optimizer.param_groups[0]
        self.base = base
        self.total = total
        self.warmup = warmup
        self.count = 0
        self.set_rate()

    def set_rate(self) -> None:
        """Set the rate of the update number `count`."""
        if self.count < self.warmup:
            rate = (self.count + 1) / self.warmup * self.base
        elif self.count >= self.total:
            rate = 0.0
        else:
            phase = math.pi * (self.count - self.warmup) / (self.total - self.warmup)
            rate = self.base * 0.5 * (1 + math.cos(phase))
        self.group["lr"] = rate

    def step(self) -> None:
        """Go on to the next update."""
        self.count += 1
        self.set_rate()


class Trainer:
    """One rank: micro-batches through `.backward()`, then one update of masters and draft."""

    def __init__(
        self, config: Config, draft: Draft, head: Tensor, recursive_schedule: bool = False
    ) -> None:
        self.config = config
        self.draft = draft
        self.head = head
        self.masters = {}
        for name, leaf in draft.trainable().items():
            self.masters[name] = at_least_fp32(leaf.detach()).clone()

        choice = config.optimizer
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
        self, micro_batches: list[Unaligned]
    ) -> tuple[Tensor, list[Metrics], dict[str, Tensor]]:
        """Loss, metrics of each micro-batch, and gradients summed over them.

        Under `accumulation = "fp32"` each gradient is cast up and then added; under "params" torch
        adds them in the parameters' dtype, and the sum is cast up.
        """
        objective = self.config.objective
        casts_first = self.config.optimizer.accumulation == "fp32"
        leaves = self.draft.trainable()
        total = torch.zeros((), device=self.head.device)
        seen = []
        summed: dict[str, Tensor] = {}
        for batch in micro_batches:
            losses, metrics = forward(self.draft, self.head, batch, objective)
            loss = weighted_sum(losses, objective.decay)
            if objective.normalization == "rows":
                loss = loss / len(micro_batches)
            loss.backward()
            total = total + loss.detach()
            seen.append(metrics)

            if casts_first:
                for name, gradient in self._take_gradients().items():
                    summed[name] = summed[name] + gradient if name in summed else gradient
        if not casts_first:
            summed = self._take_gradients()
        assert list(summed) == list(leaves)
        return total, seen, summed

    def _take_gradients(self) -> dict[str, Tensor]:
        """The leaves' gradients in at least fp32; the leaves are left without one."""
        taken = {}
        for name, leaf in self.draft.trainable().items():
            assert leaf.grad is not None, name
            taken[name] = at_least_fp32(leaf.grad.detach())
            leaf.grad = None
        return taken

    def update(self, gradients: dict[str, Tensor]) -> tuple[Tensor, float]:
        """Clip, AdamW, cast the masters down into the draft, and go on in the schedule.

        Returns:
            The gradients' norm before the clip, and the rate that was applied.
        """
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

    def step(self, micro_batches: list[Unaligned]) -> dict[str, Any]:
        """One update: its loss, gradient norm, learning rate, and the micro-batches' metrics."""
        loss, seen, gradients = self.gradients(micro_batches)
        norm, rate = self.update(gradients)
        return {"loss": loss, "grad_norm": norm, "learning_rate": rate, "metrics": seen}

    def moments(self) -> dict[str, tuple[Tensor, Tensor]]:
        """AdamW's first and second moment of each leaf."""
        found = {}
        for name, master in self.masters.items():
            state = self.optimizer.state[master]
            found[name] = (state["exp_avg"], state["exp_avg_sq"])
        return found

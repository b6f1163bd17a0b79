"""Optimizers as `(init, update)` pairs of pure functions, and schedules as functions of the step."""

# pyright: reportPrivateImportUsage=false
# torch names its operations on lists, `_foreach_…`, as private.

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eagle3fn.base.config import OptimizerConfig
from eagle3fn.base.errors import UserError
from eagle3fn.base.types import Params

Schedule = Callable[[int], float]

_BLOCK_BYTES = (
    16 << 20
)  # of a leaf that is updated in place at once: what lies beside it is no larger


class Optimizer(NamedTuple):
    """`init(masters) → state`; `update(grads, norm, state, masters, step) → (masters, state, info)`, all fp32.

    `norm` is the global one, of which a sharded leaf's own rank knows only a part. `update(…, donate=True)` writes into
    the given gradients, masters and state; the bits are the same.
    """

    init: Callable[[Params], Any]
    update: Callable[..., tuple[Params, Any, dict[str, Any]]]


class Moments(NamedTuple):
    """AdamW's running means of gradients and of squared gradients."""

    mu: Params
    nu: Params


@lru_cache(maxsize=16)
def make_optimizer(config: OptimizerConfig, total_steps: int) -> Optimizer:
    """Clip by the global norm, then AdamW at the schedule's rate.

    Raises:
        UserError: `total_steps` is below 1.
    """
    schedule = make_schedule(config, total_steps)

    def init(masters: Params) -> Moments:
        return Moments(*({k: torch.zeros_like(v) for k, v in masters.items()} for _ in range(2)))

    def update(
        grads: Params,
        norm: Tensor,
        state: Moments,
        masters: Params,
        step: int,
        donate: bool = False,
    ):
        grads = clip(grads, norm, config.max_grad_norm, donate)
        rate = schedule(step)
        masters, state = adamw(grads, state, masters, step, rate, config, donate)
        return masters, state, {"grad_norm": norm, "learning_rate": rate}

    return Optimizer(init, update)


def clip(grads: Params, norm: Tensor, max_norm: float, donate: bool = False) -> Params:
    """Scale gradients, whose global norm is `norm`, by `max_norm / (norm + 1e-6)`, at most 1; `donate`: in place."""
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    return {
        name: torch.mul(grad, scale, out=grad if donate else None) for name, grad in grads.items()
    }


def adamw(
    grads: Params,
    state: Moments,
    masters: Params,
    step: int,
    rate: float,
    config: OptimizerConfig,
    donate: bool = False,
) -> tuple[Params, Moments]:
    """One AdamW update (arXiv 1711.05101); `step` counts from 0. The bits of `torch.optim.AdamW` on every device.

    On CUDA that one runs over lists of leaves, and a list divided by a number is a true division, where a tensor is
    multiplied by the reciprocal: so the operations on lists are used, with one leaf each. On a CPU both are the same.
    """
    beta1, beta2 = config.beta1, config.beta2
    size = rate / (1 - beta1 ** (step + 1))
    root = (1 - beta2 ** (step + 1)) ** 0.5
    decay = 1 - rate * config.weight_decay

    def update(g: Tensor, m: Tensor, v: Tensor, master: Tensor) -> None:
        if config.weight_decay:
            torch._foreach_mul_([master], decay)
        torch._foreach_lerp_([m], [g], 1 - beta1)
        torch._foreach_mul_([v], beta2)
        torch._foreach_addcmul_([v], [g], [g], 1 - beta2)
        bottom = torch._foreach_sqrt([v])
        torch._foreach_div_(bottom, [root])
        torch._foreach_add_(bottom, config.eps)
        torch._foreach_addcdiv_([master], [m], bottom, [-size])

    if donate:
        for k, g in grads.items():
            rows = max(1, _BLOCK_BYTES * len(g) // g.nbytes) if g.numel() else 1
            for part in zip(
                *(x.split(rows) for x in (g, state.mu[k], state.nu[k], masters[k])), strict=True
            ):
                update(*part)
        return masters, state
    mu, nu, after = (
        {k: v.clone() for k, v in tree.items()} for tree in (state.mu, state.nu, masters)
    )
    for k, g in grads.items():
        update(g, mu[k], nu[k], after[k])
    return after, Moments(mu, nu)


def make_schedule(config: OptimizerConfig, total_steps: int) -> Schedule:
    """Linear warm-up over `int(warmup_ratio · total)` steps, then cosine to 0; `total` is `horizon` where that is set.

    "cosine" is the closed form, 0 from `total_steps` on. "legacy" is the old tool's recursion, which lies
    `2 / (1 + cos(π/T))` above it, `T` the steps behind the warm-up, and rises again past the end.

    Raises:
        UserError: `total_steps` is below 1.
    """
    if total_steps < 1:
        raise UserError(f"train.steps = {total_steps}: the schedule needs at least 1 step")
    total_steps = config.horizon or total_steps
    warmup = int(config.warmup_ratio * total_steps)
    base, span = config.learning_rate, total_steps - warmup
    if config.schedule == "legacy":
        return _legacy_schedule(base, warmup, span)

    def rate(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup * base
        return base * 0.5 * (1 + math.cos(math.pi * min((step - warmup) / span, 1.0)))

    return rate


def _legacy_schedule(base: float, warmup: int, span: int) -> Schedule:
    """`CosineAnnealingLR`'s recursion, entered at epoch 0 behind the warm-up; values are kept, so a call is cheap."""
    rates = [(n + 1) / warmup * base for n in range(warmup)]

    def rate(step: int) -> float:
        while len(rates) <= step:
            rates.append(_recursion(rates[-1] if rates else base, len(rates) - warmup, base, span))
        return rates[step]

    return rate


def _recursion(rate: float, epoch: int, base: float, span: int) -> float:
    if (epoch - 1 - span) % (2 * span) == 0:
        return rate + base * (1 - math.cos(math.pi / span)) / 2
    return (
        (1 + math.cos(math.pi * epoch / span)) / (1 + math.cos(math.pi * (epoch - 1) / span)) * rate
    )

"""Optimizers as `(init, update)` pairs of pure functions; schedules as functions of the step."""

# pyright: reportPrivateImportUsage=false
# torch names its operations on lists, `_foreach_…`, as private.

import math
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eagle3fn.base.config import OptimizerConfig
from eagle3fn.base.errors import UserError
from eagle3fn.base.types import Params

Schedule = Callable[[int], float]
"""The learning rate of an update, counted from 0."""

MakeSchedule = Callable[[OptimizerConfig, int], Schedule]
"""As `cosine_schedule`: settings and the run's number of steps → its schedule."""

_BLOCK_BYTES = 16 << 20  # of a leaf, updated in place at once


class Optimizer(NamedTuple):
    """`init(masters) → state`.

    `update(grads, norm, state, masters, step) → (masters, state, info)`, all fp32.

    `norm` is the global one, of which a rank that holds shards has only a part. `update(…,
    donate=True)` writes into the given gradients, masters and state; the bits are the same.
    """

    init: Callable[[Params], Any]
    update: Callable[..., tuple[Params, Any, dict[str, Any]]]


class Moments(NamedTuple):
    """AdamW's running means of gradients and of squared gradients."""

    mu: Params
    nu: Params


def cosine_schedule(config: OptimizerConfig, total_steps: int) -> Schedule:
    """Linear warm-up over `W = int(warmup_ratio · T)` steps, then a cosine to 0.

    `T` is `schedule_steps` or `total_steps`.

    `rate(n) = (n + 1) / W · base` for `n < W`, then `base · (1 + cos(π · (n - W) / (T - W))) / 2`,
    and 0 from `T` on.

    Raises:
        UserError: `total_steps` is below 1.
    """
    span = schedule_span(config, total_steps)
    base = config.learning_rate

    def rate(step: int) -> float:
        if step < span.warmup:
            return (step + 1) / span.warmup * base
        done = min((step - span.warmup) / span.decay, 1.0)
        return base * 0.5 * (1 + math.cos(math.pi * done))

    return rate


class Span(NamedTuple):
    """Steps of a schedule's two parts."""

    warmup: int
    decay: int


def schedule_span(config: OptimizerConfig, total_steps: int) -> Span:
    """How the schedule divides its steps.

    Raises:
        UserError: `total_steps` is below 1.
    """
    if total_steps < 1:
        raise UserError(f"train.steps = {total_steps}: the schedule needs at least 1 step")
    total = config.schedule_steps or total_steps
    warmup = int(config.warmup_ratio * total)
    return Span(warmup, total - warmup)


def make_optimizer(
    config: OptimizerConfig, total_steps: int, make_schedule: MakeSchedule = cosine_schedule
) -> Optimizer:
    """Clip by the global norm, then AdamW at the schedule's rate.

    Raises:
        UserError: `total_steps` is below 1.
    """
    try:
        schedule = kept_schedule(make_schedule, config, total_steps)
    except TypeError:  # a callable that cannot be hashed is made again
        schedule = make_schedule(config, total_steps)

    def update(
        grads: Params,
        norm: Tensor,
        state: Moments,
        masters: Params,
        step: int,
        donate: bool = False,
    ) -> tuple[Params, Moments, dict[str, Any]]:
        grads = clip(grads, norm, config.max_grad_norm, donate)
        rate = schedule(step)
        masters, state = adamw(grads, state, masters, step, rate, config, donate)
        return masters, state, {"grad_norm": norm, "learning_rate": rate}

    return Optimizer(zero_moments, update)


@lru_cache(maxsize=16)
def kept_schedule(
    make_schedule: MakeSchedule, config: OptimizerConfig, total_steps: int
) -> Schedule:
    """`make_schedule(config, total_steps)`, made once: a recursive one is not cheap."""
    return make_schedule(config, total_steps)


def zero_moments(masters: Params) -> Moments:
    """The moments before the first update."""
    return Moments(
        mu={name: torch.zeros_like(master) for name, master in masters.items()},
        nu={name: torch.zeros_like(master) for name, master in masters.items()},
    )


def clip(grads: Params, norm: Tensor, max_norm: float, donate: bool = False) -> Params:
    """Scale gradients, whose global norm is `norm`, by `max_norm / (norm + 1e-6)`, at most 1.

    `donate`: in place.
    """
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    clipped = {}
    for name, grad in grads.items():
        clipped[name] = torch.mul(grad, scale, out=grad if donate else None)
    return clipped


def adamw(
    grads: Params,
    state: Moments,
    masters: Params,
    step: int,
    rate: float,
    config: OptimizerConfig,
    donate: bool = False,
) -> tuple[Params, Moments]:
    """One AdamW update (arXiv 1711.05101) at step `n`, counted from 0:

        m ← m + (1 - β₁)(g - m),  v ← β₂ v + (1 - β₂) g²
        master ← master · (1 - rate · decay) - rate / (1 - β₁ⁿ⁺¹) · m / (√v / √(1 - β₂ⁿ⁺¹) + ε)

    The bits of `torch.optim.AdamW` on every device. On CUDA that one runs over lists of leaves, and
    a list divided by a number is a true division, where a tensor is multiplied by the reciprocal:
    so the operations on lists are used, with one leaf each. On a CPU both are the same.
    """
    step_size = rate / (1 - config.beta1 ** (step + 1))
    root = (1 - config.beta2 ** (step + 1)) ** 0.5
    kept = 1 - rate * config.weight_decay

    def update(grad: Tensor, mu: Tensor, nu: Tensor, master: Tensor) -> None:
        if config.weight_decay:
            torch._foreach_mul_([master], kept)

        # The running means.
        torch._foreach_lerp_([mu], [grad], 1 - config.beta1)
        torch._foreach_mul_([nu], config.beta2)
        torch._foreach_addcmul_([nu], [grad], [grad], 1 - config.beta2)

        # The update, with both means' bias removed.
        denominator = torch._foreach_sqrt([nu])
        torch._foreach_div_(denominator, [root])
        torch._foreach_add_(denominator, config.eps)
        torch._foreach_addcdiv_([master], [mu], denominator, [-step_size])

    if donate:
        for name, grad in grads.items():
            for block in _blocks(grad, state.mu[name], state.nu[name], masters[name]):
                update(*block)
        return masters, state

    mu = {name: value.clone() for name, value in state.mu.items()}
    nu = {name: value.clone() for name, value in state.nu.items()}
    after = {name: value.clone() for name, value in masters.items()}
    for name, grad in grads.items():
        update(grad, mu[name], nu[name], after[name])
    return after, Moments(mu, nu)


def _blocks(*leaves: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of the leaves' rows, block by block: the update of one needs no more memory than a
    block.
    """
    first = leaves[0]
    rows = max(1, _BLOCK_BYTES * len(first) // first.nbytes) if first.numel() else 1
    return zip(*(leaf.split(rows) for leaf in leaves), strict=True)

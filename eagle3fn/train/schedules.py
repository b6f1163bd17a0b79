"""Learning-rate schedules as pure functions of the step.

A schedule of `T` steps, `schedule_steps` or the run's own number, begins with a linear warm-up over
`W = int(warmup_ratio · T)` of them, to the base `learning_rate`:

    rate(n) = (n + 1) / W · base,  n < W

What follows is the schedule's own.
"""

import math
from collections.abc import Callable, Hashable
from functools import lru_cache
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eagle3fn.base.errors import UserError, shown
from eagle3fn.base.named import call_own, find
from eagle3fn.base.sections import HIGHEST_RATE, OptimizerConfig

Schedule = Callable[[int], float]
"""The learning rate of an update, counted from 0."""

MakeSchedule = Callable[[OptimizerConfig, int], Schedule]
"""As `cosine`: settings and the run's number of steps → its schedule."""


class Span(NamedTuple):
    """Steps of a schedule's two parts."""

    warmup: int
    decay: int  # all after the warm-up


def schedule_span(config: OptimizerConfig, total_steps: int) -> Span:
    """How a schedule divides its steps.

    Raises:
        UserError: `total_steps` is below 1.
    """
    if total_steps < 1:
        raise UserError(
            f"train.steps = {total_steps}: the learning-rate schedule needs at least 1 step; set "
            "train.steps"
        )
    total = config.schedule_steps or total_steps
    warmup = int(config.warmup_ratio * total)
    return Span(warmup, total - warmup)


def cosine(config: OptimizerConfig, total_steps: int) -> Schedule:
    """Half a cosine to 0: `base · (1 + cos(π · (n - W) / (T - W))) / 2`; 0 from `T` on.

    >>> rate = cosine(OptimizerConfig(learning_rate=1.0, warmup_ratio=0.2), 10)
    >>> [round(rate(step), 3) for step in (0, 1, 2, 4, 6, 8, 10, 11)]
    [0.5, 1.0, 1.0, 0.854, 0.5, 0.146, 0.0, 0.0]

    Raises:
        UserError: `total_steps` is below 1.
    """
    return _after_warmup(
        config, total_steps, lambda done, rest: 0.5 * (1 + math.cos(math.pi * done / rest))
    )


def linear(config: OptimizerConfig, total_steps: int) -> Schedule:
    """A line to 0: `base · (T - n) / (T - W)`; 0 from `T` on.

    >>> rate = linear(OptimizerConfig(learning_rate=1.0, warmup_ratio=0.2), 10)
    >>> [rate(step) for step in (0, 1, 2, 4, 6, 8, 10, 11)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]

    Raises:
        UserError: `total_steps` is below 1.
    """
    return _after_warmup(config, total_steps, lambda done, rest: 1 - done / rest)


def constant(config: OptimizerConfig, total_steps: int) -> Schedule:
    """The base at every step after the warm-up, from `T` on too.

    >>> rate = constant(OptimizerConfig(learning_rate=1.0, warmup_ratio=0.2), 10)
    >>> [rate(step) for step in (0, 1, 2, 9, 10, 99)]
    [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]

    Raises:
        UserError: `total_steps` is below 1.
    """
    return _after_warmup(config, total_steps, lambda done, rest: 1.0)


def wsd(config: OptimizerConfig, total_steps: int) -> Schedule:
    """Warm-up, stable, decay (arXiv 2404.06395): the base, then a line to 0 over the last
    `C = int(cooldown_ratio · T)` steps, `base · min(1, (T - n) / C)`; 0 from `T` on.

    >>> choice = OptimizerConfig(
    ...     learning_rate=1.0, warmup_ratio=0.2, schedule="wsd", cooldown_ratio=0.4
    ... )
    >>> rate = wsd(choice, 10)
    >>> [rate(step) for step in (0, 1, 2, 5, 6, 7, 8, 9, 10, 11)]
    [0.5, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]

    Raises:
        UserError: `total_steps` is below 1.
    """
    cooldown = max(int(config.cooldown_ratio * (config.schedule_steps or total_steps)), 1)
    return _after_warmup(config, total_steps, lambda done, rest: min(1.0, (rest - done) / cooldown))


def _after_warmup(
    config: OptimizerConfig, total_steps: int, share: Callable[[int, int], float]
) -> Schedule:
    """The warm-up, then `base · share(n - W, T - W)`; from `T` on the share is that at `T`."""
    span = schedule_span(config, total_steps)
    base = config.learning_rate

    def rate(step: int) -> float:
        if step < span.warmup:
            return (step + 1) / span.warmup * base
        return base * share(min(step - span.warmup, span.decay), span.decay)

    return rate


SCHEDULES: dict[str, MakeSchedule] = {
    "cosine": cosine,
    "linear": linear,
    "constant": constant,
    "wsd": wsd,
}
"""What `optimizer.schedule` can be, besides a user's own function as these."""


def find_schedule(config: OptimizerConfig) -> MakeSchedule:
    """What `optimizer.schedule` names: of `SCHEDULES`, or a user's "module:function", not yet
    called.

    Raises:
        UserError: neither.
    """
    return find(config.schedule, SCHEDULES, "optimizer.schedule", ("config", "total_steps"))


def named_schedule(config: OptimizerConfig, total_steps: int) -> Schedule:
    """The schedule that `optimizer.schedule` names: of `SCHEDULES`, or "module:function".

    Raises:
        UserError: neither, `total_steps` is below 1, or the function returns no function; when the
            schedule is called, one that fails, or returns no rate.
    """
    make = find_schedule(config)
    schedule_span(config, total_steps)
    given = f"optimizer.schedule = {config.schedule!r}"
    wanted = (
        "it must take an OptimizerConfig and a number of steps, and return a function of a step"
    )
    made = call_own(make, (config, total_steps), f"{given}: the function", wanted)
    if not callable(made):
        raise UserError(f"{given}: the function returned {type(made).__name__}; {wanted}")
    return _checked(made, given)


def _checked(schedule: Schedule, given: str) -> Schedule:
    """The schedule, which refuses what is no rate; `given` names it in errors."""
    remedy = "mend it, and call again to go on"

    def rate(step: int) -> float:
        value = call_own(schedule, (step,), f"{given}: step {step + 1}", remedy)
        if not (_is_real(value) and 0 <= value <= HIGHEST_RATE):
            raise UserError(
                f"{given}: the rate of step {step + 1} is {shown(value)}, must be a real number "
                f"from 0 to {HIGHEST_RATE:g}; {remedy}"
            )
        return float(value)

    return rate


def _is_real(value: Any) -> bool:
    """Whether it is a real number, or a tensor of one without a gradient."""
    if not isinstance(value, Tensor):
        return isinstance(value, Real) and not isinstance(value, bool)
    has_kind = not value.is_complex() and value.dtype != torch.bool
    return has_kind and value.ndim == 0 and not value.requires_grad


@lru_cache(maxsize=16)
def _kept_schedule(make: MakeSchedule, config: OptimizerConfig, total_steps: int) -> Schedule:
    return make(config, total_steps)


def made_schedule(make: MakeSchedule, config: OptimizerConfig, total_steps: int) -> Schedule:
    """`make(config, total_steps)`, made once where it can be hashed: some are slow to make."""
    if isinstance(make, Hashable):
        return _kept_schedule(make, config, total_steps)
    return make(config, total_steps)

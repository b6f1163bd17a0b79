"""How much an evaluation decodes, in what, and how tokens are chosen."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from eagle3fn.base.sampling import Sampling, check_sampling
from eagle3fn.base.sections import require

LOWEST_TEMPERATURE = 0.01
"""Above 0. Logits weigh `1 / temperature` as much, so that rounding alone moves a probability by up
to `use.sampled_check.ROUNDING / temperature`."""


@dataclass(frozen=True)
class EvalSettings:
    """How much is decoded, and in what.

    The first `tasks` prompts are decoded in fp32 at `draft_length`. The first `speed_tasks` of them
    are timed in `speed_dtype` (None: what the device multiplies fast), and the first `few` serve
    the untrained draft. A `temperature` of 0 decodes greedily; above it, target and draft draw
    their tokens from the nucleus of mass `top_p`, by random numbers of `seed` and the prompt's
    number.
    """

    tasks: int = 10
    max_new: int = 128
    draft_length: int = 7
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    speed_tasks: int = 3
    speed_dtype: str | None = None
    few: int = 2
    repeats: int = 4
    device: str = "cpu"
    attn: str = "sdpa"
    template_arguments: Mapping[str, Any] = field(default_factory=dict)  # of the chat template

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        for name in ("tasks", "draft_length", "speed_tasks", "few", "repeats"):
            value = getattr(self, name)
            require(value >= 1, f"evaluate.{name}", value, "at least 1")
        require(self.max_new >= 2, "evaluate.max_new", self.max_new, "at least 2")
        check_sampling(self.sampling)
        require(
            not 0 < self.temperature < LOWEST_TEMPERATURE,
            "temperature",
            self.temperature,
            f"at least {LOWEST_TEMPERATURE}, below which nothing can be checked of the "
            "probabilities, or 0; greedy answers are those without --temperature",
        )

    @property
    def sampling(self) -> Sampling:
        """How tokens are chosen."""
        return Sampling(self.temperature, self.top_p, self.seed)

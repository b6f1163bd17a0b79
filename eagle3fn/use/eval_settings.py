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

    Attributes:
        tasks: prompts decoded in fp32, the first ones.
        max_new: tokens of an answer at most.
        draft_length: drafted tokens a round.
        temperature: at which target and draft draw their tokens; 0: greedy.
        top_p: mass of the nucleus that is drawn from.
        seed: of the draws, with the prompt's number.
        speed_tasks: prompts of the speed part, the first of `tasks`.
        speed_dtype: dtype of the speed part; unset: what the device multiplies fast.
        few: prompts that the untrained draft decodes.
        repeats: timings that each cost is measured by.
        device: torch device of the evaluation.
        attn: the target's attention implementation, as transformers names it.
        template_arguments: arguments of the chat template.
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
    template_arguments: Mapping[str, Any] = field(default_factory=dict)

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

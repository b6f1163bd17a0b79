"""How a decoder chooses its tokens: greedily, or drawn at a temperature."""

from typing import NamedTuple

from eagle3fn.base.sections import require


class Sampling(NamedTuple):
    """How tokens are chosen; temperature 0 is greedy."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


GREEDY = Sampling()


def check_sampling(sampling: Sampling) -> None:
    """Refuse values outside their range.

    Raises:
        UserError: names the value and its constraint.
    """
    require(sampling.temperature >= 0, "temperature", sampling.temperature, "at least 0")
    require(0 < sampling.top_p <= 1, "top_p", sampling.top_p, "above 0 and at most 1")

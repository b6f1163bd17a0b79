"""What can be checked of sampled answers: were their tokens drawn from the target's distribution?

Equal tokens cannot be asked for: two samples differ. What holds of every run is compared instead.

- The target's probability of each token, as it was when the token was drawn, is that of one run of
  the target over the whole answer. A cache that was rolled back wrongly shows here.
- As many drafted tokens are accepted as the distributions make likely: each was accepted with the
  chance `Σ min(p, q)` before it was drawn, so the number is within a few standard errors of their
  sum, whose square is the sum of `a (1 - a)` over these chances.
"""

import math
from typing import Any

import torch
from torch import Tensor

from eagle3fn.base.sampling import Sampling
from eagle3fn.use.decode import Decoded
from eagle3fn.use.eval_pair import EvalPair
from eagle3fn.use.sampling import tempered

ROUNDING = 1e-3
"""Of a probability in fp32 at a temperature of 1 or more; below, logits weigh as much more."""

STANDARD_ERRORS = 5


def check_sampled(pair: EvalPair, decoded: list[Decoded], sampling: Sampling) -> dict[str, Any]:
    """The two comparisons, and whether both hold; the report's `sampling_check`."""
    probability_error = 0.0
    for prompt, answer in zip(pair.prompts, decoded, strict=True):
        replayed = replayed_chances(pair.model, prompt, answer.tokens, sampling.temperature)
        drawn = torch.tensor(answer.chances, dtype=torch.float64)
        probability_error = max(probability_error, float((replayed - drawn).abs().max()))

    accepted = sum(sum(one.accepted_by_position) for one in decoded)
    expected = sum(sum(one.expected_by_position) for one in decoded)
    standard_error = math.sqrt(sum(sum(one.variance_by_position) for one in decoded))
    rounding = ROUNDING * max(1.0, 1 / sampling.temperature)
    within = abs(accepted - expected) <= STANDARD_ERRORS * standard_error + 1
    return {
        "passed": probability_error <= rounding and within,
        "probability_error": probability_error,
        "accepted": accepted,
        "expected_accepted": expected,
        "standard_error": standard_error,
    }


@torch.inference_mode()
def replayed_chances(model: Any, prompt: Tensor, tokens: list[int], temperature: float) -> Tensor:
    """The probability of each of `tokens` after `prompt` `(1, P)`, by one run without a cache.

    Before top-p; fp64 on the CPU, one for each token.
    """
    answer = torch.tensor([tokens], device=prompt.device)
    whole = torch.cat([prompt, answer[:, :-1]], dim=1)
    logits = model(input_ids=whole, use_cache=False, logits_to_keep=len(tokens)).logits[0]
    chances = tempered(logits, temperature)  # (T, V)
    return chances.gather(-1, answer[0][:, None])[:, 0].cpu()


def note(check: dict[str, Any], sampling: Sampling) -> str:
    """What a user is to know in place of "the same text"."""
    how = f"temperature {sampling.temperature:g}"
    if sampling.top_p < 1:
        how += f", top-p {sampling.top_p:g}"
    numbers = (
        f"probabilities within {check['probability_error']:.1g} of one run over each answer, "
        f"{check['accepted']} drafted tokens accepted where {check['expected_accepted']:.1f} ± "
        f"{check['standard_error']:.1f} are expected"
    )
    if check["passed"]:
        return f"sampled ({how}), by the target's own distribution: {numbers}"
    return f"sampled ({how}), NOT by the target's distribution: {numbers}"

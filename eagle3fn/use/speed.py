"""Tokens a second with a draft and without it, at the draft length that is cheapest here."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from eagle3fn.use.costs import Costs, best_length, expected_length, measure_costs
from eagle3fn.use.counts import accepted_length, differing_tokens, tokens_per_second
from eagle3fn.use.decode import Decoded
from eagle3fn.use.eval_pair import EvalPair, decode_one
from eagle3fn.use.eval_settings import EvalSettings


class _Comparison(NamedTuple):
    """The same prompts decoded plainly and speculatively, in turn and by the same loop."""

    plain: list[Decoded]
    speculative: list[Decoded]


def measure_speed(
    pair: EvalPair,
    settings: EvalSettings,
    acceptance: list[float],
    answer: list[int],
    on_done: Callable[[int], None],
) -> dict[str, Any]:
    """Costs and rates of a pair, as the report has them.

    Args:
        pair: in the dtype that is timed.
        settings: draft length, tokens, repetitions.
        acceptance: of each draft position; with the costs it chooses the draft length.
        answer: the tokens after the first prompt, as a context for the costs.
        on_done: called with the number of prompts timed.
    """
    # Costs, after the first prompt and about half of its answer.
    prompt = pair.prompts[0]
    context = torch.cat([prompt, torch.tensor([answer], device=settings.device)], dim=1)
    context = context[:, : prompt.shape[1] + settings.max_new // 2]
    costs = measure_costs(pair.model, pair.draft, context, settings.draft_length, settings.repeats)

    # Rates, at the draft length that these costs and the acceptance make cheapest.
    chosen = best_length(costs, acceptance)
    found = _compare(pair, settings, chosen, on_done)
    plain_rate = tokens_per_second(found.plain)
    rate = tokens_per_second(found.speculative)
    return {
        "speed_dtype": str(pair.model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "device": settings.device,
        "speed_draft_length": chosen,
        "speed_tasks": len(pair.prompts),
        "speed_accepted_length": accepted_length(found.speculative),
        "plain_tokens_per_s": plain_rate,
        "tokens_per_s": rate,
        "speedup": rate / plain_rate,
        **({} if settings.temperature else _differences(found)),
        "break_even_accepted_length": costs.round(chosen) / costs.verify[0],
        "costs": _costs_report(costs, acceptance, context.shape[1]),
    }


def _differences(found: _Comparison) -> dict[str, int]:
    """Of greedy answers: tokens decoded plainly, and those that came out otherwise."""
    differing = 0
    for plain, speculative in zip(found.plain, found.speculative, strict=True):
        differing += differing_tokens(plain.tokens, speculative.tokens)
    return {
        "timed_tokens": sum(len(one.tokens) for one in found.plain),
        "differing_tokens": differing,
    }


def _costs_report(costs: Costs, acceptance: list[float], context: int) -> dict[str, Any]:
    lengths = range(1, len(acceptance) + 1)
    predicted = [costs.round(k) / expected_length(acceptance, k) for k in lengths]
    return {
        "context": context,
        "verify_seconds": costs.verify,
        "first_draft_seconds": costs.commit,
        "next_draft_seconds": costs.extend,
        "predicted_seconds_per_token": predicted,
    }


def _compare(
    pair: EvalPair, settings: EvalSettings, draft_length: int, on_done: Callable[[int], None]
) -> _Comparison:
    """Decode both ways, prompt by prompt in turn.

    So a change of the machine's load affects both alike. Two tokens both ways warm up.
    """
    plain: list[Decoded] = []
    speculative: list[Decoded] = []
    for length in (0, draft_length):
        decode_one(pair, settings, 0, length, 2)
    for number in range(len(pair.prompts)):
        plain.append(decode_one(pair, settings, number, 0, settings.max_new))
        speculative.append(decode_one(pair, settings, number, draft_length, settings.max_new))
        on_done(number + 1)
    return _Comparison(plain, speculative)

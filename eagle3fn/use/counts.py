"""Numbers over decoded answers: rates, accepted length, acceptance by position, repetition."""

from collections.abc import Sequence
from typing import Any

from eagle3fn.use.decode import Decoded

NGRAM = 8


def tokens_per_second(decoded: list[Decoded]) -> float:
    """Tokens a second over all answers, prefills included."""
    tokens = sum(len(one.tokens) for one in decoded)
    return tokens / sum(one.seconds for one in decoded)


def accepted_length(decoded: list[Decoded]) -> float:
    """Tokens emitted per verification over all answers; 0 without verifications.

    The prefills' tokens do not count.
    """
    verifications = sum(one.verifications for one in decoded)
    if not verifications:
        return 0.0
    return sum(len(one.tokens) - 1 for one in decoded) / verifications


def acceptance_by_position(decoded: list[Decoded]) -> list[float]:
    """Conditional acceptance rate of each draft position, over all answers.

    It is the share of drafted tokens emitted, among those whose predecessors all were; 0 where
    there are none.
    """
    accepted = _column_sums([one.accepted_by_position for one in decoded])
    reached = _column_sums([one.reached_by_position for one in decoded])
    rates = []
    for emitted, tried in zip(accepted, reached, strict=True):
        rates.append(emitted / tried if tried else 0.0)
    return rates


def expected_acceptance(decoded: list[Decoded]) -> list[float]:
    """What `acceptance_by_position` is expected to be of sampled answers.

    It is the mean of `Σ min(p, q)` over the places that were reached; 0 where there are none.
    """
    expected = _column_sums([one.expected_by_position for one in decoded])
    reached = _column_sums([one.reached_by_position for one in decoded])
    rates = []
    for chances, tried in zip(expected, reached, strict=True):
        rates.append(chances / tried if tried else 0.0)
    return rates


def describe_answers(decoded: list[Decoded]) -> dict[str, Any]:
    """How many answers, their tokens with the prefills', verifications and accepted length."""
    return {
        "prompts": len(decoded),
        "tokens": sum(len(one.tokens) for one in decoded),
        "verifications": sum(one.verifications for one in decoded),
        "accepted_length": accepted_length(decoded),
    }


def _column_sums(rows: Sequence[Sequence[Any]]) -> list[Any]:
    return [sum(column) for column in zip(*rows, strict=True)]


def differing_tokens(left: list[int], right: list[int]) -> int:
    """Positions at which two answers differ; positions of only the longer answer differ too."""
    count = abs(len(left) - len(right))
    for one, other in zip(left, right, strict=False):
        if one != other:
            count += 1
    return count


def repeated_share(answers: list[list[int]]) -> float:
    """Share of tokens inside a run of eight tokens that occurred before in the same answer."""
    total = sum(map(len, answers))
    if not total:
        return 0.0
    return sum(map(_repeated_tokens, answers)) / total


def _repeated_tokens(tokens: list[int]) -> int:
    seen: set[tuple[int, ...]] = set()
    inside: set[int] = set()  # positions inside a repeated run; runs may overlap
    for start in range(len(tokens) - NGRAM + 1):
        run = tuple(tokens[start : start + NGRAM])
        if run in seen:
            inside.update(range(start, start + NGRAM))
        seen.add(run)
    return len(inside)

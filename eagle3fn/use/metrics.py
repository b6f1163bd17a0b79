"""Numbers over decoded answers."""

from eagle3fn.use.decode import Decoded

_NGRAM = 8


def rate_of(spoken: list[Decoded]) -> float:
    """Tokens a second, prefills included."""
    return sum(len(one.tokens) for one in spoken) / sum(one.seconds for one in spoken)


def accepted_length(spoken: list[Decoded]) -> float:
    """Tokens emitted a verification over all answers, the prefills' tokens not counted; 0 without verifications."""
    rounds = sum(one.verifications for one in spoken)
    return sum(len(one.tokens) - 1 for one in spoken) / rounds if rounds else 0.0


def acceptance_by_position(spoken: list[Decoded]) -> list[float]:
    """Share of the drafted tokens at each position that were accepted, of those whose predecessors all were."""
    accepted = [
        sum(column) for column in zip(*(one.accepted_by_position for one in spoken), strict=True)
    ]
    reached = [
        sum(column) for column in zip(*(one.reached_by_position for one in spoken), strict=True)
    ]
    return [a / r if r else 0.0 for a, r in zip(accepted, reached, strict=True)]


def differing(left: list[int], right: list[int]) -> int:
    """Positions at which two answers differ; one that only the longer answer has differs."""
    size = max(len(left), len(right))
    return sum(left[i : i + 1] != right[i : i + 1] for i in range(size))


def repeated_share(answers: list[list[int]]) -> float:
    """Share of tokens inside a run of eight tokens that occurred before in the same answer."""
    total = sum(map(len, answers))
    return sum(map(_repeated, answers)) / total if total else 0.0


def _repeated(tokens: list[int]) -> int:
    seen: set[tuple[int, ...]] = set()
    inside: set[int] = set()
    for start in range(len(tokens) - _NGRAM + 1):
        run = tuple(tokens[start : start + _NGRAM])
        if run in seen:
            inside.update(range(start, start + _NGRAM))
        seen.add(run)
    return len(inside)

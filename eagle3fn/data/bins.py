"""Samples of unlike length into bins of like load: how packed micro-batches are filled."""

import heapq
from collections.abc import Sequence

from eagle3fn.base.errors import UserError


def fill(lengths: Sequence[int], limit: int, ranks: int = 1, tree: bool = False) -> list[list[int]]:
    """Places of `lengths` in bins of at most `limit` together, each place once.

    The number of bins is the smallest that fits and is a multiple of the ranks, or under `tree` a
    power of two, so that it does not depend on the ranks; then empty bins follow up to a multiple
    of the ranks. Within a bin places ascend.

    Args:
        lengths: at least one, each from 1 to `limit`.
        limit: tokens of a bin.
        ranks: the ranks that share the bins.
        tree: the bins are summed by a binary tree.

    Raises:
        UserError: a length is above the limit.

    >>> fill([5, 1, 4, 3], limit=7)
    [[0, 1], [2, 3]]
    >>> fill([5, 1, 4, 3], limit=7, ranks=3)
    [[0], [2], [1, 3]]
    """
    longest = max(lengths)
    if longest > limit:
        raise UserError(
            f"a sample of {longest} tokens is longer than a packed row, {limit}; raise "
            "data.pack_tokens, or lower data.max_length"
        )

    # From the least number that could do; as many bins as samples always do.
    count = _allowed(-(-sum(lengths) // limit), ranks, tree)
    bins = _balanced(lengths, count)
    while _heaviest(bins, lengths) > limit:
        count = _allowed(count + 1, ranks, tree)
        bins = _balanced(lengths, count)
    return bins + [[] for _ in range(-count % ranks)]


def _allowed(count: int, ranks: int, tree: bool) -> int:
    """The smallest allowed number of bins that is not below `count`."""
    if tree:
        return 1 << (count - 1).bit_length()
    return -(-count // ranks) * ranks


def _balanced(lengths: Sequence[int], count: int) -> list[list[int]]:
    """The longest first, each to the bin that is lightest so far; of equal ones the first."""
    bins: list[list[int]] = [[] for _ in range(count)]
    lightest = [(0, number) for number in range(count)]
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        load, number = lightest[0]
        bins[number].append(place)
        heapq.heapreplace(lightest, (load + lengths[place], number))
    return [sorted(each) for each in bins]


def _heaviest(bins: list[list[int]], lengths: Sequence[int]) -> int:
    return max(sum(lengths[place] for place in each) for each in bins)

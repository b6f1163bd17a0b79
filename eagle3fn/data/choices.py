"""The target's own choices, counted: what a draft has to propose is not what the data says."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from eagle3fn.data.features import FeatureSet, read_sample

_MOST_PLACES = 4096
_PRODUCTS = 2**39  # multiply-adds at most: about ten seconds on one core
_COLUMNS = 2048  # of the head, at once


class Choices(NamedTuple):
    """The target's first choices at places of supervised tokens."""

    counts: Tensor  # (V,) int64: how often each token is the first choice
    places: int  # looked at
    all_places: int  # there are


def count_choices(features: FeatureSet, numbers: Sequence[int], head: Tensor) -> Choices:
    """Count `argmax(head @ h)` where a draft is scored: `h` after a supervised token, another next.

    Such places of the samples `numbers` are looked at, evenly spread, as many as take about ten
    seconds on one core, at most 4,096. Equal logits give the lowest id.

    Args:
        features: an opened folder.
        numbers: its samples.
        head: the target's, `(V, Ht)`, of any dtype, computed in float32.

    Raises:
        UserError: an unreadable sample.
    """
    most = max(1, min(_MOST_PLACES, _PRODUCTS // head.numel()))
    share = -(-most // max(1, len(numbers)))

    # States of every sample in the target's dtype, no more than its share, evenly spread.
    found = []
    total = 0
    for number in numbers:
        sample = read_sample(features, number)
        mask = sample.token_mask
        places = (mask[:-1] * mask[1:]).nonzero().flatten()
        looked_at = min(len(places), share)
        chosen = torch.arange(looked_at) * len(places) // max(1, looked_at)
        found.append(sample.last_hidden[places[chosen]])
        total += len(places)

    counts = torch.zeros(len(head), dtype=torch.int64)
    if not total:
        return Choices(counts, 0, 0)
    rows = torch.cat(found).float()  # (R, Ht)
    counts += torch.bincount(_first_choices(rows, head), minlength=len(head))
    return Choices(counts, len(rows), total)


def _first_choices(rows: Tensor, head: Tensor) -> Tensor:
    """`(R,)` int64 of states `(R, Ht)`; the head is read in blocks of its rows."""
    best = rows.new_full((len(rows),), -torch.inf)
    choice = torch.zeros(len(rows), dtype=torch.int64)
    start = 0
    for block in head.split(_COLUMNS):
        score, index = (rows @ block.float().T).max(-1)  # the lowest of equal ones
        choice = torch.where(score > best, index + start, choice)
        best = torch.maximum(score, best)
        start += len(block)
    return choice

"""Are the answers in the data the target's own? Measured from its features, without running it."""

import shlex
from typing import NamedTuple

import torch
from torch import Tensor

from eagle3fn.data.features import FeatureSet, read_last_hidden

_SAMPLES = 16  # looked at, spread over all
_PRODUCTS = 2**34  # multiply-adds of a measurement: about a second on one core
_MOST_TOKENS = 512
_FEWEST_TOKENS = 64
_MOST_EXCESS = 0.15  # nats; its standard error at 512 tokens is about 0.12
_COLUMNS = 8192  # of the head, at once


class Agreement(NamedTuple):
    """How supervised tokens compare with what the target would write at their places."""

    tokens: int  # looked at
    first_choice: float  # share of them that are the target's argmax
    surprise: float  # their mean `-log p`, in nats
    entropy: float  # its mean where the target draws the tokens itself, at temperature 1

    @property
    def excess(self) -> float:
        """Surprise beyond the target's own: 0 for texts that it drew at temperature 1, below 0 at
        lower temperatures, above 0 for texts of others.
        """
        return self.surprise - self.entropy


def measure_agreement(features: FeatureSet, head: Tensor) -> Agreement:
    """Compare supervised tokens of a few samples with the target's probabilities before each.

    Reads at most 16 samples, spread over all, and at most 512 of their tokens.

    Args:
        features: an opened folder.
        head: the target's, `(V, Ht)`, of any dtype, on any device; computed in fp32 there.

    Returns:
        The means; of no tokens and 0, where none of these samples has a supervised one after its
        first.
    """
    budget = _PRODUCTS // head.numel()
    per_sample = max(_FEWEST_TOKENS, min(budget, _MOST_TOKENS)) // _SAMPLES

    hidden = []
    tokens = []
    for number in _spread(len(features.samples), _SAMPLES):
        ids, mask, last = read_last_hidden(features, number)
        places = mask[1:].nonzero().flatten()  # row `t` predicts token `t + 1`
        places = places[_spread(len(places), per_sample)]
        hidden.append(last[places])
        tokens.append(ids[places + 1])
    rows = torch.cat(hidden).to(head.device, torch.float32)  # (R, Ht)
    wanted = torch.cat(tokens).to(head.device)  # (R,)
    if not len(wanted):
        return Agreement(0, 0.0, 0.0, 0.0)
    return _compare(rows, wanted, head)


def _compare(rows: Tensor, wanted: Tensor, head: Tensor) -> Agreement:
    """Of the states `(R, Ht)` and the tokens after them `(R,)`; the head is read in blocks."""
    count = len(wanted)
    logit = rows.new_zeros(count)  # of the token
    best = rows.new_full((count,), -torch.inf)  # the highest logit
    choice = torch.zeros_like(wanted)  # … and its token
    total = rows.new_full((count,), -torch.inf)  # log of the sum of exponentials
    mean = rows.new_zeros(count)  # mean logit under the softmax

    start = 0
    for block in head.split(_COLUMNS):
        scores = rows @ block.float().T  # (R, columns)
        inside = (wanted >= start) & (wanted < start + len(block))
        logit[inside] = scores[inside, wanted[inside] - start]

        top = scores.max(-1)
        choice = torch.where(top.values > best, top.indices + start, choice)
        best = best.maximum(top.values)

        # Means of the columns so far and of these, weighted by their sums.
        block_total = scores.logsumexp(-1)
        block_mean = (scores.softmax(-1) * scores).sum(-1)
        both = total.logaddexp(block_total)
        mean = mean * (total - both).exp() + block_mean * (block_total - both).exp()
        total = both
        start += len(block)

    return Agreement(
        tokens=count,
        first_choice=float((choice == wanted).float().mean()),
        surprise=float((total - logit).mean()),
        entropy=float((total - mean).mean()),
    )


def foreign_note(found: Agreement, target: str, conversations: str) -> str | None:
    """What to say where the answers are not the target's own; None where they are.

    Args:
        found: as measured.
        target: the target's folder or id.
        conversations: the file that the features were made from.
    """
    if not found.excess > _MOST_EXCESS:
        return None
    command = ["eagle3fn", "regenerate", "--target", target, "--conversations", conversations]
    return (
        f"the answers are not the target's own: {found.first_choice:.0%} of their tokens are its "
        f"first choice, their surprise is {found.surprise:.2f} nats, its own would be "
        f"{found.entropy:.2f}.\n"
        "A draft learns more from what its target writes: on 60 conversations, one minute, the "
        "accepted length was 1.15, with the target's answers 1.31.\n"
        f"To have it answer the same prompts: {shlex.join(command)} --out OWN.jsonl"
    )


def _spread(count: int, wanted: int) -> list[int]:
    """At most `wanted` numbers below `count`, evenly spaced."""
    wanted = min(count, wanted)
    return [(2 * i + 1) * count // (2 * wanted) for i in range(wanted)]

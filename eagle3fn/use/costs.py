"""Seconds of drafting and of verifying, and the draft length that is cheapest per token."""

from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eagle3fn.use.decode import open_target
from eagle3fn.use.drafter import Drafter
from eagle3fn.use.export import Draft


class Costs(NamedTuple):
    """Medians in seconds."""

    verify: list[float]  # entry b - 1: one target run over b tokens; entry 0: a plain step
    commit: float  # the first drafted token: two rows committed, then the head
    extend: float  # every further drafted token

    def round(self, draft_length: int) -> float:
        """Seconds of a round that drafts `draft_length` tokens and verifies them.

        `commit + (draft_length - 1) · extend + verify[draft_length]`; without a draft, the
        verification alone.
        """
        if not draft_length:
            return self.verify[0]
        return self.commit + (draft_length - 1) * self.extend + self.verify[draft_length]


@torch.inference_mode()
def measure_costs(
    model: Any, draft: Draft, context: Tensor, draft_length: int, repeats: int = 8
) -> Costs:
    """Time the parts of a round after `context` `(1, P)`, P >= 3.

    Each repetition times every part once, so that a change of the machine's load affects all alike.
    One repetition before them warms up.
    """
    size = context.shape[1]
    block_sizes = range(1, draft_length + 2)
    verify: dict[int, list[float]] = {block: [] for block in block_sizes}
    draft_one: list[float] = []
    draft_all: list[float] = []

    with open_target(model, draft) as target:
        # Target and draft read the context, the draft all but the last two rows that it can have.
        target.read(context, keep=1)
        aux = target.features(size)  # (1, P, A·Ht)
        drafter = Drafter(draft, size + draft_length, model.get_input_embeddings().weight)
        drafter.commit(aux[:, : size - 2], context[:, 1 : size - 1])

        def read(block: int) -> Tensor:
            return target.read(context[:, -1:].expand(1, block))

        def draft_tokens(count: int) -> Tensor:
            return drafter.draft(aux[:, -2:], context[:, -2:], count)

        # After each timing the caches go back to the context.
        for _ in range(repeats + 1):
            for block in block_sizes:
                verify[block].append(_seconds(read, block))
                target.forget(block)
            for seconds, count in ((draft_one, 1), (draft_all, draft_length)):
                seconds.append(_seconds(draft_tokens, count))
                drafter.committed -= 2

    commit = median(draft_one[1:])
    extend = commit
    if draft_length > 1:
        extend = (median(draft_all[1:]) - commit) / (draft_length - 1)
    return Costs(
        verify=[median(verify[block][1:]) for block in block_sizes],
        commit=commit,
        extend=max(extend, 0.0),
    )


def _seconds(action: Callable[[int], Tensor], count: int) -> float:
    """Wall time of `action(count)` until the result's values are on the host."""
    begin = perf_counter()
    action(count).tolist()
    return perf_counter() - begin


def expected_length(acceptance: list[float], draft_length: int) -> float:
    """Tokens that a verification emits on average, the bonus token included.

    `1 + Σ_i Π_{j<=i} acceptance[j]` over the first `draft_length` positions: a drafted token is
    emitted if it and all before it are accepted.
    """
    total = 1.0
    chance = 1.0
    for rate in acceptance[:draft_length]:
        chance *= rate
        total += chance
    return total


def best_length(costs: Costs, acceptance: list[float]) -> int:
    """The draft length >= 1 with the least predicted seconds per token; ties go to the shorter."""

    def seconds_per_token(length: int) -> float:
        return costs.round(length) / expected_length(acceptance, length)

    return min(range(1, len(acceptance) + 1), key=seconds_per_token)

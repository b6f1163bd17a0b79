"""What a drafted token and a verification cost here, and which draft length is cheapest for each token."""

from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eagle3fn.use.decode import Target
from eagle3fn.use.drafter import Drafter
from eagle3fn.use.export import Draft


class Costs(NamedTuple):
    """Medians in seconds."""

    verify: list[
        float
    ]  # entry b - 1: one target run over b tokens; entry 0 is a plain decoding step
    commit: float  # the first drafted token: commit two rows, then the head
    extend: float  # every further drafted token

    def round(self, draft_length: int) -> float:
        """One round: `draft_length` drafted tokens and the verification behind them."""
        drafting = self.commit + (draft_length - 1) * self.extend if draft_length else 0.0
        return drafting + self.verify[draft_length]


@torch.inference_mode()
def measure_costs(
    model: Any, draft: Draft, context: Tensor, draft_length: int, repeats: int = 8
) -> Costs:
    """Time the parts of a round behind `context` `(1, P)`, P >= 3, in turn: load of the machine hits all alike."""
    kinds: dict[Any, list[float]] = {}
    size = context.shape[1]
    with Target(model, draft) as target:
        target.read(context, keep=1)
        aux = target.features(size)
        chain = Drafter(draft, size + draft_length, model.get_input_embeddings().weight)
        chain.commit(aux[:, : size - 2], context[:, 1 : size - 1])
        for _ in range(repeats + 1):
            for block in range(1, draft_length + 2):
                kinds.setdefault(block, []).append(
                    _seconds(lambda n=block: target.read(context[:, -1:].expand(1, n)))
                )
                target.forget(block)
            for name, count in (("one", 1), ("all", draft_length)):
                kinds.setdefault(name, []).append(
                    _seconds(lambda n=count: chain.draft(aux[:, -2:], context[:, -2:], n))
                )
                chain.committed -= 2
    mid = {kind: median(seconds[1:]) for kind, seconds in kinds.items()}
    extend = (mid["all"] - mid["one"]) / (draft_length - 1) if draft_length > 1 else mid["one"]
    return Costs([mid[block] for block in range(1, draft_length + 2)], mid["one"], max(extend, 0.0))


def _seconds(action: Callable[[], Any]) -> float:
    """Wall time until the result's values are on the host."""
    begin = perf_counter()
    action().tolist()
    return perf_counter() - begin


def expected_length(acceptance: list[float], draft_length: int) -> float:
    """Tokens a verification emits: the bonus token and each drafted token's chance that all before it are right too."""
    total = chance = 1.0
    for rate in acceptance[:draft_length]:
        chance *= rate
        total += chance
    return total


def best_length(costs: Costs, acceptance: list[float]) -> int:
    """The draft length >= 1 of the least predicted seconds a token; ties go to the shorter."""
    lengths = range(1, len(acceptance) + 1)
    return min(lengths, key=lambda k: costs.round(k) / expected_length(acceptance, k))

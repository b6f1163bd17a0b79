"""How far each row of a sample goes in the unroll, drawn by the data pipeline."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from eagle3fn.base.config import Config
from eagle3fn.base.types import Sample


def draw_survival(
    samples: Sequence[Sample], numbers: Sequence[int], config: Config, step: int
) -> list[Tensor] | None:
    """At how many unroll steps each row of the samples takes part: `(S,)` int64 each, 1 … K.

    A row goes on to the next step with the chance `objective.survival`. Drawn from the seed, the
    training step, the sample's number and the row alone: the same on every rank, in every
    micro-batch, and in a resumed run. None if every row survives.
    """
    rate = config.objective.survival
    if rate == 1:
        return None

    drawn = []
    for sample, number in zip(samples, numbers, strict=True):
        key = f"survival {config.train.seed} {step} {number}".encode()
        seed = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest()) >> 1
        generator = torch.Generator().manual_seed(seed)
        shape = len(sample.input_ids), config.objective.ttt_length - 1
        goes_on = torch.rand(shape, dtype=torch.float64, generator=generator) < rate
        drawn.append(1 + goes_on.long().cumprod(1).sum(1))
    return drawn

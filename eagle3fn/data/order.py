"""Which sample comes at which place of the data: shuffled epochs laid end to end."""

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch

from eagle3fn.base.config import Config

Order = Callable[[int, Config, int], int]
"""As `shuffled`: `(n, config, place)` → the number below `n` at that place."""

_EPOCHS_APART = 1_000_003


@lru_cache(maxsize=4)
def epoch_order(n: int, seed: int) -> np.ndarray:
    """The numbers 0 … n-1, `(n,)` int64, shuffled by a generator of `seed`.

    Kept, so that asking for one place is cheap; it cannot be written to.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(n, generator=generator).numpy()
    order.flags.writeable = False
    return order


def shuffled_number(n: int, seed: int, place: int) -> int:
    """The number below `n` at `place` of the shuffled epochs of `seed`, laid end to end.

    `place = epoch · n + i` has entry `i` of `epoch_order(n, 1,000,003 · seed + epoch)`.
    """
    epoch, place_in_epoch = divmod(place, n)
    return int(epoch_order(n, seed * _EPOCHS_APART + epoch)[place_in_epoch])


def shuffled(n: int, config: Config, place: int) -> int:
    """`shuffled_number` of the configuration's seed: this package's own order."""
    return shuffled_number(n, config.train.seed, place)

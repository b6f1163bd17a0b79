"""The training objective once more, as plain `nn.Module`s, `.backward()` and torch's own optimizer.

Written from the objective's description alone, in SpecForge's order of operations, so that two
independent statements can be compared bit by bit. It shares data containers with the package and
nothing else. To read it:

- `loops.py`: what the objective is, row by row; slow, compared to rounding
- `model.py`: the draft
- `objective.py`: teacher, unroll, loss, metrics
- `update.py`: gradients, clip, AdamW, schedules
"""

from tests.reference.model import Draft
from tests.reference.objective import (
    Metrics,
    Teacher,
    forward,
    make_teacher,
    mask_counts,
    weighted_sum,
)
from tests.reference.update import ClosedCosine, RecursiveCosine, Trainer

__all__ = [
    "ClosedCosine",
    "Draft",
    "Metrics",
    "RecursiveCosine",
    "Teacher",
    "Trainer",
    "forward",
    "make_teacher",
    "mask_counts",
    "weighted_sum",
]

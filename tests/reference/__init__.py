"""The training objective once more, as a plain `nn.Module` with `.backward()` and torch's own optimizer.

Written from the objective's description alone, in the old tool's order of operations, so that two
independent statements can be compared bit by bit. It shares data containers with the package and nothing else.
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
    "RecursiveCosine",
    "Metrics",
    "Teacher",
    "Trainer",
    "forward",
    "make_teacher",
    "mask_counts",
    "weighted_sum",
]

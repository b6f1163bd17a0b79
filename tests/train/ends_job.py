"""What two ranks do in `test_ends.py`: a call of few updates, then one that ends by its patience.

torchrun --nproc-per-node 2 -m tests.train.ends_job OUT
"""

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from eagle3fn.base.launch import World, ranks
from tests.train.run_problem import make_problem, train_in

STEPS = 8
FEW = 3  # updates of the first call, which ends between two evaluations


def patient(out: Path, folder: Path, world: World | None = None) -> None:
    """Train in two calls, with sums that have the same bits on any number of ranks."""
    settings = {"eval_every": 2, "checkpoint_every": 2, "reduce": "tree"}
    problem = make_problem(folder / "features", STEPS, train=settings)
    config = problem.config
    problem = problem._replace(config=replace(config, train=replace(config.train, patience=1)))
    for max_steps in (FEW, None):
        train_in(out, problem, world=world or World(), max_steps=max_steps)


def main() -> None:
    """The two calls on all ranks."""
    with ranks() as world, tempfile.TemporaryDirectory() as folder:
        patient(Path(sys.argv[1]), Path(folder), world)


if __name__ == "__main__":
    main()

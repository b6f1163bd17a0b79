"""What two ranks do in `test_branch.py`: go on from a checkpoint, into another folder.

torchrun --nproc-per-node 2 -m tests.train.branch_job CHECKPOINT OUT
"""

import sys
import tempfile
from pathlib import Path

from eagle3fn.base.launch import ranks
from tests.train.run_problem import make_problem, train_in


def main() -> None:
    """Train to the end under the settings of the checkpoint's run."""
    source, out = map(Path, sys.argv[1:])
    settings = {"eval_every": 2, "checkpoint_every": 2, "keep_last": 9, "reduce": "tree"}
    with ranks() as world, tempfile.TemporaryDirectory() as folder:
        problem = make_problem(Path(folder) / "features", 6, train=settings)
        train_in(out, problem, world=world, source=source)


if __name__ == "__main__":
    main()

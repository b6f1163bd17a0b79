"""The same bits on one rank and on two: a sharded state, and sums by one binary tree.

    python examples/two_ranks.py [RUN [TARGET]]
    torchrun --nproc-per-node 2 examples/two_ranks.py [RUN [TARGET]]

Both print the same loss, bit for bit, and the same digest of all trained bits.
"""

import hashlib
from typing import Any

from problem import open_problem
from torch import Tensor

import eagle3fn as e3


def digest(leaves: dict[str, Tensor]) -> str:
    """SHA-256 of the leaves' bytes, in the order of their names."""
    found = hashlib.sha256()
    for name in sorted(leaves):
        found.update(leaves[name].numpy().tobytes())
    return found.hexdigest()[:16]


def main() -> None:
    """Make 4 updates of 4 samples each, on the ranks that there are."""
    problem = open_problem(
        objective=e3.ObjectiveConfig(ttt_length=3),
        data=e3.DataConfig(max_length=128, global_batch=4),
        train=e3.TrainConfig(steps=4, reduce="tree"),  # under "sum" two ranks round otherwise
    )
    config = problem.config

    with e3.ranks() as world:  # torchrun's; without it this process alone, and no mesh
        # Each rank holds a block of every leaf's rows, and reads its own samples of every batch.
        fns = e3.bind(config, problem.frozen, world.mesh("cpu"))
        state = fns.init_state(fns.init(config.train.seed))
        batches = e3.batches(
            problem.features, problem.kept, config, 0, 4, rank=world.rank, world=world.size
        )
        for own in batches:
            state, metrics = fns.step(state, own, donate=True)
        whole = e3.gather(state)  # every rank has all rows then

        specs: Any = e3.state_specs(config, world.mesh("cpu"))
        rows = sum(spec.local_shape[0] for spec in specs.masters.values())
        shares = world.every(f"{rows} rows of the state and {len(own)} samples an update")
        if world.main:
            for rank, share in enumerate(shares):
                print(f"rank {rank}: {share}")
            print("loss", float(metrics["loss"]).hex(), "digest", digest(whole.masters))


if __name__ == "__main__":
    main()

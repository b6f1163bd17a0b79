"""One way a rank can end, by name, for `test_launch.py`.

python -m tests.train.launch_job WAY FOLDER
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

import eagle3fn as e3
from eagle3fn.base.launch import World, leave, ranks
from eagle3fn.train.checkpoint import save_checkpoint
from eagle3fn.train.run import check_world
from tests.factories import make_frozen
from tests.train.ranks_problem import micro_batches, uneven_config

Way = Callable[[World, Path], None]
ASLEEP_S = 600


def nothing(world: World, folder: Path) -> None:
    """A program that needs no ranks."""


def work(world: World, folder: Path, steps: int = 2) -> None:
    """Train two steps and save a checkpoint."""
    config = uneven_config()
    mesh = world.mesh("cpu")
    fns = e3.bind(config, make_frozen(config), mesh)
    state = fns.init_state(fns.init(0))
    for step in range(steps):
        state, _ = fns.step(state, micro_batches(step, 1, mesh))
    save_checkpoint(folder, state, config, {}, {}, 1, world)


def destroy(world: World, folder: Path) -> None:
    """The caller destroys the process group itself."""
    work(world, folder)
    world.barrier()
    dist.destroy_process_group()


def fail(error: Exception, rank: int, others_sleep: bool = False) -> Way:
    """One rank raises; the others are at work, or asleep."""

    def way(world: World, folder: Path) -> None:
        if world.rank == rank:
            (folder / "raised").write_text(str(time.time()))
            raise error
        if others_sleep:
            time.sleep(ASLEEP_S)
        work(world, folder)

    return way


def kill(world: World, folder: Path) -> None:
    """All ranks but the first kill themselves."""
    if world.rank:
        os.kill(os.getpid(), signal.SIGKILL)
    work(world, folder)


def all_raise(world: World, folder: Path) -> None:
    """Every rank refuses the same setting."""
    check_world(uneven_config("tree"), World(world.rank, 3))


def disagree(world: World, folder: Path) -> None:
    """The ranks were started with different numbers of threads."""
    world.agree({"number of threads": 1 + world.rank})


REFUSAL = e3.UserError("this rank has had enough")
WAYS: dict[str, Way] = {
    "nothing": nothing,
    "checkpoint": work,
    "destroyed": destroy,
    "last_raises": fail(REFUSAL, 1),
    "first_raises": fail(REFUSAL, 0),
    "asleep": fail(REFUSAL, 1, others_sleep=True),
    "bug": fail(ZeroDivisionError("a bug of this rank"), 1),
    "all_raise": all_raise,
    "killed": kill,
    "threads": disagree,
}


def main(how: str, folder: Path) -> None:
    with ranks() as world:
        WAYS[how](world, folder)

    # Leaving twice does nothing the second time.
    leave()
    leave()


if __name__ == "__main__":
    try:
        main(sys.argv[1], Path(sys.argv[2]))
    except e3.UserError as message:
        print(f"job: {message}", file=sys.stderr)
        sys.exit(2)

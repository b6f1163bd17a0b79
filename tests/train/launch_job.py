"""One way a rank can end, by name, for `test_launch.py`."""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

import eagle3fn as e3
from eagle3fn.train.checkpoint import save_checkpoint
from eagle3fn.train.launch import World, leave, ranks
from eagle3fn.train.run import check_world
from tests.small import frozen_of
from tests.train.ranks_small import config_of, micro_batches


def work(world: World, folder: str, steps: int = 2) -> None:
    config = config_of()
    mesh = world.mesh("cpu")
    fns = e3.bind(config, frozen_of(config), mesh)
    state = fns.init_state(fns.init(0))
    for step in range(steps):
        state, _ = fns.step(state, micro_batches(step, 1, mesh))
    save_checkpoint(Path(folder), state, config, {}, {}, 1, world)


def destroy(world: World, folder: str) -> None:
    work(world, folder)
    world.barrier()
    dist.destroy_process_group()


def fail(error: Exception, rank: int, sleep: bool = False) -> Callable[[World, str], None]:
    """One rank raises; the others are at work, or asleep."""

    def way(world: World, folder: str) -> None:
        if world.rank == rank:
            (Path(folder) / "raised").write_text(str(time.time()))
            raise error
        if sleep:
            time.sleep(600)
        work(world, folder)

    return way


def kill(world: World, folder: str) -> None:
    if world.rank:
        os.kill(os.getpid(), signal.SIGKILL)
    work(world, folder)


WAYS: dict[str, Callable[[World, str], None]] = {
    "nothing": lambda world, folder: None,
    "checkpoint": work,
    "destroyed": destroy,
    "last_raises": fail(e3.UserError("this rank has had enough"), 1),
    "first_raises": fail(e3.UserError("this rank has had enough"), 0),
    "asleep": fail(e3.UserError("this rank has had enough"), 1, sleep=True),
    "bug": fail(ZeroDivisionError("a bug of this rank"), 1),
    "all_raise": lambda world, folder: check_world(config_of("tree"), World(world.rank, 3)),
    "killed": kill,
    "threads": lambda world, folder: world.agree({"number of threads": 1 + world.rank}),
}


def main(how: str, folder: str) -> None:
    with ranks() as world:
        WAYS[how](world, folder)
    leave()
    leave()


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except e3.UserError as message:
        print(f"job: {message}", file=sys.stderr)
        sys.exit(2)

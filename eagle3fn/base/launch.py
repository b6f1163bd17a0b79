"""Ranks: joining those that torchrun started, leaving them, and ending all when one fails.

gloo carries CPU tensors and small objects, NCCL CUDA tensors. A rank that fails writes so into
torchrun's store, which a thread of every other rank polls twice a second: so a rank that waits in a
collective ends too, and only the first rank's message is printed.
"""

import atexit
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from eagle3fn.base.errors import UserError

_FAILED = "eagle3fn/failed"  # the store's key for a failure
_POLL_S = 0.5
_GRACE_S = 2.0  # from a failure until the other ranks end
_SETTLE_S = 0.2  # for gloo's threads, at the interpreter's end


class World(NamedTuple):
    """This process among the ranks; alone by default."""

    rank: int = 0
    size: int = 1
    joined: bool = False  # there is a process group, possibly of one rank

    @property
    def main(self) -> bool:
        """True on the rank that writes files and prints."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.every(None)

    def every(self, value: Any) -> list[Any]:
        """The small objects that the ranks give, in their order."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def shared(self, value: Any) -> Any:
        """Rank 0's object, on all ranks."""
        return self.every(value if self.main else None)[0]

    def agree(self, facts: dict[str, Any]) -> None:
        """Refuse ranks that were started differently.

        Raises:
            UserError: names the first fact that is not the same on all ranks.
        """
        every = self.every(facts)
        for name, first in every[0].items():
            for rank, other in enumerate(every):
                if other.get(name) != first:
                    raise UserError(
                        f"{name} is {first!r} on rank 0, {other.get(name)!r} on rank {rank}; start "
                        "all ranks alike (OMP_NUM_THREADS sets the threads)"
                    )

    def device(self, name: str) -> str:
        """The device of this rank: the one named, or under several ranks `cuda:LOCAL_RANK` for
        "cuda".

        Raises:
            UserError: one device with a number, for several ranks.
        """
        kind, _, number = name.partition(":")
        if kind == "cpu" or self.size == 1:
            return name
        if number:
            raise UserError(
                f"train.device = {name!r} on {self.size} ranks: each needs its own; set "
                f"train.device={kind}"
            )
        return f"{kind}:{os.environ.get('LOCAL_RANK', self.rank)}"

    def mesh(self, device: str) -> DeviceMesh | None:
        """One dimension of all ranks; None without a process group."""
        return init_device_mesh(device.partition(":")[0], (self.size,)) if self.joined else None


@contextmanager
def ranks() -> Iterator[World]:
    """Join the ranks that torchrun announces in the environment.

    Without it, a world of this process alone.

    On success all ranks wait for each other before they leave; shutdown cannot fail a successful
    run. On failure the first failing rank raises its own error, the others end with exit code 1 and
    print nothing.

    Raises:
        UserError: another rank died without a message, or only some of torchrun's variables are
            set.
    """
    if "RANK" not in os.environ or dist.is_initialized():
        yield World()
        return

    store, world = _join()
    ended = threading.Event()
    watch = threading.Thread(target=_watch, args=(store, ended), name="ranks", daemon=True)
    watch.start()
    try:
        yield world
        # A group that is destroyed while a peer still writes aborts that peer.
        if dist.is_initialized():
            world.barrier()
    except BaseException as error:
        ended.set()
        if not _register_failure(store):
            # torchrun ends all ranks at the first exit: the rank that failed first must print
            # before.
            time.sleep(_GRACE_S)
            raise SystemExit(1) from None
        if _is_lost_peer(error):
            reason = str(error).splitlines()[0]
            raise UserError(
                f"rank {world.rank}: another rank is gone ({reason}); start all ranks again"
            ) from None
        raise

    ended.set()
    watch.join()
    leave()


def leave() -> None:
    """Destroy the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _join() -> tuple[Any, World]:
    from torch.distributed.rendezvous import rendezvous

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    try:
        store: Any
        store, rank, size = next(rendezvous("env://"))
    except ValueError as error:
        message = f"RANK is set, but {error}; start the ranks by torchrun, or unset RANK"
        raise UserError(message) from None

    # A worker thread of gloo frees the last collective's tensors; if the interpreter has ended by
    # then, it aborts.
    atexit.register(time.sleep, _SETTLE_S)

    dist.init_process_group(store=PrefixStore("ranks", store), rank=rank, world_size=size)
    return store.clone(), World(rank, size, joined=True)


def _register_failure(store: Any) -> bool:
    """Write this rank's failure into the store; True if no other rank failed before."""
    try:
        return store.add(_FAILED, 1) == 1
    except RuntimeError:  # the store went with the rank that held it
        return False


def _is_lost_peer(error: BaseException) -> bool:
    lost = isinstance(error, dist.DistError) or "gloo" in str(error) or "NCCL" in str(error)
    return isinstance(error, RuntimeError) and lost


def _watch(store: Any, ended: threading.Event) -> None:
    """End this process where another rank has failed, unless it ends by itself."""
    while not ended.wait(_POLL_S):
        try:
            has_failed = store.check([_FAILED])
        except RuntimeError:  # the rank that held the store is gone
            has_failed = True
        if has_failed and not ended.wait(_GRACE_S):
            os._exit(1)

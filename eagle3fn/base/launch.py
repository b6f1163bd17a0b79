"""Ranks: joining those that torchrun started, leaving them, and ending all when one fails.

gloo carries CPU tensors and small objects, NCCL CUDA tensors. A rank that fails writes so into
torchrun's store, which a thread of every other rank polls twice a second: so a rank that waits in a
collective ends too, and only the first rank's message is printed.

A collective gives up after minutes: what may take hours is waited for by `World.meet`, in the
store.
"""

import atexit
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from eagle3fn.base.errors import UserError

_FAILED = "eagle3fn/failed"  # the store's key for a failure
_ALIVE = "eagle3fn/alive"  # … and of a rank's signs of life
_POLL_S = 0.5
_MEET_S = 0.2  # between two looks for the other ranks
_SILENT_S = 60.0  # without a sign of life, after which a rank is gone
_GRACE_S = 2.0  # from a failure until the other ranks end
_SETTLE_S = 0.2  # for gloo's threads, at the interpreter's end


class World(NamedTuple):
    """This process among the ranks; alone by default."""

    rank: int = 0
    size: int = 1
    joined: bool = False  # there is a process group, possibly of one rank
    store: Any = None  # torchrun's, where there is a process group

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

    def post(self, name: str, value: Any) -> None:
        """Leave a JSON value under a name, in place of this rank's last one, for `posted`."""
        if self.size > 1:
            self.store.set(f"{name}/{self.rank}", json.dumps(value))

    def posted(self, name: str) -> list[Any]:
        """What the other ranks have left under a name so far; nobody is waited for."""
        keys = [f"{name}/{rank}" for rank in range(self.size) if rank != self.rank]
        return [json.loads(self.store.get(key)) for key in keys if self.store.check([key])]

    def meet(self, name: str, value: Any, on_wait: Callable[[], None] = lambda: None) -> list[Any]:
        """Wait for all ranks, however long; the JSON values that they bring, in their order.

        Args:
            name: of the place; another one each time.
            value: this rank's.
            on_wait: called again and again while others are missing, and when all are there.

        Raises:
            UserError: a rank is missing and gives no sign of life.
        """
        if self.size == 1:
            return [value]
        self.post(name, value)
        keys = [f"{name}/{rank}" for rank in range(self.size)]
        signs = _Signs(self.store)
        while not self.store.check(keys):
            on_wait()
            for rank, key in enumerate(keys):
                if not self.store.check([key]):
                    signs.check(rank)
            time.sleep(_MEET_S)
        on_wait()
        return [json.loads(self.store.get(key)) for key in keys]

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

    def device(self, name: str, option: str = "train.device") -> str:
        """The device of this rank: the one named, or under several ranks `cuda:LOCAL_RANK` for
        "cuda". `option` is what named it.

        Raises:
            UserError: one device with a number, for several ranks.
        """
        kind, _, number = name.partition(":")
        if kind == "cpu" or self.size == 1:
            return name
        if number:
            raise UserError(
                f"{option} = {name!r} on {self.size} ranks: each needs its own; set {option}={kind}"
            )
        return f"{kind}:{os.environ.get('LOCAL_RANK', self.rank)}"

    def mesh(self, device: str) -> DeviceMesh | None:
        """One dimension of all ranks; None without a process group."""
        return init_device_mesh(device.partition(":")[0], (self.size,)) if self.joined else None


class _Signs:
    """The ranks' signs of life, which their threads leave in the store."""

    def __init__(self, store: Any) -> None:
        self.store = store
        self.last: dict[int, tuple[bytes, float]] = {}  # and when each was first seen

    def check(self, rank: int) -> None:
        """Refuse to wait for a rank whose last sign is old."""
        key = f"{_ALIVE}/{rank}"
        found = self.store.get(key) if self.store.check([key]) else b""
        now = time.monotonic()
        sign, since = self.last.get(rank, (None, now))
        if found != sign:
            self.last[rank] = (found, now)
        elif now - since > _SILENT_S:
            raise UserError(
                f"rank {rank} is gone: no sign of life for {_SILENT_S:.0f} s; start all ranks again"
            )


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
    watch = threading.Thread(
        target=_watch, args=(store, ended, world.rank), name="ranks", daemon=True
    )
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
    return store.clone(), World(rank, size, joined=True, store=store.clone())


def _register_failure(store: Any) -> bool:
    """Write this rank's failure into the store; True if no other rank failed before."""
    try:
        return store.add(_FAILED, 1) == 1
    except RuntimeError:  # the store went with the rank that held it
        return False


def _is_lost_peer(error: BaseException) -> bool:
    lost = isinstance(error, dist.DistError) or "gloo" in str(error) or "NCCL" in str(error)
    return isinstance(error, RuntimeError) and lost


def _watch(store: Any, ended: threading.Event, rank: int) -> None:
    """Give signs of life; end this process where another rank has failed, unless it ends itself."""
    for sign in count():
        if ended.wait(_POLL_S):
            return
        try:
            store.set(f"{_ALIVE}/{rank}", str(sign))
            has_failed = store.check([_FAILED])
        except RuntimeError:  # the rank that held the store is gone
            has_failed = True
        if has_failed and not ended.wait(_GRACE_S):
            os._exit(1)

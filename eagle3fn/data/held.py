"""A folder that is written over time, held by one program: a process, or the ranks of one run."""

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from eagle3fn.base.files import LOCK, locked, locked_too
from eagle3fn.base.launch import World
from eagle3fn.data.target_files import KEPT


@contextmanager
def held(
    folder: str | Path,
    notes: Collection[str] = (),
    ours: bool = False,
    world: World = World(),  # noqa: B008
) -> Iterator[None]:
    """Hold `folder` until the block ends; one that was made here is removed then if it has no work.

    All ranks call, and hold it together: until the last one of them ends, no other program may.

    Args:
        folder: made if need be; a link to a folder is followed.
        notes: names of files in it that are no work.
        ours: its name is the package's own: without work it is removed even if it was there before.
        world: the ranks; rank 0 makes the folder and removes it.

    Raises:
        UserError: another process holds it, or it is no folder.
    """
    if not world.main:
        world.barrier()  # rank 0 holds it
        with locked_too(folder):
            yield
        world.barrier()  # rank 0 may remove it
        return

    with locked(folder, shared=world.size > 1) as is_new:
        try:
            world.barrier()
            yield
            world.barrier()
        finally:
            if is_new or ours:
                _remove_without_work(Path(os.path.realpath(folder)), {LOCK, KEPT, *notes})


def _remove_without_work(folder: Path, notes: Collection[str]) -> None:
    """Remove a folder that holds nothing but notes; its lock is held."""
    # After the lock's file is gone, another process may hold the folder: then it is not empty.
    with suppress(OSError):
        found = set(os.listdir(folder))
        if found <= set(notes):
            for name in [*sorted(found - {LOCK}), LOCK]:
                (folder / name).unlink()
            folder.rmdir()

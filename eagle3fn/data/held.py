"""A folder that is written over time, held by one process."""

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from eagle3fn.base.files import LOCK, locked
from eagle3fn.data.target_files import KEPT


@contextmanager
def held(folder: str | Path, notes: Collection[str] = (), ours: bool = False) -> Iterator[None]:
    """Hold `folder` until the block ends; one that was made here is removed then if it has no work.

    Args:
        folder: made if need be; a link to a folder is followed.
        notes: names of files in it that are no work.
        ours: its name is the package's own: without work it is removed even if it was there before.

    Raises:
        UserError: another process holds it, or it is no folder.
    """
    with locked(folder) as is_new:
        try:
            yield
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

"""A folder that is written over time, held by one process."""

import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from eagle3fn.base.files import locked
from eagle3fn.data.target_files import KEPT

_OWN = (".lock", KEPT)


@contextmanager
def held(folder: str | Path, notes: Collection[str] = ()) -> Iterator[None]:
    """Hold `folder` until the block ends; a folder without any work in it is removed then.

    Args:
        folder: made if need be.
        notes: names of files in it that are no work.

    Raises:
        UserError: another process holds it, or it is no folder.
    """
    folder = Path(folder)
    with locked(folder):
        try:
            yield
        finally:
            if {path.name for path in folder.iterdir()} <= {*_OWN, *notes}:
                shutil.rmtree(folder)

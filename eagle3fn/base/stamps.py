"""What changes when a file is written or replaced, read without its bytes."""

import os
from pathlib import Path

Stamp = tuple[int, int, int]
"""A file's inode, its size in bytes, and the time of its last change in ns."""

Stamps = dict[str, Stamp]
"""The stamp of each of several files, by its name."""


def stamp_of(file: str | Path) -> Stamp:
    """A file's stamp; that of the file that a link leads to.

    Raises:
        OSError: no such file, or one that may not be looked at.
    """
    found = os.stat(file)
    return found.st_ino, found.st_size, found.st_mtime_ns

"""Whether the files of rows stay as they were while they are read."""

from pathlib import Path

from eagle3fn.base.errors import UserError
from eagle3fn.data.row_files import data_files

Stamps = list[tuple[str, int, int]]
"""Of each file its name, its size in bytes and the time of its last change in ns."""


def stamps_of(path: str | Path) -> Stamps:
    """The files that `data.row_files.read_rows` reads, as they are now.

    Raises:
        UserError: no such file, or a folder that does not say which rows are meant.
    """
    found = [(file.name, file.stat()) for file in data_files(path)]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in found]


def check_stamps(path: str | Path, stamps: Stamps) -> None:
    """Refuse files that have changed since `stamps_of`.

    Raises:
        UserError: they have.
    """
    if stamps_of(path) != stamps:
        raise UserError(
            f"{path}: changed while it was read; wait until it is written, and call again"
        )

"""Whether the files of rows stay as they were while they are read."""

from pathlib import Path

from eagle3fn.base.errors import UserError
from eagle3fn.base.stamps import Stamps, stamp_of
from eagle3fn.data.row_files import data_files


def stamps_of(path: str | Path) -> Stamps:
    """The files that `data.row_files.read_rows` reads, as they are now, by their paths.

    Raises:
        UserError: no such file, or a folder that does not say which rows are meant.
    """
    return {str(file): stamp_of(file) for file in data_files(path)}


def check_stamps(path: str | Path, stamps: Stamps) -> None:
    """Refuse files that have changed since `stamps_of`.

    Raises:
        UserError: they have.
    """
    if stamps_of(path) != stamps:
        raise UserError(
            f"{path}: changed while it was read; wait until it is written, and call again"
        )

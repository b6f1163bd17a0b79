"""The finished batches of a file of conversations that is being written, in `<out>.parts/`."""

import os
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

from eagle3fn.base.errors import UserError
from eagle3fn.base.files import json_sha256, write_jsonl
from eagle3fn.base.places import check_out_file
from eagle3fn.base.read import read_jsonl
from eagle3fn.base.temporary import clear
from eagle3fn.base.threads import Kept, keep_threads, read_kept
from eagle3fn.data.held import held
from eagle3fn.data.row_files import read_rows
from eagle3fn.data.target_files import KEPT, loaded_digest
from eagle3fn.data.template import ChatTemplate

_THREADS = "threads.json"
_OWN_ID = re.compile(r"\d+-\d+")  # seed and number


class Parts(NamedTuple):
    """The finished batches of a file that is being written, kept in `<out>.parts/`."""

    out: str | Path
    digest: str  # of all that the batches are made from; those of another one are not read

    @property
    def folder(self) -> Path:
        """Where they are kept."""
        return Path(f"{self.out}.parts")

    def batch(self, index: int, write: Callable[[], list[Any]]) -> list[Any]:
        """The rows of batch `index`: read if they were written before, else `write()`."""
        part = self.folder / f"{self.digest}-{index:05d}.jsonl"
        if not part.exists():
            keep_threads(self.folder / _THREADS)
            write_jsonl(part, write())
        return read_jsonl(part)

    def finish(self, rows: list[dict]) -> None:
        """Write `out`; then the parts, and what a kill left of one, are deleted."""
        write_jsonl(self.out, rows)
        for part in self.folder.glob(f"{self.digest}-*"):
            clear(part)
            part.unlink()


def check_out_conversations(out: str | Path) -> None:
    """Refuse a place for conversations: a file whose rows were not written here.

    Raises:
        UserError: as `base.places.check_out_file`; there are other rows, or none can be read.
    """
    check_out_file(out)
    if not os.path.lexists(out) or not os.path.getsize(out):
        return
    first = next(iter(read_rows(out)), None)
    row = first.value if first is not None and isinstance(first.value, dict) else {}
    is_own = isinstance(row.get("id"), str) and _OWN_ID.fullmatch(row["id"])
    is_answer = type(row.get("answers")) is int and type(row.get("cut")) is int
    if not (is_own or is_answer):
        raise UserError(
            f"{out}: holds rows that eagle3fn did not write; name a new file, or remove this one"
        )


def hold_parts(out: str | Path) -> AbstractContextManager[None]:
    """Hold the batches of `out`; afterwards their folder is removed, unless some are left in it.

    Raises:
        UserError: another process writes `out`.
    """
    return held(Parts(out, "").folder, [_THREADS], ours=True)


def begun_threads(out: str | Path) -> Kept | None:
    """The number of threads that a call that writes `out` began with, if it was cut off."""
    return read_kept(Parts(out, "").folder / _THREADS)


def parts_digest(model: Any, template: ChatTemplate, out: str | Path, *settings: Any) -> str:
    """Digest of all that the batches of `out` are made from: target, template and settings."""
    target = loaded_digest(model, Parts(out, "").folder / KEPT)
    made_from = [target, template.tokenizer.chat_template, template.arguments, *settings]
    return json_sha256(made_from)[:12]

"""Rows that cannot be used: all counted, the first ones named, left out only where that is asked.

Rows that are good but give no sample are counted by their reasons (`Dropped`).
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar

from eagle3fn.base.errors import UserError
from eagle3fn.base.files import whole_file
from eagle3fn.data.row_files import FileRow

SKIPPED_SHARE = 0.05
"""The share of bad rows that `--skip-bad` leaves out."""

MEND = "mend or delete them"
MEND_OR_SKIP = "mend them, or go on without them by --skip-bad {share:g}"
"""A remedy; `share` is the smallest of `sufficient` rows. Where all are bad it is `MEND`."""

_NAMED = 5  # bad rows in a message
_JUDGED = 200  # rows after which a share of bad ones says something of the file
_ID = re.compile(r" \(id [^)]*\)")
_ROW_REMEDY = re.compile(r"; mend or delete (it|the (row|line|item))$")

Made = TypeVar("Made")


class Rejects:
    """The bad rows of one source: how many, the first few, and all of them in a file.

    Made by `rejecting`.
    """

    def __init__(
        self,
        source: str | Path,
        limit: float | None = None,
        file: IO[str] | None = None,
        remedy: str = MEND,
    ) -> None:
        self.source = source
        self.limit = limit
        self.file = file
        self.remedy = remedy
        self.rows = 0  # read, good or bad
        self.bad = 0
        self.reasons: dict[str, list[str]] = {}  # places by reason, of each the first few
        self.counts: Counter[str] = Counter()  # rows by reason

    def read(self, rows: int = 1) -> None:
        """Count rows that were read, good or bad."""
        self.rows += rows

    def add(self, where: str, reason: str, value: Any = None) -> None:
        """Reject a row. It must have been counted by `read`.

        `reason` may begin with the row's place, as an error of the row does.

        Raises:
            UserError: more rows are bad than the limit allows, of 200 or more.
        """
        message = reason if reason.startswith(where) else f"{where}: {reason}"
        place, reason = _parted(where, message)
        self.bad += 1
        self._keep(place, _ROW_REMEDY.sub("", reason))
        if self.file is not None:
            # ASCII: a row may hold half of a surrogate pair, which UTF-8 has no bytes for.
            row = {"where": where, "reason": reason, "row": value}
            self.file.write(json.dumps(row) + "\n")
        if self.limit is not None and self.rows >= _JUDGED:
            self.check()

    def _keep(self, place: str, reason: str) -> None:
        """Keep a reason and its place for the message, which names few of both."""
        if reason not in self.reasons and len(self.reasons) > _NAMED:
            return
        self.counts[reason] += 1
        places = self.reasons.setdefault(reason, [])
        if len(places) < _NAMED:
            places.append(place)

    def check(self) -> None:
        """Refuse the rows read so far if too many are bad: any, or more than the limit.

        Raises:
            UserError: with their number, the first few and the remedy.
        """
        if self.limit is None and self.bad:
            raise UserError(self._message("", self._remedy(self.remedy)))
        if self.limit is not None and self.bad > allowed(self.limit, self.rows):
            raise UserError(
                self._message(
                    f", more than the share {self.limit:g} that is left out",
                    self._remedy("mend them, or give --skip-bad {share:g}, which these need"),
                )
            )

    def _remedy(self, words: str) -> str:
        """What to do, with the share that would do; no share helps where all rows are bad."""
        if self.bad == self.rows:
            return MEND
        return words.format(share=sufficient(self.bad, self.rows))

    def describe(self) -> str:
        """One line on the rows that were left out; empty if there are none."""
        return self._message("", "left out") if self.bad else ""

    def _message(self, note: str, remedy: str) -> str:
        rows = f"{self.bad} of {self.rows} rows {'is' if self.bad == 1 else 'are'} bad"
        reasons = [self._told(reason) for reason in list(self.reasons)[:_NAMED]]
        more = ["…"] if len(self.reasons) > len(reasons) else []
        return f"{self.source}: {rows}{note}: {'; '.join(reasons + more)}; {remedy}"

    def _told(self, reason: str) -> str:
        """A reason and the first rows that have it, whose file is named once."""
        first, *rest = self.reasons[reason]
        places = ", ".join([first, *(place.removeprefix(str(self.source)) for place in rest)])
        more = self.counts[reason] - len(self.reasons[reason])
        return f"{places}{f' and {more} more' if more else ''}: {reason}"


def _parted(where: str, message: str) -> tuple[str, str]:
    """A row's place, with its id if the message has it, and the reason."""
    rest = message.removeprefix(where)
    named = _ID.match(rest)
    place = where + (named[0] if named else "")
    return place, message.removeprefix(place).lstrip(": ")


def allowed(limit: float, rows: int) -> int:
    """How many of `rows` may be bad where a share `limit` may: one at least, none of a share 0.

    >>> [allowed(0.05, rows) for rows in (0, 1, 39, 40, 1000)], allowed(0, 1000)
    ([1, 1, 1, 2, 50], 0)
    """
    return max(1, int(limit * rows)) if limit else 0


def sufficient(bad: int, rows: int) -> float:
    """The smallest share, in steps of 0.05, that leaves out `bad` of `rows`.

    >>> [sufficient(bad, 10) for bad in (1, 2, 3, 10)]
    [0.05, 0.2, 0.3, 1.0]
    """
    return next(step / 20 for step in range(1, 21) if allowed(step / 20, rows) >= bad)


@contextmanager
def rejecting(
    source: str | Path,
    limit: float | None = None,
    path: str | Path | None = None,
    remedy: str = MEND,
) -> Iterator[Rejects]:
    """Yield what collects the bad rows of `source`; at the block's end, judge them.

    Args:
        source: the name of the rows' file, for messages.
        limit: the share of the rows that may be bad and are left out, one row at least; None: none
            may, and all are read before that is said.
        path: the file of rejected rows, JSONL of `{"where", "reason", "row"}`: written at the
            block's end, whole or not at all, empty if none was bad.
        remedy: what to do where none may be bad; `MEND`, or `MEND_OR_SKIP`.

    Raises:
        UserError: one or more bad rows, or more than the limit.
    """
    if path is None:
        rejects = Rejects(source, limit, None, remedy)
        yield rejects
        rejects.check()
    else:
        with whole_file(path) as temporary, temporary.open("w", encoding="ascii") as file:
            rejects = Rejects(source, limit, file, remedy)
            yield rejects
            rejects.check()


def usable(
    rows: Iterable[FileRow], make: Callable[[FileRow], Made], rejects: Rejects
) -> Iterator[Made]:
    """What `make` gives for each row. A row with a fault, or with a UserError, is rejected."""
    for row in rows:
        rejects.read()
        try:
            if row.fault is not None:
                raise UserError(row.fault)
            made = make(row)
        except UserError as error:
            rejects.add(row.where, str(error), row.value)
        else:
            yield made


class Dropped(Counter[str]):
    """How many good rows gave no sample, by the reason, such as "have no assistant turn"."""

    def describe(self, rows: int, name: str = "conversations") -> str:
        """One line for people, the most frequent reason first; empty if none was dropped.

        >>> Dropped({"have no assistant turn": 1, "are too long": 2}).describe(5)
        '3 of 5 conversations dropped: 2 are too long, 1 have no assistant turn'
        """
        return self.describe_reasons(f"{self.total()} of {rows} {name} dropped")

    def describe_reasons(self, what: str) -> str:
        """The reasons after `what`, the most frequent first; empty if there are none."""
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.in_order())
        return f"{what}: {reasons}" if reasons else ""

    def in_order(self) -> list[tuple[str, int]]:
        """The most frequent first; alike ones by their names."""
        return sorted(self.items(), key=lambda item: (-item[1], item[0]))

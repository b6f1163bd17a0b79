"""A conversations' file to samples: streamed, in several processes, every loss counted.

Samples go to a file, in the rows' order, so memory does not grow with their number.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch

from eagle3fn.base.errors import UserError
from eagle3fn.base.signals import children_spared
from eagle3fn.base.stamps import Stamps
from eagle3fn.data.rejects import MEND_OR_SKIP, Dropped, rejecting
from eagle3fn.data.row_files import FileRow, read_rows
from eagle3fn.data.row_stamps import check_stamps, stamps_of
from eagle3fn.data.row_values import name_of
from eagle3fn.data.sample_file import PackedSample, SampleFile, pack
from eagle3fn.data.samples import (
    NO_ANSWER,
    NO_QUESTION,
    NOT_TRAINED,
    TOO_LONG,
    Encoded,
    SampleMaker,
)
from eagle3fn.data.template import NoChatTemplateError
from eagle3fn.data.turns import conversation_of
from eagle3fn.data.written import EMPTY, NO_THOUGHT

_CHUNK = 64  # rows that a process takes at once
_ALONE = 2048  # rows before further processes are started: each takes seconds to begin
_AHEAD = 4  # chunks that are given to a process before its first result is taken


class EncodedRow(NamedTuple):
    """What became of a row."""

    where: str
    name: str  # its id, or its number
    number: str  # its line, or its place in its file
    samples: list[PackedSample]
    dropped: list[str]  # reasons, one an answer without a sample
    fault: str | None  # why the row is bad
    value: Any  # of a bad row, for the rejects' file
    unused: frozenset[str] = frozenset()  # its keys that were not read
    notes: tuple[str, ...] = ()  # what is worth a look, one an answer
    cut: int = 0  # supervised tokens beyond the maximal length


class EncodedFile(NamedTuple):
    """The samples of a file, and what it has besides them."""

    samples: SampleFile
    rows: int  # read
    rejected: int  # bad rows that were left out
    dropped: Dropped  # good rows without a sample, by reason
    lost: Dropped  # answers without a sample in rows with one, by reason
    unused: Dropped  # rows that have a key which is not read, by the key
    notes: Dropped  # answers that are worth a look, by what is to be seen
    cut_rows: int  # with supervised tokens beyond the maximal length
    cut_tokens: int  # so many

    def counts(self) -> dict[str, Any]:
        """What an index says of the rows, and `describe_counts` puts into words."""
        return {
            "rows": self.rows,
            "rejected": self.rejected,
            "dropped": self.dropped.total(),
            "dropped_reasons": dict(self.dropped),
            "lost_answers": dict(self.lost),
            "unused_keys": dict(self.unused),
            "notes": dict(self.notes),
            "cut_rows": self.cut_rows,
            "cut_tokens": self.cut_tokens,
        }


def describe_counts(counts: dict[str, Any], rejects: str | Path | None = None) -> list[str]:
    """Lines that tell what was left out, the most frequent reason first; none if nothing was.

    Args:
        counts: as `EncodedFile.counts` gives them.
        rejects: the file of bad rows.
    """
    rows = counts["rows"]
    lines = []
    if counts["rejected"]:
        written = f", written to {rejects}" if rejects else ""
        lines.append(f"{counts['rejected']} of {rows} rows are bad{written}")
    lines.append(Dropped(counts["dropped_reasons"]).describe(rows))
    lines.append(Dropped(counts["lost_answers"]).describe_reasons("answers left out of kept rows"))
    if counts["cut_rows"]:
        lines.append(
            f"{counts['cut_tokens']} supervised tokens of {counts['cut_rows']} conversations are "
            "cut off at the maximal length"
        )
    lines.append(Dropped(counts["notes"]).describe_reasons("answers worth a look"))
    if counts["unused_keys"]:
        keys = Dropped(counts["unused_keys"]).in_order()
        counted = ", ".join(f"{key} ({number})" for key, number in keys)
        lines.append(f"keys that are not read: {counted}")
    return [line for line in lines if line]


def encode_file(
    maker: SampleMaker,
    conversations: str | Path,
    vocab_size: int | None,
    *,
    path: str | Path | None = None,
    limit: int | None = None,
    processes: int = 1,
    skip_bad: float | None = None,
    rejects: str | Path | None = None,
    stamps: Stamps | None = None,
    on_progress: Callable[[int], None] = lambda rows: None,
    on_row: Callable[[EncodedRow], None] = lambda row: None,
) -> EncodedFile:
    """Encode the first `limit` rows of a file (all, if None).

    Args:
        maker: makes the samples.
        conversations: a file or folder that `read_rows` reads.
        vocab_size: the target's, V; None where it is not known.
        path: the file that the samples are written to; None: a temporary one.
        limit: rows read.
        processes: processes that encode, where there are more than a few thousand rows.
        skip_bad: the share of rows that may be bad and are left out; None: none may, and all are
            counted before that is said.
        rejects: the file that rows left out are written to.
        stamps: the file's, of a time since when it must not have changed; None: of now.
        on_progress: called with the rows done.
        on_row: called with each row.

    Raises:
        UserError: an unreadable file, or one that changes while it is read; no rows, bad rows, an
            id outside the target's vocabulary, or no sample at all. The message counts them and
            names the first.
    """
    stamps = stamps_of(conversations) if stamps is None else stamps
    samples = SampleFile(path)
    dropped = Dropped()
    lost = Dropped()
    unused = Dropped()
    notes = Dropped()
    cut_rows = 0
    cut_tokens = 0
    bad_rows = None if skip_bad is None else rejects
    try:
        with rejecting(conversations, skip_bad, bad_rows, MEND_OR_SKIP) as bad:
            for row in encode_rows(maker, conversations, limit, processes):
                bad.read()
                on_row(row)
                on_progress(bad.rows)
                unused.update(row.unused)
                notes.update(row.notes)
                cut_rows += row.cut > 0
                cut_tokens += row.cut
                if row.fault:
                    bad.add(row.where, row.fault, row.value)
                elif row.samples:
                    lost.update(row.dropped)
                else:
                    dropped.update(row.dropped[:1])
                for sample in row.samples:
                    _check_id(sample.highest_id, vocab_size, row.where)
                    samples.append(sample)
            check_stamps(conversations, stamps)
        if not bad.rows:
            raise UserError(f"{conversations}: no rows; write one JSON object a line")
        if not samples:
            raise _no_sample(conversations, bad.rows, dropped, unused, bad.describe())
    except BaseException:
        samples.close()
        raise
    return EncodedFile(
        samples, bad.rows, bad.bad, dropped, lost, unused, notes, cut_rows, cut_tokens
    )


def encode_all(
    maker: SampleMaker, conversations: str | Path, vocab_size: int, limit: int | None = None
) -> list[Encoded]:
    """The samples of the first `limit` rows of a file, in memory; for `data.online`.

    Raises:
        UserError: as `encode_file`.
    """
    with encode_file(maker, conversations, vocab_size, limit=limit).samples as samples:
        return samples[:]


_REMEDIES = {
    NO_ANSWER: "give each conversation an answer: the target's own by eagle3fn regenerate (for a "
    "vocabulary map a few hundred are enough, --limit 500); train --online lets the target write "
    "them by --generate",
    NO_QUESTION: "put a user turn before the first answer",
    NOT_TRAINED: "give an answer weight 1",
    TOO_LONG: "raise --max-length",
    EMPTY: "write the answers",
    NO_THOUGHT: "let the target answer anew by eagle3fn regenerate, or give a "
    "--template-arg that turns thinking off",
}


def _no_sample(
    conversations: str | Path, rows: int, dropped: Dropped, unused: Dropped, bad: str
) -> UserError:
    """The error of a file without a sample: why, and what to do about the most frequent reason."""
    reasons = [dropped.describe(rows), bad]
    if unused:
        reasons.append(f"keys that are not read: {', '.join(key for key, _ in unused.in_order())}")
    remedy = _REMEDIES[dropped.in_order()[0][0]] if dropped else "mend the rows"
    return UserError(f"{conversations}: no sample: {'; '.join(filter(None, reasons))}; {remedy}")


def _check_id(highest: int, vocab_size: int | None, where: str) -> None:
    if vocab_size is not None and highest >= vocab_size:
        raise UserError(
            f"{where}: token id {highest}: the target's vocabulary has {vocab_size}; "
            "take the tokenizer that belongs to the target"
        )


# Rows


def encode_rows(
    maker: SampleMaker, conversations: str | Path, limit: int | None = None, processes: int = 1
) -> Iterator[EncodedRow]:
    """Encode rows as they are read, in their order.

    With several `processes` a few chunks of rows are read ahead. Closing the iterator ends them.
    """
    rows = islice(read_rows(conversations), limit)
    for row in islice(rows, _ALONE if processes > 1 else None):
        yield encode_row(maker, row)

    first = list(islice(rows, _CHUNK))
    if first:
        with ExitStack() as stack:
            pool = stack.enter_context(
                ProcessPoolExecutor(
                    processes, get_context("spawn"), initializer=_begin, initargs=(maker,)
                )
            )
            stack.callback(pool.shutdown, wait=False, cancel_futures=True)
            yield from _from_pool(pool, processes, first, rows)


def _from_pool(
    pool: ProcessPoolExecutor,
    processes: int,
    first: list[FileRow],
    rows: Iterator[FileRow],
) -> Iterator[EncodedRow]:
    running: deque[Future[list[EncodedRow]]] = deque()
    chunk = first
    while chunk or running:
        while chunk and len(running) < _AHEAD * processes:
            with children_spared():  # the first submission starts the processes
                running.append(pool.submit(_encode_chunk, chunk))
            chunk = list(islice(rows, _CHUNK))
        try:
            yield from running.popleft().result()
        except BrokenProcessPool:
            raise UserError(
                "a process that encodes conversations ended; is there enough memory? "
                "read fewer rows at a time with --limit"
            ) from None


_maker: SampleMaker | None = None  # of a process of the pool


def _begin(maker: SampleMaker) -> None:
    global _maker  # noqa: PLW0603
    _maker = maker
    torch.set_num_threads(1)


def _encode_chunk(rows: list[FileRow]) -> list[EncodedRow]:
    assert _maker
    return [encode_row(_maker, row) for row in rows]


def encode_row(maker: SampleMaker, row: FileRow) -> EncodedRow:
    """Encode one row; a fault is returned, not raised. A row without an id is named by its number.

    Raises:
        NoChatTemplateError: the row has turns, and the target no chat template.
    """
    where = row.where
    if row.fault:
        return EncodedRow(where, row.number, row.number, [], [], row.fault, row.value)

    value = row.value
    given = name_of(value)
    name = given or row.number
    if given:
        where += f" (id {given})"
    try:
        conversation = conversation_of(value, where)
        found = maker.samples(name, conversation, where)
    except NoChatTemplateError:
        raise
    except UserError as error:
        reason = str(error).removeprefix(f"{where}: ")
        return EncodedRow(where, name, row.number, [], [], reason, value)
    return EncodedRow(
        where=where,
        name=name,
        number=row.number,
        samples=[pack(sample) for sample in found.samples],
        dropped=found.dropped,
        fault=None,
        value=None,
        unused=conversation.unused,
        notes=tuple(found.notes),
        cut=found.cut,
    )

"""What is trained on of a file of conversations: samples as text, and counts. Needs no target."""

import statistics
from array import array
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eagle3fn.base.draft_config import DEFAULT_TAPS
from eagle3fn.base.errors import UserError, one_line
from eagle3fn.base.types import VocabMap
from eagle3fn.data.encode import EncodedRow, describe_counts, encode_file
from eagle3fn.data.feature_size import bytes_per_token, size_text
from eagle3fn.data.samples import Encoded, SampleMaker
from eagle3fn.data.storage import STORES
from eagle3fn.data.vocab import coverage

_COLOUR = "\x1b[32m"  # green
_DIM = "\x1b[2m"
_PLAIN = "\x1b[0m"


class Inspection(NamedTuple):
    """Numbers of a file's samples."""

    counts: dict[str, Any]  # rows, and what was left out (`EncodedFile.counts`)
    samples: int
    tokens: int
    supervised: int  # tokens
    median_length: float  # tokens
    long_length: int  # nine of ten samples are at most so long
    longest: int
    full: int  # samples that have the maximal length
    coverage: float | None  # the share of supervised tokens that a map has
    bytes: int | None  # that features will take in bfloat16, where the hidden size is known
    smaller: dict[str, int] | None  # … and in each store of `data.storage`
    shown: list[Encoded]  # the samples to print
    missing: list[str]  # of the row that was asked for: what is not trained, and why


def inspect_file(
    maker: SampleMaker,
    conversations: str | Path,
    *,
    limit: int | None = None,
    processes: int = 1,
    skip_bad: float | None = None,
    show: int = 2,
    row_id: str | None = None,
    vocab_map: VocabMap | None = None,
    hidden_size: int | None = None,
    on_rows: Callable[[int], None] = lambda rows: None,
) -> Inspection:
    """Make the samples of a file and count.

    Args:
        maker: makes the samples.
        conversations: a file or folder that `data.row_files.read_rows` reads.
        limit: rows read; None, all.
        processes: processes that encode.
        skip_bad: the share of rows that may be bad; None: bad rows are refused. Nothing is written.
        show: samples to keep for printing.
        row_id: keep those of the row with this id, or on this line, in place of the first ones.
        vocab_map: its coverage is counted.
        hidden_size: the target's, Ht.
        on_rows: called with the rows done.

    Raises:
        UserError: as `encode_file`; no row with `row_id`.
    """
    vocab_size = None if vocab_map is None else len(vocab_map.t2d)
    asked = _Asked(row_id)
    encoded = encode_file(
        maker,
        conversations,
        vocab_size,
        limit=limit,
        processes=processes,
        skip_bad=skip_bad,
        on_progress=on_rows,
        on_row=asked.see,
    )
    if row_id is not None and not asked.rows:
        encoded.samples.close()
        raise UserError(
            f"--id {row_id}: no such row among {encoded.rows} of {conversations}; give the id of a "
            "row, or its line"
        )

    lengths = array("q")
    supervised = 0
    counts = torch.zeros(vocab_size or 0, dtype=torch.int64)  # (V,)
    shown: list[Encoded] = []
    with encoded.samples as samples:
        for number, sample in enumerate(samples):
            lengths.append(len(sample.input_ids))
            trained = sample.input_ids[sample.token_mask == 1]
            supervised += len(trained)
            if vocab_size:
                counts += torch.bincount(trained, minlength=vocab_size)
            if len(shown) < show if row_id is None else number in asked.samples:
                shown.append(sample)

    tokens = sum(lengths)
    size = None
    if hidden_size is not None:
        size = tokens * bytes_per_token(hidden_size, DEFAULT_TAPS, torch.bfloat16)
    in_order = sorted(lengths)
    return Inspection(
        counts=encoded.counts(),
        samples=len(lengths),
        tokens=tokens,
        supervised=supervised,
        median_length=statistics.median(in_order),
        long_length=in_order[(9 * len(in_order) - 1) // 10],
        longest=in_order[-1],
        full=sum(length == maker.max_length for length in lengths),
        coverage=None if vocab_map is None else coverage(vocab_map, counts),
        bytes=size,
        smaller=None if hidden_size is None else _smaller(tokens, hidden_size),
        shown=shown,
        missing=asked.missing,
    )


def _smaller(tokens: int, hidden_size: int) -> dict[str, int]:
    """Bytes of the features in each smaller store."""
    sizes = (hidden_size, DEFAULT_TAPS, torch.bfloat16)
    return {store: tokens * bytes_per_token(*sizes, store) for store in STORES}


class _Asked:
    """What is found of the row that is asked for."""

    def __init__(self, row_id: str | None) -> None:
        self.row_id = row_id
        self.rows = 0
        self.samples: set[int] = set()  # their numbers in the file of samples
        self.missing: list[str] = []
        self._count = 0  # samples so far

    def see(self, row: EncodedRow) -> None:
        """Look at the next row."""
        first = self._count
        self._count += len(row.samples)
        if self.row_id in (row.name, row.number):
            self.rows += 1
            self.samples.update(range(first, self._count))
            reasons = [row.fault] if row.fault else row.dropped
            self.missing += [f"{row.where}: {reason}" for reason in reasons]


def numbers(found: Inspection) -> dict[str, Any]:
    """The numbers as JSON values."""
    tree = found._asdict()
    del tree["shown"], tree["missing"]
    return {**tree.pop("counts"), **tree}


def describe(found: Inspection, conversations: str) -> str:
    """The numbers as lines of a name and what it is."""
    rows = found.counts["rows"]
    kept = rows - found.counts["rejected"] - found.counts["dropped"]
    lines = [
        ("conversations", f"{rows:,} read, {kept:,} kept, {found.samples:,} samples"),
        ("tokens", f"{found.tokens:,}, {found.supervised / found.tokens:.1%} supervised"),
        (
            "length",
            f"median {found.median_length:,.0f}, nine of ten up to {found.long_length:,}, "
            f"longest {found.longest:,}, {found.full:,} at the maximal length",
        ),
    ]
    if found.coverage is not None:
        lines.append(("coverage", f"{found.coverage:.2%} of the supervised tokens by the map"))
    if found.bytes is None:
        size = "8 bytes a token and hidden dimension; no config.json names the hidden size"
    else:
        size = f"{size_text(found.bytes)} in bfloat16"
        for store, count in (found.smaller or {}).items():
            size += f", {size_text(count)} in {store}"
    lines.append(("features", size))
    lines += [("left out", line) for line in describe_counts(found.counts)]
    return "\n".join(f"{name:<15}{text}" for name, text in [("file", conversations), *lines])


def show_sample(tokenizer: Any, sample: Encoded, colour: bool) -> str:
    """A sample as text, prompt and answer apart, line by line.

    What is not printable is escaped, but tabs: a conversation draws nothing on the terminal.

    Args:
        tokenizer: decodes the tokens.
        sample: the sample.
        colour: whether the terminal has colours. Supervised text is green, or else in ⟦ ⟧.
    """
    ids = sample.input_ids
    mask = sample.token_mask
    supervised = int(mask.sum())
    lines = [f"── {one_line(sample.id)} · {len(ids)} tokens, {supervised} supervised"]
    for begin, end in _runs(mask):
        text = _escaped(tokenizer.decode(ids[begin:end].tolist()))
        name = "answer" if mask[begin] else "prompt"
        if mask[begin] and not colour:
            text = f"⟦{text}⟧"
        paint = _COLOUR if mask[begin] else _DIM
        for line in text.split("\n"):
            painted = f"{paint}{line}{_PLAIN}" if colour else line
            lines.append(f"{name} │ {painted}")
            name = " " * len(name)
    lines += _literals(tokenizer, ids)
    return "\n".join(lines)


def _escaped(text: str) -> str:
    """A text with escapes in place of what is not printable, but line breaks and tabs."""
    return "".join(letter if letter in "\n\t" else one_line(letter) for letter in text)


def _literals(tokenizer: Any, ids: Tensor) -> list[str]:
    """Lines that tell texts of special tokens from the tokens."""
    text = tokenizer.decode(ids.tolist())
    lines = []
    for number, token in tokenizer.added_tokens_decoder.items():
        as_text = text.count(token.content) - int((ids == number).sum())
        if token.special and as_text > 0:
            mark = one_line(token.content)
            lines.append(f"       │ {mark} stands there {as_text} times as text, no token")
    return lines


def _runs(mask: Tensor) -> list[tuple[int, int]]:
    """Bounds of the runs of equal mask `(S,)`."""
    changes = (mask[1:] != mask[:-1]).nonzero().flatten() + 1
    return list(pairwise([0, *changes.tolist(), len(mask)]))

"""What features take on disk, and whether there is room for them."""

import os
import shutil
from pathlib import Path
from typing import NamedTuple

import torch

from eagle3fn.base.errors import UserError
from eagle3fn.data.storage import STORES

_AROUND = 1024  # bytes of a sample in the shard's header, the sidecar and the index


def bytes_per_token(
    hidden_size: int, taps: int, stored: torch.dtype, store: str | None = None
) -> int:
    """What a token's features take on disk: `A + 1` parts of `Ht` numbers, its id and its mask.

    Args:
        hidden_size: the target's, Ht.
        taps: tapped layers, A.
        stored: the dtype of the stored features.
        store: how they lie on disk, of `data.storage.STORES`; None: the numbers themselves.
    """
    part = hidden_size * stored.itemsize
    if store is not None:
        part = STORES[store].bytes_per_part(hidden_size)
    return (taps + 1) * part + 2 * torch.int64.itemsize


class FeatureSize(NamedTuple):
    """The size of a feature folder that is about to be written."""

    samples: int
    tokens: int
    bytes: int  # of all shards
    missing_bytes: int  # of those that are not there yet
    free_bytes: int  # of the folder's disk

    def describe(self, out: Path) -> str:
        """One line: samples, tokens, bytes, and what the disk has left."""
        there = ""
        if self.missing_bytes < self.bytes:
            there = f", {size_text(self.bytes - self.missing_bytes)} of it there"
        return (
            f"{out}: {self.samples:,} samples, {self.tokens:,} tokens: {size_text(self.bytes)} of "
            f"features{there}; {size_text(self.free_bytes)} are free on the disk"
        )

    def check_fits(
        self,
        out: Path,
        less: str = "write less (--limit, --max-length, or a part with --minutes)",
    ) -> None:
        """Refuse features that the disk has no room for.

        Args:
            out: the folder.
            less: the remedy, apart from more room.

        Raises:
            UserError: names both sizes.
        """
        if self.missing_bytes > self.free_bytes:
            raise UserError(
                f"{out}: {size_text(self.missing_bytes)} of features are to be written, "
                f"{size_text(self.free_bytes)} are free on the disk; make room, name a folder on "
                f"another disk, or {less}"
            )


def feature_size(
    out: Path, *, samples: int, tokens: int, found: tuple[int, int], token_bytes: int
) -> FeatureSize:
    """The size of a folder's features.

    Args:
        out: the folder, which is there.
        samples: all.
        tokens: of all samples.
        found: samples and tokens of the shards that are there.
        token_bytes: `bytes_per_token`.
    """
    whole = samples * _AROUND + tokens * token_bytes
    there = found[0] * _AROUND + found[1] * token_bytes
    free = shutil.disk_usage(os.path.realpath(out)).free
    return FeatureSize(samples, tokens, whole, whole - there, free)


def size_text(count: int) -> str:
    """A number of bytes in words.

    >>> size_text(2**19), size_text(28 * 2**30 + 2**29), size_text(3 * 2**50)
    ('0.5 MiB', '28.50 GiB', '3072.00 TiB')
    """
    if count < 2**30:
        return f"{count / 2**20:.1f} MiB"
    if count < 2**40:
        return f"{count / 2**30:.2f} GiB"
    return f"{count / 2**40:.2f} TiB"

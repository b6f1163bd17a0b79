"""What a vocabulary map was counted on, and whether a run trains on the same."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from eagle3fn.base.errors import UserError
from eagle3fn.base.files import json_sha256
from eagle3fn.base.types import VocabMap
from eagle3fn.data.features import FeatureSet
from eagle3fn.data.vocab import (
    REMEDY,
    StoredMap,
    count_tokens,
    coverage,
    provenance_of,
    read_map,
)

_SPREAD = 256  # samples, of which another folder's coverage is counted


class CountedOn(NamedTuple):
    """The data of a map; None where an older file doesn't say."""

    samples: str | None  # `samples_hash` of the folder
    held_out: int | None  # samples at its end that were not counted


def counted_on(path: str | Path, read: Callable[[Path], StoredMap] = read_map) -> CountedOn:
    """What a stored map was counted on; `read` as in `load_map`.

    Raises:
        UserError: missing or damaged.
    """
    provenance = provenance_of(read(Path(path)), path)
    found = CountedOn(provenance.get("samples"), provenance.get("held_out"))
    right = isinstance(found.samples, str) and type(found.held_out) is int and found.held_out >= 0
    if found != (None, None) and not right:
        raise UserError(
            f"{path}: its provenance has samples {found.samples!r:.80} and held_out "
            f"{found.held_out!r:.80}: must be a text and a number of 0 or more; {REMEDY}"
        )
    return found


def samples_hash(features: FeatureSet) -> str:
    """Hex digest of a folder's samples: ids, tokens and masks, in order, whatever the store."""
    table = features.index.get("table")
    if table:
        return table["sha256"]
    entries = []
    for entry in features.samples:
        size = (features.folder / entry["shard"]).stat().st_size if features.reader else None
        entries.append([entry["id"], entry.get("length", size), entry.get("tokens")])
    return json_sha256(entries)


def held_out_by(counted: CountedOn, features: FeatureSet) -> int | None:
    """How many samples of this folder a map was not counted on; None: it is of another folder."""
    return counted.held_out if counted.samples == samples_hash(features) else None


def map_note(
    path: str | Path,
    vocab_map: VocabMap,
    counted: CountedOn,
    features: FeatureSet,
    held_out: int,
) -> str:
    """A line where a map and a run on `features` that holds out `held_out` samples differ.

    None of it is refused. A map of other samples may serve several sets of data: its coverage of
    these is counted. Held-out samples that were counted chose the vocabulary, but no weight.
    Without a difference, or knowledge of it, the line is empty.
    """
    if counted.samples is None:
        return ""
    if counted.samples != samples_hash(features):
        covered = coverage(vocab_map, _spread_counts(features, len(vocab_map.t2d)))
        return (
            f"{path}: counted on other samples than {features.folder} has; of the supervised "
            f"tokens here it has {covered:.2%}; eagle3fn vocab counts these"
        )
    if held_out == counted.held_out:
        return ""

    text = f"data.held_out = {held_out}, {path} held out {counted.held_out}: "
    more = held_out - (counted.held_out or 0)
    if more < 0:
        return f"{text}what eagle3fn vocab said of those is of samples that are trained on"
    return (
        f"{text}the tokens of {more} held-out samples chose the draft's vocabulary, so their "
        f"figures are a little too good; run eagle3fn vocab --held-out {held_out}"
    )


def _spread_counts(features: FeatureSet, vocab_size: int) -> Tensor:
    """`count_tokens` of at most 256 samples, evenly spread."""
    count = min(len(features.samples), _SPREAD)
    numbers = [place * len(features.samples) // count for place in range(count)]
    return count_tokens(features, numbers, vocab_size)

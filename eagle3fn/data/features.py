"""A feature folder opened and read: its index and table, and samples, checked as they are read.

`data.feature_writing` says what its files hold and writes them. A folder without an index can be
opened by a `Reader`, which is given from outside; features that no file has come by an `OnDemand`.
"""

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from safetensors import SafetensorError, safe_open
from torch import Tensor

from eagle3fn.base.draft_config import DEFAULT_TAPS
from eagle3fn.base.errors import UserError, printable
from eagle3fn.base.files import sha256
from eagle3fn.base.stamps import Stamp, Stamps, stamp_of
from eagle3fn.base.types import Sample
from eagle3fn.data.feature_index import read_index
from eagle3fn.data.feature_writing import STORED, stored_names, tokens_digest
from eagle3fn.data.sample_table import (
    REMEDY,
    SampleTable,
    first_doubled,
)
from eagle3fn.data.storage import decode
from eagle3fn.data.validate import hidden_fault, token_fault

READER_REMEDY = "delete the file or write it anew"


class Reader(NamedTuple):
    """Reads a folder that has no index and holds one sample a file.

    `open_features(folder, reader=…)` lists the files; `read_sample` and `read_tokens` then read
    them by the reader and check what they return as they check a shard's.

    `sample` and `tokens` raise a UserError that names the file if it is missing or damaged.
    """

    files: str  # what `find` looks for, as errors name it: ".ckpt or .ckpt.gz"
    find: Callable[[Path], list[Path]]  # the samples' files in a folder, in the samples' order
    sample: Callable[[Path], Sample]  # one file's sample, fields as in `Sample`
    tokens: Callable[[Path], tuple[Tensor, Tensor]]  # its input_ids and token_mask alone


class OnDemand(Protocol):
    """Samples whose features are computed when they are asked for (`data.online`).

    All methods may be called by several threads.
    """

    answers: bool
    """Whether the target writes the answers: then `tokens` knows how long they may be, no more."""

    def fix(self, numbers: Iterable[int]) -> None:
        """Let these samples, the held-out ones, keep the first answer that the target writes."""
        ...

    def tokens(self, number: int) -> tuple[Tensor, Tensor]:
        """`input_ids` and `token_mask` of a sample, each (S,) int64."""
        ...

    def sample(self, number: int) -> Sample:
        """One sample, checked."""
        ...

    def load(self, shares: Iterable[Any]) -> Generator[Any, None, None]:
        """`data.stages.read`, by sources in place of a folder."""
        ...

    def settle(self) -> None:
        """Let what has passed be on the disk, where it is kept: all ranks call, before a checkpoint
        that is ahead of it.
        """
        ...


class FeatureSet(NamedTuple):
    """An opened folder, or what stands for one.

    `samples` are a `SampleTable`. Where a `reader` reads the files, the index is empty and
    `samples` has one entry a file, with its path in the folder as `id` and `shard`. Features `on
    demand` have a table and an index without shards, and the conversations' path as folder.
    """

    folder: Path
    samples: Sequence[dict[str, Any]]
    index: dict[str, Any]
    vocab_size: int | None  # V, if known
    hidden_size: int | None  # Ht, if known
    # Shards whose bytes were compared with the index's hash, as the file was: inode, bytes, time.
    verified: Stamps
    reader: Reader | None = None
    on_demand: OnDemand | None = None
    # What features on demand are made with, by option: it explains how fingerprints differ.
    made_with: Mapping[str, str] = {}

    @property
    def lengths(self) -> np.ndarray | None:
        """Tokens of every sample, (N,) int64; None where a `reader` reads them."""
        return self.samples.lengths if isinstance(self.samples, SampleTable) else None


# Opening


def open_features(
    folder: str | Path,
    vocab_size: int | None = None,
    hidden_size: int | None = None,
    reader: Reader | None = None,
) -> FeatureSet:
    """Open a feature folder by its index, or by `reader` if it has none. Reads no features.

    `vocab_size` (V) and `hidden_size` (Ht) are the target's. They are checked against the index;
    where there is none, the samples are checked against them when they are read.

    Raises:
        UserError: neither an index nor a file of the reader's; a damaged index, a shard missing or
            of a wrong size, another target's sizes.
    """
    folder = Path(folder)
    if (folder / "index.json").is_file():
        return _open_index(folder, vocab_size, hidden_size)

    paths = reader.find(folder) if reader else []
    if not paths:
        lacking = f"no index.json and no {reader.files}" if reader else "no index.json"
        if not folder.is_dir():
            found = "is a file, no feature folder" if folder.exists() else "no such folder"
        else:
            found = f"{lacking} there"
        raise UserError(f"{folder}: {found}; {REMEDY} or name another folder")
    names = [str(path.relative_to(folder)) for path in paths]
    samples = [{"id": name, "shard": name} for name in names]
    return FeatureSet(folder, samples, {}, vocab_size, hidden_size, {}, reader)


def _open_index(folder: Path, vocab_size: int | None, hidden_size: int | None) -> FeatureSet:
    path = folder / "index.json"
    index, samples = read_index(path)

    # The shards, by their sizes alone: hashes are compared when a shard is first read.
    for shard in index["shards"]:
        file = folder / shard["file"]
        size = file.stat().st_size if file.is_file() else None
        if size != shard["bytes"]:
            found = "missing" if size is None else f"{size} bytes"
            raise UserError(f"{file}: {found}, must be {shard['bytes']} bytes; {REMEDY}")

    # The target's sizes.
    target = index["target"]
    for name, size in (("vocab_size", vocab_size), ("hidden_size", hidden_size)):
        if size is not None and size != target[name]:
            raise UserError(
                f"{path}: made with target {target.get('name')!r}, "
                f"{name} {target[name]}, not {size}; name that target or {REMEDY}"
            )
    return FeatureSet(
        folder=folder,
        samples=samples,
        index=index,
        vocab_size=target["vocab_size"],
        hidden_size=target["hidden_size"],
        verified={},
    )


def check_made_for(
    features: FeatureSet, hashes: Sequence[str], aux_layers: Sequence[int] | None, where: str
) -> None:
    """Refuse features made with a target of another configuration or with other tapped layers.

    `where` names what has `hashes` (`data.target_source.config_hashes`), one of which must be the
    index's, and `aux_layers`, if any are needed, as in `the run`. What the index doesn't hold is
    not compared, so files of a `Reader` pass.

    Raises:
        UserError: they differ; names the index and both values.
    """
    path = features.folder / "index.json"
    target = features.index.get("target", {})

    found = target.get("config_hash", hashes[0])
    if found not in hashes:
        raise UserError(
            f"{path}: made with a target of config_hash {str(found)[:12]}, "
            f"{where} has {hashes[0][:12]}; name that target or {REMEDY} into another folder"
        )
    layers = target.get("aux_layers")
    if None not in (layers, aux_layers) and layers != list(aux_layers or ()):
        raise UserError(
            f"{path}: made with aux_layers {layers}, {where} has {list(aux_layers or ())}; "
            f"set those layers or {REMEDY} into another folder"
        )


def tensors_of(features: FeatureSet) -> dict[str, str] | None:
    """What the target ran with, as `data.target_tensors.tensors_record` has it.

    None in older folders, and of files of a `Reader`.
    """
    return features.index.get("target", {}).get("tensors")


def store_of(features: FeatureSet) -> str | None:
    """The name in `data.storage.STORES` of how the hidden states are stored; None: as they are."""
    return features.index.get("store")


# Reading


def check_shards(features: FeatureSet) -> None:
    """Compare every shard's bytes with the hash in the index.

    Raises:
        UserError: names the first shard that differs.
    """
    for number in range(len(features.index.get("shards", []))):
        _verify(features, number)


def _verify(features: FeatureSet, number: int) -> None:
    """Compare a shard's bytes with the index's hash, and its tensors with its samples' keys."""
    assert isinstance(features.samples, SampleTable)
    shard = features.index["shards"][number]
    path = features.folder / shard["file"]
    stamp = _stamp(path)
    if sha256(path) != shard["sha256"]:
        raise UserError(f"{path}: its bytes have changed; {REMEDY}")

    # Each sample's tensors are there, once, and no others.
    own = features.samples.of_shard(number)
    keys = [features.samples[sample]["key"] for sample in own]
    doubled = first_doubled(keys)
    if doubled is not None:
        raise UserError(
            f"{features.folder / 'index.json'}: samples[{own[doubled]}].key is "
            f"{printable(repr(keys[doubled]))}: another sample has it; {REMEDY}"
        )
    store = store_of(features)
    listed = set()
    for key in keys:
        for field in STORED:
            listed |= set(stored_names(key, field, store).values())
    others = _names_in(path) ^ listed
    if others:
        raise UserError(
            f"{features.folder / 'index.json'}: samples are missing, or not those of {path.name} "
            f"({printable(min(others))}); {REMEDY}"
        )
    features.verified[shard["file"]] = stamp


def _stamp(path: Path) -> Stamp:
    try:
        return stamp_of(path)
    except OSError as error:
        raise UserError(f"{path}: missing or damaged ({error.strerror}); {REMEDY}") from None


def _names_in(path: Path) -> set[str]:
    """The names of a shard's tensors."""
    try:
        with safe_open(path, framework="pt") as file:
            return set(file.keys())
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: missing or damaged ({error}); {REMEDY}") from None


def read_sample(features: FeatureSet, number: int) -> Sample:
    """Sample `number`, checked.

    The shard's hash is compared at its first sample, and again after the file has changed.

    Raises:
        UserError: a file missing, damaged or changed; wrong shapes or dtypes, NaN or infinity, an
            id outside the vocabulary.
    """
    if features.on_demand:
        return features.on_demand.sample(number)
    entry = features.samples[number]
    path = features.folder / entry["shard"]
    if features.reader:
        sample = features.reader.sample(path)
    else:
        sample = Sample(*_tensors(features, number, Sample._fields))
        _verify_once(features, number, entry["shard"])

    _check_tokens(features, number, sample.input_ids, sample.token_mask)
    what = hidden_fault(
        sample.aux_hidden,
        sample.last_hidden,
        length=len(sample.input_ids),
        taps=len(features.index.get("target", {}).get("aux_layers") or range(DEFAULT_TAPS)),
        size=features.hidden_size,
        dtype=features.index.get("dtype"),
    )
    if what:
        raise _fault(features, number, what)
    return sample


def read_tokens(features: FeatureSet, number: int) -> tuple[Tensor, Tensor]:
    """`input_ids` and `token_mask` of sample `number`, each `(S,)` int64, checked.

    Its features are not read, so the shard's hash is not compared here.
    """
    if features.on_demand:
        return features.on_demand.tokens(number)
    entry = features.samples[number]
    path = features.folder / entry["shard"]
    if features.reader:
        ids, mask = features.reader.tokens(path)
    else:
        ids, mask = _tensors(features, number, ("input_ids", "token_mask"))
    _check_tokens(features, number, ids, mask)
    return ids, mask


def length_of(features: FeatureSet, number: int) -> int:
    """Tokens of sample `number`: as the index has it, or by reading a file without an index."""
    length = features.samples[number].get("length")
    return len(read_tokens(features, number)[0]) if length is None else length


def read_last_hidden(features: FeatureSet, number: int) -> tuple[Tensor, Tensor, Tensor]:
    """`input_ids` and `token_mask` `(S,)` and `last_hidden` `(S, Ht)` of sample `number`.

    Its other features are not read, nor is the shard's hash compared here.
    """
    if features.on_demand:
        sample = features.on_demand.sample(number)
        return sample.input_ids, sample.token_mask, sample.last_hidden
    entry = features.samples[number]
    path = features.folder / entry["shard"]
    if features.reader:
        sample = features.reader.sample(path)
        ids, mask, last = sample.input_ids, sample.token_mask, sample.last_hidden
    else:
        ids, mask, last = _tensors(features, number, ("input_ids", "token_mask", "last_hidden"))
    _check_tokens(features, number, ids, mask)
    return ids, mask, last


def _verify_once(features: FeatureSet, number: int, file: str) -> None:
    """Verify the shard of sample `number`, unless its file is as it was then."""
    assert isinstance(features.samples, SampleTable)
    if features.verified.get(file) != _stamp(features.folder / file):
        _verify(features, features.samples.shard_of(number))


def _tensors(features: FeatureSet, number: int, fields: tuple[str, ...]) -> list[Tensor]:
    """Some fields of one sample, from its shard; the other tensors are not read.

    Hidden states of a smaller store come as bfloat16.
    """
    entry = features.samples[number]
    path = features.folder / entry["shard"]
    store = store_of(features)
    found = []
    try:
        with safe_open(path, framework="pt") as file:
            for field in fields:
                names = stored_names(entry["key"], field, store)
                found.append({end: file.get_tensor(name) for end, name in names.items()})
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path}: missing or damaged at sample {printable(repr(entry['id']))} ({error}); "
            f"{REMEDY}"
        ) from None

    values = []
    for field, parts in zip(fields, found, strict=True):
        if store is None or len(parts) == 1:
            values.append(parts[""])  # a tensor as it is
            continue
        try:
            values.append(decode(store, parts))
        except UserError as error:
            raise _fault(features, number, f"{field}: {error}") from None
    return values


def _check_tokens(features: FeatureSet, number: int, ids: Tensor, mask: Tensor) -> None:
    entry = features.samples[number]
    what = token_fault(ids, mask, entry.get("length"), features.vocab_size)
    if what is None and entry.get("tokens", "") not in ("", tokens_digest(entry["id"], ids, mask)):
        what = "its tokens are not those that the index has a digest of"
    if what:
        raise _fault(features, number, what)


def _fault(features: FeatureSet, number: int, what: str) -> UserError:
    entry = features.samples[number]
    remedy = READER_REMEDY if features.reader else REMEDY
    return UserError(
        f"{features.folder / entry['shard']}: sample {printable(repr(entry['id']))}: {what}; "
        f"{remedy}"
    )

"""Vocabulary maps and features between our files and those of other trainers.

SpecForge's own formats come as functions: the core does not import `specforge`.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eagle3fn.base.errors import UserError, printable
from eagle3fn.base.files import whole_file, whole_folder
from eagle3fn.base.places import anything, check_out_file, check_out_folder, other_than
from eagle3fn.base.types import Sample, VocabMap
from eagle3fn.data.feature_writing import write_index, write_shard
from eagle3fn.data.features import FeatureSet, read_sample
from eagle3fn.data.vocab import StoredMap, save_map
from eagle3fn.train.drafts import CONFIG
from eagle3fn.train.foreign_drafts import read_foreign

ReadMap = Callable[[Path], StoredMap]
_NPY = ("d2t.npy", "t2d.npy")  # speculators' two files
_PER_SHARD = 64  # samples

LAST_BEFORE_NORM = (
    "speculators keeps the last hidden state before the target's final norm, these files hold the "
    "one after it, and a norm cannot be undone"
)


# Vocabulary maps


def read_map_of(path: str | Path, read: ReadMap) -> StoredMap:
    """A map from a file that `read` reads, a draft's folder, or speculators' two `.npy` files.

    Raises:
        UserError: missing, damaged, or a folder without any of these.
    """
    path = Path(path)
    if not path.is_dir():
        return read(path)
    if (path / CONFIG).is_file():
        vocab = read_foreign(path).draft.vocab
        return StoredMap(vocab._asdict(), provenance={})

    # speculators writes D into the names, where it makes the files itself.
    pairs = sorted(path.glob("d2t*.npy"))
    pairs = [file for file in pairs if file.is_file() and _other(file).is_file()]
    if len(pairs) != 1:
        found = (
            f"{len(pairs)} pairs of d2t*.npy and t2d*.npy" if pairs else "no d2t.npy with t2d.npy"
        )
        raise UserError(f"{path}: {found}, and no {CONFIG}; name a folder with one map")
    tensors = {"d2t": _read_npy(pairs[0]), "t2d": _read_npy(_other(pairs[0]))}
    return StoredMap(tensors, provenance={})


def _other(file: Path) -> Path:
    return file.with_name(file.name.replace("d2t", "t2d", 1))


def _read_npy(file: Path) -> torch.Tensor:
    try:
        return torch.from_numpy(np.load(file, allow_pickle=False))
    except (OSError, ValueError, EOFError, TypeError, MemoryError) as error:
        raise UserError(f"{file}: damaged or not an array ({error}); write it anew") from None


def write_map_for(
    out: str | Path,
    vocab_map: VocabMap,
    kind: str,
    provenance: dict[str, Any],
    write_pickle: Callable[[Path, VocabMap], None],
    read: ReadMap,
) -> None:
    """Write a map whole, or not at all.

    Args:
        out: a file, or for "speculators" a folder; replaced if it is an older map.
        vocab_map: checked.
        kind: "eagle3fn", "specforge" (EAGLE's too) or "speculators".
        provenance: kept in our own format alone.
        write_pickle: writes SpecForge's format.
        read: reads a file of ours or of SpecForge's.

    Raises:
        UserError: something else is at `out`.
    """
    out = Path(out)
    check_out_map(out, kind, read)
    if kind == "eagle3fn":
        save_map(out, vocab_map, provenance)
    elif kind == "specforge":
        with whole_file(out) as temporary:
            write_pickle(temporary, vocab_map)
    else:
        with whole_folder(out, _foreign_in_map) as temporary:
            np.save(temporary / _NPY[0], vocab_map.d2t.numpy())
            np.save(temporary / _NPY[1], vocab_map.t2d.numpy())


def check_out_map(out: str | Path, kind: str, read: ReadMap) -> None:
    """Refuse a place for a map before work: one that holds anything but an older map of this kind.

    Raises:
        UserError: names what is there.
    """
    if kind == "speculators":
        check_out_folder(out, _foreign_in_map)
        return
    check_out_file(out)
    if Path(out).exists() and not _is_map(Path(out), read):
        raise UserError(f"{out}: is there and no older map; name another --out")


def _foreign_in_map(folder: Path) -> str | None:
    """The name of something in a folder that is none of speculators' two files of a map."""
    return other_than(folder, _NPY)


def _is_map(path: Path, read: ReadMap) -> bool:
    try:
        return set(read(path).tensors) == {"d2t", "t2d"}  # a draft's weights have more
    except UserError:
        return False


# Features


def write_ours(
    features: FeatureSet,
    out: str | Path,
    target: dict[str, Any],
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Write a folder of a `Reader`'s files as one of ours, whole or not at all.

    Args:
        features: opened with the target's sizes, so that every sample is checked.
        out: a new folder.
        target: what the index says of the target: `name`, `hidden_size`, `vocab_size`, and what
            else is known of it.
        on_progress: called with the samples that are written and their number.

    Returns:
        The index.

    Raises:
        UserError: `out` is there, a damaged sample, or samples of several dtypes.
    """
    out = Path(out)
    check_out_folder(out, anything)
    dtype = None
    longest = 0
    sidecars = []
    with whole_folder(out, anything) as temporary:
        for start in range(0, len(features.samples), _PER_SHARD):
            numbers = range(start, min(start + _PER_SHARD, len(features.samples)))
            samples: dict[str, Sample] = {}
            entries = []
            for number in numbers:
                sample = read_sample(features, number)
                name = features.samples[number]["id"]
                dtype = dtype or sample.last_hidden.dtype
                if sample.last_hidden.dtype != dtype:
                    raise UserError(
                        f"{features.folder / printable(name)}: {sample.last_hidden.dtype}, the "
                        f"samples before it are {dtype}; convert the folders of each dtype apart"
                    )
                length = len(sample.input_ids)
                longest = max(longest, length)
                samples[str(number)] = sample
                supervised = int(sample.token_mask.sum())
                entries.append(
                    {"id": name, "key": str(number), "length": length, "supervised": supervised}
                )
                on_progress(number + 1, len(features.samples))
            sidecars.append(
                write_shard(temporary, start // _PER_SHARD, samples, {"samples": entries})
            )
        head = {
            "target": target,
            "dtype": str(dtype).removeprefix("torch."),
            "max_length": longest,
        }
        return write_index(temporary, head, sidecars)


def write_files(
    features: FeatureSet,
    out: str | Path,
    write: Callable[[Path, Sample], None],
    ending: str,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Write one file a sample into a new folder, whole or not at all; returns their number.

    Args:
        features: a folder of ours.
        out: a new folder.
        write: writes a sample to a path.
        ending: of the files' names, which sort in the samples' order.
        on_progress: called with the samples that are written and their number.

    Raises:
        UserError: `out` is there, or a damaged sample.
    """
    out = Path(out)
    check_out_folder(out, anything)
    count = len(features.samples)
    with whole_folder(out, anything) as temporary:
        for number, sample in _samples(features):
            write(temporary / f"data_{number:0{len(str(count))}d}{ending}", sample)
            on_progress(number + 1, count)
    return count


def _samples(features: FeatureSet) -> Iterator[tuple[int, Sample]]:
    for number in range(len(features.samples)):
        yield number, read_sample(features, number)

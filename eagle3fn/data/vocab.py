"""The vocabulary map: which target tokens the draft can say."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from eagle3fn.base.errors import UserError
from eagle3fn.base.files import whole_file
from eagle3fn.base.types import VocabMap
from eagle3fn.data.features import FeatureSet, read_tokens

REMEDY = "build the map again"


def count_tokens(
    features: FeatureSet, indices: Iterable[int], vocab_size: int | None = None
) -> Tensor:
    """How often each token is supervised in the samples `indices`: `(V,)` int64.

    `vocab_size` is needed where the folder does not know it (files of a `Reader`).

    Raises:
        UserError: no vocabulary size known, or an unreadable sample.
    """
    size = features.vocab_size or vocab_size
    if size is None:
        raise UserError(f"{features.folder}: holds no vocabulary size; name the target")
    known = features._replace(vocab_size=size)
    counts = torch.zeros(size, dtype=torch.int64)
    for number in indices:
        ids, mask = read_tokens(known, number)
        counts += torch.bincount(ids[mask == 1], minlength=size)
    return counts


def build_map(counts: Tensor, draft_size: int) -> VocabMap:
    """Keep the `draft_size` most frequent tokens of `counts` `(V,)`; ties go to the lowest id.

    Raises:
        UserError: `draft_size` is not in [1, V].
    """
    size = len(counts)
    if not 1 <= draft_size <= size:
        raise UserError(
            f"draft_vocab_size = {draft_size}: must be in [1, {size}], the target's vocabulary"
        )
    kept = counts.sort(descending=True, stable=True).indices[:draft_size].sort().values
    t2d = torch.zeros(size, dtype=torch.bool)
    t2d[kept] = True
    return VocabMap(t2d, kept - torch.arange(draft_size))


def count_map(
    features: FeatureSet, indices: Iterable[int], vocab_size: int, draft_size: int
) -> tuple[VocabMap, float]:
    """The map of the `draft_size` (at most `vocab_size`) most supervised tokens, and their share of all of those.

    Raises:
        UserError: an unreadable sample.
    """
    counts = count_tokens(features, indices, vocab_size)
    vocab_map = build_map(counts, min(draft_size, vocab_size))
    return vocab_map, float(counts[vocab_map.t2d].sum() / counts.sum().clamp(min=1))


def check_map(
    vocab_map: VocabMap, vocab_size: int, draft_size: int, where: str = "vocabulary map"
) -> None:
    """Raise a UserError unless the map has these sizes and `nonzero(t2d) == d2t + arange(D)`."""
    t2d, d2t = vocab_map
    if t2d.dtype != torch.bool or d2t.dtype != torch.int64:
        raise UserError(
            f"{where}: t2d is {t2d.dtype} and d2t {d2t.dtype}: must be bool and int64; {REMEDY}"
        )
    if t2d.shape != (vocab_size,):
        raise UserError(
            f"{where}: t2d has shape {tuple(t2d.shape)}: must be ({vocab_size},); {REMEDY}"
        )
    if d2t.shape != (draft_size,):
        raise UserError(
            f"{where}: d2t has shape {tuple(d2t.shape)}: must be ({draft_size},); "
            f"set draft.draft_vocab_size to {d2t.numel()} or {REMEDY}"
        )
    kept = t2d.nonzero().flatten()
    if len(kept) != draft_size or not torch.equal(kept, d2t + torch.arange(draft_size)):
        raise UserError(
            f"{where}: t2d and d2t name different tokens (d2t must be offsets); {REMEDY}"
        )


def save_map(path: str | Path, vocab_map: VocabMap, provenance: dict[str, Any]) -> None:
    """Write the map as safetensors, whole or not at all.

    `provenance` (JSON values; `target_hash` is checked on loading) goes into the file's metadata.
    """
    tensors = {name: value.contiguous() for name, value in vocab_map._asdict().items()}
    with whole_file(path) as temporary:
        save_file(
            tensors, temporary, metadata={"provenance": json.dumps(provenance, sort_keys=True)}
        )


Stored = tuple[dict[str, Tensor], Any]
"""A map file's tensors by name, and its provenance."""


def read_map(path: Path) -> Stored:
    """The tensors and provenance of a safetensors file that `save_map` wrote; nothing is checked.

    Raises:
        UserError: missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as stored:
            provenance = json.loads((stored.metadata() or {}).get("provenance", "{}"))
            return {key: stored.get_tensor(key) for key in stored.keys()}, provenance  # noqa: SIM118
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {REMEDY}") from None
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{path}: damaged or not a vocabulary map ({error}); {REMEDY}") from None


def load_map(
    path: str | Path,
    vocab_size: int,
    draft_size: int,
    target_hash: str | None = None,
    read: Callable[[Path], Stored] = read_map,
) -> VocabMap:
    """Read a map by `read` and check it.

    Raises:
        UserError: missing or damaged, made for another target, of other sizes, or inconsistent.
    """
    tensors, provenance = read(Path(path))
    missing = [name for name in VocabMap._fields if not isinstance(tensors.get(name), Tensor)]
    if missing:
        raise UserError(f"{path}: no tensor {missing[0]}; {REMEDY}")
    if not isinstance(provenance, dict):
        raise UserError(
            f"{path}: its provenance is {provenance!r:.80}: must be a JSON object; {REMEDY}"
        )
    made_for = provenance.get("target_hash")
    if target_hash and made_for and made_for != target_hash:
        name = provenance.get("target", str(made_for)[:12])
        raise UserError(
            f"{path}: made for another target ({name}), not {target_hash[:12]}; {REMEDY} for this one"
        )
    vocab_map = VocabMap(tensors["t2d"], tensors["d2t"])
    check_map(vocab_map, vocab_size, draft_size, str(path))
    return vocab_map


def map_size(path: str | Path, read: Callable[[Path], Stored] = read_map) -> int:
    """The draft vocabulary's size, D, of a stored map.

    Raises:
        UserError: missing or damaged, or without `d2t`.
    """
    tensors, _ = read(Path(path))
    if not isinstance(tensors.get("d2t"), Tensor):
        raise UserError(f"{path}: no tensor d2t; {REMEDY}")
    return tensors["d2t"].numel()

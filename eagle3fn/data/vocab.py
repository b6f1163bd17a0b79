"""The vocabulary map: which target tokens the draft can propose."""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from eagle3fn.base.draft_keys import DEFAULT_DRAFT_VOCAB
from eagle3fn.base.errors import UserError
from eagle3fn.base.files import whole_file
from eagle3fn.base.read import check_regular, parse_json
from eagle3fn.base.types import VocabMap
from eagle3fn.data.features import FeatureSet, read_tokens

REMEDY = "build the map again by eagle3fn vocab"
_MOST_HELD_OUT = 24
_COVERED = 0.999  # of the supervised tokens
_SMALLEST = 4096
_SIZE_STEP = 1024


# Counting and building


def count_tokens(
    features: FeatureSet, indices: Iterable[int], vocab_size: int | None = None
) -> Tensor:
    """How often each token is supervised in the samples `indices`: `(V,)` int64.

    `vocab_size` (V) is used where the folder holds none (files of a `Reader`).

    Raises:
        UserError: no vocabulary size known, or an unreadable sample.
    """
    size = features.vocab_size or vocab_size
    if size is None:
        raise UserError(f"{features.folder}: holds no vocabulary size; name the target")

    sized = features._replace(vocab_size=size)  # ids are checked against it
    counts = torch.zeros(size, dtype=torch.int64)  # (V,)
    for number in indices:
        ids, mask = read_tokens(sized, number)
        counts += torch.bincount(ids[mask == 1], minlength=size)
    return counts


def build_map(counts: Tensor, draft_size: int, always: Sequence[int] = ()) -> VocabMap:
    """Keep the `draft_size` most frequent tokens of `counts` `(V,)`; ties go to the lowest id.

    The tokens `always` come before all others, so they take the place of the rarest. Draft id `j`
    is the j-th kept target id in ascending order: `kept[j] == j + d2t[j]`.

    Raises:
        UserError: as `check_draft_size`.
    """
    check_draft_size(draft_size, len(counts), always)

    # A stable sort keeps tokens of equal counts in the order of their ids.
    first = torch.tensor(sorted(set(always)), dtype=torch.int64, device=counts.device)
    ranked = counts.index_fill(0, first, int(counts.max()) + 1)
    by_count = ranked.sort(descending=True, stable=True).indices
    kept = by_count[:draft_size].sort().values  # (D,)

    t2d = torch.zeros(len(counts), dtype=torch.bool)
    t2d[kept] = True
    return VocabMap(t2d, kept - torch.arange(draft_size, device=kept.device))


def check_draft_size(draft_size: int, vocab_size: int, always: Sequence[int] = ()) -> None:
    """Check that a draft vocabulary of a target's has room for the tokens `always`.

    Raises:
        UserError: `draft_size` is not in [1, V], or below the number of `always`.
    """
    if not 1 <= draft_size <= vocab_size:
        raise UserError(
            f"draft_vocab_size = {draft_size}: must be in [1, {vocab_size}], the target's "
            "vocabulary"
        )
    if draft_size < len(set(always)):
        raise UserError(
            f"draft_vocab_size = {draft_size}: must be at least {len(set(always))}, the target's "
            "stop tokens and those of its chat template, which are always in; name a larger one"
        )


def chosen_size(counts: Tensor) -> int:
    """A draft vocabulary for tokens supervised so often, `(V,)`, where nobody names a size.

    The most frequent tokens that make up 99.9% of the supervised ones, rounded up to a multiple of
    1,024; at least 4,096, at most 32,000, and at most V.
    """
    frequent_first = counts.sort(descending=True).values
    before = frequent_first.cumsum(0) - frequent_first  # covered by the tokens before each
    needed = int((before < _COVERED * counts.sum()).sum())
    rounded = -(-needed // _SIZE_STEP) * _SIZE_STEP
    return min(max(rounded, _SMALLEST), DEFAULT_DRAFT_VOCAB, len(counts))


def coverage(vocab_map: VocabMap, counts: Tensor) -> float:
    """The share of tokens, counted in `(V,)`, that the map has; 0 without tokens."""
    return float(counts[vocab_map.t2d].sum() / counts.sum().clamp(min=1))


def held_out_of(samples: int) -> int:
    """How many of `samples` are held out where nobody names a number: a tenth, at most 24."""
    return min(samples // 10, _MOST_HELD_OUT)


def check_map(
    vocab_map: VocabMap, vocab_size: int, draft_size: int, where: str = "vocabulary map"
) -> None:
    """Check that a map has the sizes V and D and that `nonzero(t2d) == d2t + arange(D)`.

    `where` names the map in errors.

    Raises:
        UserError: it has not.
    """
    t2d, d2t = vocab_map
    if t2d.dtype != torch.bool or d2t.dtype != torch.int64:
        raise UserError(
            f"{where}: t2d is {t2d.dtype} and d2t {d2t.dtype}: must be bool and int64; {REMEDY}"
        )
    if t2d.shape != (vocab_size,):
        raise UserError(
            f"{where}: t2d has shape {tuple(t2d.shape)}: must be ({vocab_size},); {REMEDY}"
        )
    if d2t.numel() == 0:
        raise UserError(f"{where}: d2t is empty: a draft must have a token to propose; {REMEDY}")
    if d2t.shape != (draft_size,):
        raise UserError(
            f"{where}: d2t has shape {tuple(d2t.shape)}: must be ({draft_size},); "
            f"set draft.draft_vocab_size to {d2t.numel()} or {REMEDY}"
        )

    kept = t2d.nonzero().flatten()
    if len(kept) != draft_size or not torch.equal(
        kept, d2t + torch.arange(draft_size, device=d2t.device)
    ):
        raise UserError(
            f"{where}: t2d and d2t name different tokens (d2t must be offsets); {REMEDY}"
        )


# Files


class StoredMap(NamedTuple):
    """A map file as it is, unchecked. `load_map` and `map_size` take what reads one as `read`."""

    tensors: dict[str, Any]  # by name; a map has `t2d` and `d2t`
    provenance: Any  # what `save_map` was given; a dict, or the file is refused


def save_map(path: str | Path, vocab_map: VocabMap, provenance: dict[str, Any]) -> None:
    """Write the map as safetensors, whole or not at all.

    `provenance` (JSON values; `target_hash` is checked on loading) goes into the file's metadata,
    with a digest of the map, which is checked too.
    """
    tensors = {name: value.contiguous() for name, value in vocab_map._asdict().items()}
    provenance = provenance | {"digest": map_digest(vocab_map)}
    metadata = {"provenance": json.dumps(provenance, sort_keys=True)}
    with whole_file(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def read_map(path: Path) -> StoredMap:
    """Read a file that `save_map` wrote.

    Raises:
        UserError: missing or damaged.
    """
    check_regular(path)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
        return StoredMap(tensors, parse_json(metadata.get("provenance", "{}")))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {REMEDY}") from None
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{path}: damaged or not a vocabulary map ({error}); {REMEDY}") from None


def load_map(
    path: str | Path,
    vocab_size: int | None = None,
    draft_size: int | None = None,
    target_hash: str | Sequence[str] | None = None,
    read: Callable[[Path], StoredMap] = read_map,
) -> VocabMap:
    """Read a map and check it, and the digest that its file has of it.

    Files of versions before 0.2 and of other trainers have no digest, and pass.

    Args:
        path: the map's file.
        vocab_size: V, the target's; absent: the file's.
        draft_size: D; absent: the file's.
        target_hash: the target's `config_hash`, or its `config_hashes`; compared if the file holds
            one.
        read: reads the file; another function reads another format.

    Raises:
        UserError: missing or damaged, changed, made for another target, of other sizes, or
            inconsistent.
    """
    stored = read(Path(path))
    tensors = _tensors_of(stored, VocabMap._fields, path)

    provenance = provenance_of(stored, path)
    made_for = provenance.get("target_hash")
    hashes = [target_hash] if isinstance(target_hash, str) else list(target_hash or ())
    if hashes and made_for and made_for not in hashes:
        name = provenance.get("target", str(made_for)[:12])
        raise UserError(
            f"{path}: made for another target ({name}), not {hashes[0][:12]}; {REMEDY} for this one"
        )

    vocab_map = VocabMap(*tensors)
    v = vocab_map.t2d.numel() if vocab_size is None else vocab_size
    d = vocab_map.d2t.numel() if draft_size is None else draft_size
    check_map(vocab_map, v, d, str(path))
    if provenance.get("digest") not in (None, map_digest(vocab_map)):
        raise UserError(f"{path}: not the map that was written: its digest differs; {REMEDY}")
    return vocab_map


def map_size(
    path: str | Path,
    read: Callable[[Path], StoredMap] = read_map,
    vocab_size: int | None = None,
) -> int:
    """The draft vocabulary's size, D, of a stored map; `read` as in `load_map`.

    Raises:
        UserError: missing or damaged, without `d2t`, or larger than the target's `vocab_size`.
    """
    (d2t,) = _tensors_of(read(Path(path)), ("d2t",), path)
    if vocab_size is not None and d2t.numel() > vocab_size:
        raise UserError(
            f"{path}: a map of {d2t.numel()} tokens, but the target has {vocab_size}: it was made "
            f"for another target; {REMEDY} for this one"
        )
    return d2t.numel()


def map_digest(vocab_map: VocabMap) -> str:
    """Hex digest of a consistent map: of its kept tokens and of V."""
    kept = vocab_map.t2d.cpu().nonzero().flatten().numpy().tobytes()
    return hashlib.sha256(len(vocab_map.t2d).to_bytes(8, "little") + kept).hexdigest()


def provenance_of(stored: StoredMap, path: str | Path) -> dict[str, Any]:
    """What a map's file says of it.

    Raises:
        UserError: no JSON object.
    """
    provenance = stored.provenance
    if not isinstance(provenance, dict):
        raise UserError(
            f"{path}: its provenance is {provenance!r:.80}: must be a JSON object; {REMEDY}"
        )
    return provenance


def _tensors_of(stored: StoredMap, names: tuple[str, ...], path: str | Path) -> list[Tensor]:
    for name in names:
        if not isinstance(stored.tensors.get(name), Tensor):
            raise UserError(f"{path}: no tensor {name}; {REMEDY}")
    return [stored.tensors[name] for name in names]

"""The feature folder: safetensors shards of many samples, and `index.json`, which is written last."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from eagle3fn.base.errors import UserError
from eagle3fn.base.files import read_json, sha256, whole_file, write_json
from eagle3fn.base.types import Sample
from eagle3fn.data.validate import hidden_fault, token_fault

SCHEMA = 1
REMEDY = "run eagle3fn extract again"
_INDEX_KEYS = ("schema", "target", "dtype", "max_length", "samples", "shards", "totals")
_INDEX_TYPES = {"target": dict, "dtype": str, "samples": list, "shards": list}
_SAMPLE_TYPES = {"id": str, "key": str, "shard": str, "length": int}
_SHARD_TYPES = {"file": str, "bytes": int, "sha256": str}


STORED = {"token_mask": "loss_mask"}  # a field of `Sample` that shards store under another name


class Reader(NamedTuple):
    """Reads a folder that has no index, one file a sample."""

    find: Callable[[Path], list[Path]]  # the samples' files in a folder, in their order
    sample: Callable[[Path], Sample]  # one file
    tokens: Callable[[Path], tuple[Tensor, Tensor]]  # its ids and token mask alone, each (S,) int64


class FeatureSet(NamedTuple):
    """An opened folder. `samples` are the index's entries, or one entry a file where a `reader` reads them."""

    folder: Path
    samples: list[dict[str, Any]]
    index: dict[str, Any]  # empty where a reader reads the files
    vocab_size: int | None  # V, if known
    hidden_size: int | None  # Ht, if known
    verified: set[str]  # shards whose bytes were compared with the index's hash
    reader: Reader | None = None


def shard_name(number: int) -> str:
    """File name of shard `number`; its sidecar ends in `.json` instead."""
    return f"shard-{number:05d}.safetensors"


def write_shard(
    folder: Path, number: int, samples: dict[str, Sample], sidecar: dict[str, Any]
) -> dict[str, Any]:
    """Write a shard whole, then its sidecar: `sidecar` with the shard's name, size and hash; returns that.

    `samples` go by their keys; tensors are stored as `<key>.input_ids` and so on.
    """
    path = folder / shard_name(number)
    tensors = {
        f"{key}.{STORED.get(name, name)}": value.cpu().contiguous()
        for key, sample in samples.items()
        for name, value in sample._asdict().items()
    }
    with whole_file(path) as temporary:
        save_file(tensors, temporary)
    sidecar = {**sidecar, "file": path.name, "bytes": path.stat().st_size, "sha256": sha256(path)}
    write_json(path.with_suffix(".json"), sidecar)
    return sidecar


def write_index(
    folder: Path, index: dict[str, Any], sidecars: list[dict[str, Any]]
) -> dict[str, Any]:
    """Write `index.json` from the shards' sidecars, with totals; returns it."""
    samples = [
        {**sample, "shard": sidecar["file"]}
        for sidecar in sidecars
        for sample in sidecar["samples"]
    ]
    totals = {
        "samples": len(samples),
        "tokens": sum(sample["length"] for sample in samples),
        "supervised": sum(sample["supervised"] for sample in samples),
        "bytes": sum(sidecar["bytes"] for sidecar in sidecars),
    }
    shards = [{key: sidecar[key] for key in ("file", "bytes", "sha256")} for sidecar in sidecars]
    index = {"schema": SCHEMA, **index, "totals": totals, "shards": shards, "samples": samples}
    write_json(folder / "index.json", index)
    return index


def open_features(
    folder: str | Path,
    vocab_size: int | None = None,
    hidden_size: int | None = None,
    reader: Reader | None = None,
) -> FeatureSet:
    """Open a feature folder, or by a `reader` a folder without an index; reads no features.

    `vocab_size` (V) and `hidden_size` (Ht) are the target's, checked against the index where there is one.

    Raises:
        UserError: nothing there, a damaged index, a shard missing or of a wrong size, another target's sizes.
    """
    folder = Path(folder)
    if (folder / "index.json").is_file():
        return _open_index(folder, vocab_size, hidden_size)
    names = [str(path.relative_to(folder)) for path in reader.find(folder)] if reader else []
    if not names:
        raise UserError(f"{folder}: no index.json there; {REMEDY} or name another folder")
    samples = [{"id": name, "shard": name} for name in names]
    return FeatureSet(folder, samples, {}, vocab_size, hidden_size, set(), reader)


def _open_index(folder: Path, vocab_size: int | None, hidden_size: int | None) -> FeatureSet:
    path = folder / "index.json"
    index = read_json(path)
    missing = [key for key in _INDEX_KEYS if not isinstance(index, dict) or key not in index]
    if missing:
        raise UserError(f"{path}: {missing[0]} is missing; {REMEDY}")
    if index["schema"] != SCHEMA:
        raise UserError(f"{path}: schema {index['schema']}: this version reads {SCHEMA}; {REMEDY}")
    _check_index(index, path)
    for shard in index["shards"]:
        file = folder / shard["file"]
        size = file.stat().st_size if file.is_file() else None
        if size != shard["bytes"]:
            found = "missing" if size is None else f"{size} bytes"
            raise UserError(f"{file}: {found}, must be {shard['bytes']} bytes; {REMEDY}")
    target = index["target"]
    _check_types(target, {"vocab_size": int, "hidden_size": int}, "target", path)
    for name, wanted in (("vocab_size", vocab_size), ("hidden_size", hidden_size)):
        if wanted not in (None, target[name]):
            raise UserError(
                f"{path}: made with target {target.get('name')!r}, {name} {target[name]}, not {wanted}; "
                f"name that target or {REMEDY}"
            )
    return FeatureSet(
        folder, index["samples"], index, target["vocab_size"], target["hidden_size"], set()
    )


def _check_index(index: dict[str, Any], path: Path) -> None:
    _check_types(index, _INDEX_TYPES, "", path)
    for name, types in (("samples", _SAMPLE_TYPES), ("shards", _SHARD_TYPES)):
        for number, entry in enumerate(index[name]):
            _check_types(entry, types, f"{name}[{number}]", path)
    if not index["samples"]:
        raise UserError(f"{path}: no samples; {REMEDY} on more conversations")
    known = {shard["file"] for shard in index["shards"]}
    for number, entry in enumerate(index["samples"]):
        if entry["shard"] not in known:
            raise UserError(
                f"{path}: samples[{number}].shard is {entry['shard']!r}: must be one of its shards; {REMEDY}"
            )


def _check_types(tree: Any, types: dict[str, type], where: str, path: Path) -> None:
    if not isinstance(tree, dict):
        raise UserError(f"{path}: {where} is {tree!r:.80}: must be a dict; {REMEDY}")
    for key, kind in types.items():
        if type(tree.get(key)) is not kind:
            name = f"{where}.{key}" if where else key
            found = (
                f"is {tree[key]!r:.80}: must be a {kind.__name__}" if key in tree else "is missing"
            )
            raise UserError(f"{path}: {name} {found}; {REMEDY}")


def check_made_for(
    features: FeatureSet, config_hash: str, aux_layers: Sequence[int], where: str
) -> None:
    """Refuse features made with a target of another configuration or with other tapped layers.

    `where` names what asks for `config_hash` and `aux_layers`, as in `the run`. What the index doesn't hold is not
    compared, so files of a `Reader` pass.

    Raises:
        UserError: they differ; names the index and both values.
    """
    path, target = features.folder / "index.json", features.index.get("target", {})
    found = target.get("config_hash", config_hash)
    if found != config_hash:
        raise UserError(
            f"{path}: made with a target of config_hash {str(found)[:12]}, {where} has {config_hash[:12]}; "
            f"name that target or {REMEDY} into another folder"
        )
    layers = target.get("aux_layers", list(aux_layers))
    if layers != list(aux_layers):
        raise UserError(
            f"{path}: made with aux_layers {layers}, {where} has {list(aux_layers)}; "
            f"set those layers or {REMEDY} into another folder"
        )


def check_shards(features: FeatureSet) -> None:
    """Compare every shard's bytes with the hash in the index.

    Raises:
        UserError: names the first shard that differs.
    """
    for shard in features.index.get("shards", []):
        _verify(features, shard)


def _verify(features: FeatureSet, shard: dict[str, Any]) -> None:
    if sha256(features.folder / shard["file"]) != shard["sha256"]:
        raise UserError(f"{features.folder / shard['file']}: its bytes have changed; {REMEDY}")
    features.verified.add(shard["file"])


def read_sample(features: FeatureSet, number: int) -> Sample:
    """Sample `number` with its features, checked; the first one of a shard has the shard's hash compared too.

    Raises:
        UserError: a shard missing, damaged or changed; wrong shapes or dtypes, NaN or infinity, an id outside the
            vocabulary.
    """
    entry = features.samples[number]
    path = features.folder / entry["shard"]
    if features.reader:
        sample = features.reader.sample(path)
    else:
        sample = Sample(*_tensors(path, entry, Sample._fields))
    if features.index and entry["shard"] not in features.verified:
        _verify(
            features,
            next(shard for shard in features.index["shards"] if shard["file"] == entry["shard"]),
        )
    length, wanted = (
        _refuse(features, number, sample.input_ids, sample.token_mask),
        features.index.get("dtype"),
    )
    what = hidden_fault(sample.aux_hidden, sample.last_hidden, length, features.hidden_size, wanted)
    if what:
        raise _fault(features, number, what)
    return sample


def read_tokens(features: FeatureSet, number: int) -> tuple[Tensor, Tensor]:
    """`input_ids` and `token_mask` of sample `number`, each `(S,)` int64, checked.

    Its features are not read, so the shard's hash is not compared here.
    """
    entry = features.samples[number]
    path = features.folder / entry["shard"]
    if features.reader:
        ids, mask = features.reader.tokens(path)
    else:
        ids, mask = _tensors(path, entry, ("input_ids", "token_mask"))
    _refuse(features, number, ids, mask)
    return ids, mask


def _refuse(features: FeatureSet, number: int, ids: Tensor, mask: Tensor) -> int:
    """The length of a sample whose tokens and mask are sound."""
    what = token_fault(ids, mask, features.samples[number].get("length"), features.vocab_size)
    if what:
        raise _fault(features, number, what)
    return len(ids)


def _tensors(path: Path, entry: dict[str, Any], names: tuple[str, ...]) -> list[Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return [file.get_tensor(f"{entry['key']}.{STORED.get(name, name)}") for name in names]
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path}: missing or damaged at sample {entry['id']!r} ({error}); {REMEDY}"
        ) from None


def _fault(features: FeatureSet, number: int, what: str) -> UserError:
    entry = features.samples[number]
    remedy = REMEDY if features.index else "delete the file or write it anew"
    return UserError(
        f"{features.folder / entry['shard']}: sample {entry['id']!r}: {what}; {remedy}"
    )

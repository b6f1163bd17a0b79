"""Conversations through the target into a feature folder; an extraction cut off goes on at its next shard."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eagle3fn.base.errors import UserError
from eagle3fn.base.files import open_text, read_json, read_jsonl, sha256
from eagle3fn.base.types import Sample
from eagle3fn.data.chat import describe_mask, encode, messages_of
from eagle3fn.data.features import shard_name, write_index, write_shard
from eagle3fn.data.fingerprint import config_hash, weights_digest
from eagle3fn.data.target import hidden_states


class Encoded(NamedTuple):
    """A conversation's tokens and mask, cut to the maximal length."""

    id: str
    input_ids: Tensor  # (S,) int64
    token_mask: Tensor  # (S,) int64


def extract(
    model: Any,
    tokenizer: Any,
    conversations: str | Path,
    out: str | Path,
    layers: Sequence[int],
    *,
    max_length: int,
    batch: int = 8,
    samples_per_shard: int = 64,
    limit: int | None = None,
    name: str | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Write the features of the first `limit` conversations (all, if None) to the folder `out`; returns its index.

    `layers` are the three tapped decoder layers, `name` the target's name in the index. Samples without a
    supervised token are dropped and counted. Finished shards of the same target, conversations and settings
    are kept.

    Raises:
        UserError: malformed conversations; none or all tokens supervised; `max_length` above the target's
            limit; a layer outside the target; `out` holds another extraction.
    """
    out, config = Path(out), model.config
    check_extraction(config, layers, max_length)
    tree = config.to_dict()
    target = {
        "name": name or config.name_or_path,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "num_layers": config.num_hidden_layers,
        "aux_layers": list(layers),
        "config_hash": config_hash(tree),
    }
    dtype = str(model.dtype).removeprefix("torch.")
    settings = {
        "conversations": sha256(_existing(conversations)),
        "config": target["config_hash"],
        "weights": weights_digest(model),
        "template": tokenizer.chat_template,
        "layers": list(layers),
        "max_length": max_length,
        "dtype": dtype,
        "samples_per_shard": samples_per_shard,
    }
    fingerprint = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    _refuse_other(out, fingerprint)
    rows = encode_all(tokenizer, conversations, max_length, config.vocab_size, limit)
    kept = supervised(rows)
    groups = [
        kept[start : start + samples_per_shard] for start in range(0, len(kept), samples_per_shard)
    ]
    sidecars, done = [], 0
    for number, group in enumerate(groups):
        entries = _entries(group, number * samples_per_shard)
        sidecar = _finished(out, number, entries)
        if sidecar is None:
            (out / "index.json").unlink(missing_ok=True)
            taps = run_target(model, group, layers, batch)
            samples = {entry["key"]: sample for entry, sample in zip(entries, taps, strict=True)}
            sidecar = write_shard(
                out, number, samples, {"fingerprint": fingerprint, "samples": entries}
            )
        sidecars.append(sidecar)
        done += len(group)
        on_progress(done, len(kept))
    index = {
        "fingerprint": fingerprint,
        "data_hash": settings["conversations"],
        "target": target,
        "dtype": dtype,
        "max_length": max_length,
        "dropped": len(rows) - len(kept),
    }
    return write_index(out, index, sidecars)


def _existing(path: str | Path) -> Path:
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; name a JSONL file (plain, .gz or .xz)")
    return Path(path)


def check_extraction(config: Any, layers: Sequence[int], max_length: int) -> None:
    """Raise a UserError if the target has no such positions or layers."""
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and max_length > limit:
        raise UserError(
            f"max_length = {max_length}: the target's max_position_embeddings is {limit}; "
            f"set --max-length to at most {limit}"
        )
    if len(layers) != 3 or not all(0 <= layer < config.num_hidden_layers for layer in layers):
        raise UserError(
            f"layers {list(layers)}: must be three target layers in [0, {config.num_hidden_layers})"
        )


def encode_all(
    tokenizer: Any,
    conversations: str | Path,
    max_length: int,
    vocab_size: int,
    limit: int | None = None,
) -> list[Encoded]:
    """Every conversation of a JSONL file as tokens, in the file's order.

    Raises:
        UserError: a malformed row (named by file, line and id), no rows, an id outside the target's vocabulary,
            none or all of the tokens supervised.
    """
    rows = read_jsonl(conversations)[:limit]
    with open_text(conversations) as file:
        lines = [number for number, line in enumerate(file, 1) if line.strip()]
    if not rows:
        raise UserError(f"{conversations}: no conversations; write one JSON object a line")
    encoded = []
    for number, row in zip(lines, rows, strict=False):
        name = str(row["id"]) if isinstance(row, dict) and "id" in row else None
        where = f"{conversations}:{number}" + (f" (id {name})" if name else "")
        ids, mask = encode(tokenizer, messages_of(row, where), where)
        if len(ids) and int(ids.max()) >= vocab_size:
            raise UserError(
                f"{where}: token id {int(ids.max())}: the target's vocabulary has {vocab_size}; "
                "take the tokenizer that belongs to the target"
            )
        encoded.append(Encoded(name or str(number), ids[:max_length], mask[:max_length]))
    _check_supervised(tokenizer, encoded, conversations)
    return encoded


def supervised(rows: Sequence[Encoded]) -> list[Encoded]:
    """The rows with a supervised token."""
    return [row for row in rows if row.token_mask.any()]


def _check_supervised(tokenizer: Any, encoded: list[Encoded], conversations: str | Path) -> None:
    total = sum(len(row.input_ids) for row in encoded)
    marked = sum(int(row.token_mask.sum()) for row in encoded)
    if 0 < marked < total:
        return
    shown = describe_mask(tokenizer, encoded[0].input_ids, encoded[0].token_mask)
    share = "100%" if marked else "0%"
    raise UserError(
        f"{conversations}: {share} of the tokens are supervised; conversations need user and assistant turns "
        f"within --max-length, and the chat template must tell them apart. First row, supervised in ⟦ ⟧: {shown!r}"
    )


def _refuse_other(out: Path, fingerprint: str) -> None:
    for path in [out / "index.json", *sorted(out.glob("shard-*.json"))]:
        tree = read_json(path) if path.is_file() else {"fingerprint": fingerprint}
        if not isinstance(tree, dict):
            raise UserError(f"{path}: not a JSON object; remove the folder {out} or choose another")
        if tree.get("fingerprint") != fingerprint:
            raise UserError(
                f"{path}: made from other conversations, another target or other settings; "
                f"remove the folder {out} or choose another"
            )


def _entries(group: list[Encoded], first: int) -> list[dict[str, Any]]:
    return [
        {
            "id": row.id,
            "key": str(key),
            "length": len(row.input_ids),
            "supervised": int(row.token_mask.sum()),
        }
        for key, row in enumerate(group, first)
    ]


def _finished(out: Path, number: int, entries: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The sidecar of shard `number` if the shard is there, holds these samples and has the sidecar's hash."""
    path = out / shard_name(number)
    if not path.is_file() or not path.with_suffix(".json").is_file():
        return None
    sidecar = read_json(path.with_suffix(".json"))
    found = {"file": path.name, "bytes": path.stat().st_size, "samples": entries}
    same = all(sidecar.get(key) == value for key, value in found.items())
    return sidecar if same and sidecar.get("sha256") == sha256(path) else None


def run_target(model: Any, group: list[Encoded], layers: Sequence[int], batch: int) -> list[Sample]:
    """Features of a group in its order; samples of like length share a batch, padded on the right."""
    by_length = sorted(range(len(group)), key=lambda i: len(group[i].input_ids))
    samples: dict[int, Sample] = {}
    for start in range(0, len(group), batch):
        chosen = by_length[start : start + batch]
        lengths = [len(group[i].input_ids) for i in chosen]
        ids = torch.zeros(len(chosen), max(lengths), dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, (i, length) in enumerate(zip(chosen, lengths, strict=True)):
            ids[row, :length], mask[row, :length] = group[i].input_ids, 1
        aux, last = hidden_states(model, ids.to(model.device), mask.to(model.device), layers)
        for row, (i, length) in enumerate(zip(chosen, lengths, strict=True)):
            taps = (aux[row, :length].cpu().clone(), last[row, :length].cpu().clone())
            samples[i] = Sample(group[i].input_ids.clone(), group[i].token_mask.clone(), *taps)
    return [samples[i] for i in range(len(group))]

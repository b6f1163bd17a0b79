"""Conversations through the target into a feature folder.

An extraction that was cut off, or ended with its time, goes on at its next shard.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eagle3fn.base.errors import UserError
from eagle3fn.base.files import json_sha256, read_json, read_numbered_jsonl, sha256
from eagle3fn.base.threads import Kept, read_kept
from eagle3fn.base.types import Sample
from eagle3fn.data.chat import describe_mask, encode, messages_of
from eagle3fn.data.decoder import hidden_states
from eagle3fn.data.features import shard_name, write_index, write_shard
from eagle3fn.data.target import model_config_hash, tensors_record, weights_digest


class Encoded(NamedTuple):
    """A conversation's tokens and mask, cut to the maximal length."""

    id: str
    input_ids: Tensor  # (S,) int64
    token_mask: Tensor  # (S,) int64, 1 on assistant tokens


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
    minutes: float | None = None,
    stored: torch.dtype | None = None,
    name: str | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Write the features of the first `limit` conversations (all, if None) to the folder `out`.

    Samples without a supervised token are dropped and counted. Finished shards of the same target,
    conversations and settings are kept. With `minutes` no shard is begun that would probably end
    later; the first one always is. The folder is complete with the shards that it has, and a later
    call makes the `remaining` samples of its index.

    Args:
        model: the target (`data.target.load_target`), on any device; it computes in its own dtype.
        tokenizer: the target's.
        conversations: a JSONL file, plain, .gz or .xz.
        out: the feature folder; made, or gone on with.
        layers: the three tapped decoder layers, counted from 0.
        max_length: tokens that a conversation is cut to.
        batch: conversations in one run of the target.
        samples_per_shard: samples in one file.
        limit: conversations read.
        minutes: the time for new shards; None, as long as all take.
        stored: the dtype of the stored features; None, the target's.
        name: the target's name in the index.
        on_progress: called with the samples done and their number.

    Returns:
        The folder's index.

    Raises:
        UserError: malformed conversations; none or all tokens supervised; `max_length` above the
            target's limit; a layer outside the target; `out` holds another extraction.
    """
    out = Path(out)
    config = model.config
    check_extraction(config, layers, max_length)

    stored_dtype: torch.dtype = stored or model.dtype
    target = _target_of(model, layers, name)
    settings = {
        "conversations": sha256(_existing(conversations)),
        "config": target["config_hash"],
        "weights": weights_digest(model),
        "template": tokenizer.chat_template,
        "layers": list(layers),
        "max_length": max_length,
        "dtype": _dtypes(model.dtype, stored_dtype),
        "samples_per_shard": samples_per_shard,
    }

    # A folder holds the features of one fingerprint.
    fingerprint = json_sha256(settings)
    _refuse_other(out, fingerprint)

    # All conversations are encoded first: a malformed one is refused before the target runs.
    rows = encode_all(tokenizer, conversations, max_length, config.vocab_size, limit)
    kept = supervised(rows)

    # One shard after the other. The index goes before the first new shard and comes after the
    # last, so that a folder with an index is complete.
    clock = _Clock(minutes)
    sidecars = []
    for number, start in enumerate(range(0, len(kept), samples_per_shard)):
        group = kept[start : start + samples_per_shard]
        entries = [_entry(key, row) for key, row in enumerate(group, start)]
        sidecar = _finished(out, number, entries)
        if sidecar is None:
            if sidecars and clock.is_up():
                break
            (out / "index.json").unlink(missing_ok=True)
            samples = run_target(model, group, layers, batch, stored)
            keys = [entry["key"] for entry in entries]
            sidecar = {
                "fingerprint": fingerprint,
                "threads": torch.get_num_threads(),
                "samples": entries,
            }
            sidecar = write_shard(out, number, dict(zip(keys, samples, strict=True)), sidecar)
            clock.shard_ended()
        sidecars.append(sidecar)
        on_progress(start + len(group), len(kept))

    made = sum(len(sidecar["samples"]) for sidecar in sidecars)
    index = {
        "fingerprint": fingerprint,
        "data_hash": settings["conversations"],
        "target": target,
        "dtype": _name(stored_dtype),
        "computed_in": _name(model.dtype),
        "max_length": max_length,
        "dropped": len(rows) - len(kept),
        "remaining": len(kept) - made,
    }
    return write_index(out, index, sidecars)


def _target_of(model: Any, layers: Sequence[int], name: str | None) -> dict[str, Any]:
    """What the index says of the target."""
    config = model.config
    return {
        "name": name or config.name_or_path,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "num_layers": config.num_hidden_layers,
        "aux_layers": list(layers),
        "config_hash": model_config_hash(model),
        "tensors": tensors_record(model),
    }


def _dtypes(computed: torch.dtype, stored: torch.dtype) -> str:
    """What the target computes in, and what is stored where that is another dtype."""
    if stored == computed:
        return _name(computed)
    return f"{_name(computed)}, stored in {_name(stored)}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def begun_threads(out: str | Path) -> Kept | None:
    """The number of threads that the folder's first shard was made with, if it has one.

    The last bits of the features may depend on it, so an extraction that goes on should keep it.
    """
    for path in sorted(Path(out).glob("shard-*.json")):
        return read_kept(path)
    return None


class _Clock:
    """Whether there is time for one more shard that takes as long as the longest before."""

    def __init__(self, minutes: float | None) -> None:
        self.end = None if minutes is None else time.monotonic() + 60 * minutes
        self.before = time.monotonic()
        self.longest = 0.0

    def shard_ended(self) -> None:
        now = time.monotonic()
        self.longest = max(self.longest, now - self.before)
        self.before = now

    def is_up(self) -> bool:
        self.before = time.monotonic()
        return self.end is not None and self.before + self.longest >= self.end


def _existing(path: str | Path) -> Path:
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; name a JSONL file (plain, .gz or .xz)")
    return Path(path)


def check_extraction(config: Any, layers: Sequence[int], max_length: int) -> None:
    """Check that a target has `max_length` positions and the three `layers`.

    Raises:
        UserError: it has not.
    """
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
    """The first `limit` conversations of a JSONL file (all, if None) as tokens, in file order.

    Raises:
        UserError: a malformed row (named by file, line and id), no rows, an id outside the target's
            vocabulary, none or all of the tokens supervised.
    """
    rows = read_numbered_jsonl(conversations)[:limit]
    if not rows:
        raise UserError(f"{conversations}: no conversations; write one JSON object a line")

    encoded = []
    for number, row in rows:
        name = str(row["id"]) if isinstance(row, dict) and "id" in row else None
        where = f"{conversations}:{number}"
        if name:
            where += f" (id {name})"
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
    """Refuse masks that are all 0 or all 1: the chat template was not understood."""
    total = sum(len(row.input_ids) for row in encoded)
    marked = sum(int(row.token_mask.sum()) for row in encoded)
    if 0 < marked < total:
        return

    share = "100%" if marked else "0%"
    shown = describe_mask(tokenizer, encoded[0].input_ids, encoded[0].token_mask)
    raise UserError(
        f"{conversations}: {share} of the tokens are supervised; "
        "conversations need user and assistant turns within --max-length, "
        "and the chat template must tell them apart. "
        f"First row, supervised in ⟦ ⟧: {shown!r}"
    )


def _refuse_other(out: Path, fingerprint: str) -> None:
    """Refuse a folder that holds an index or a shard of another fingerprint."""
    for path in [out / "index.json", *sorted(out.glob("shard-*.json"))]:
        if not path.is_file():
            continue
        tree = read_json(path)
        if not isinstance(tree, dict):
            raise UserError(f"{path}: not a JSON object; remove the folder {out} or choose another")
        if tree.get("fingerprint") != fingerprint:
            raise UserError(
                f"{path}: made from other conversations, another target or other settings; "
                f"remove the folder {out} or choose another"
            )


def _entry(key: int, row: Encoded) -> dict[str, Any]:
    """A sample's entry in the sidecar and the index."""
    return {
        "id": row.id,
        "key": str(key),
        "length": len(row.input_ids),
        "supervised": int(row.token_mask.sum()),
    }


def _finished(out: Path, number: int, entries: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The sidecar of shard `number`, if it is there with these samples and the sidecar's hash."""
    path = out / shard_name(number)
    if not path.is_file() or not path.with_suffix(".json").is_file():
        return None
    sidecar = read_json(path.with_suffix(".json"))
    expected = {"file": path.name, "bytes": path.stat().st_size, "samples": entries}
    if any(sidecar.get(key) != value for key, value in expected.items()):
        return None
    if sidecar.get("sha256") != sha256(path):
        return None
    return sidecar


def run_target(
    model: Any,
    group: Sequence[Encoded],
    layers: Sequence[int],
    batch: int,
    stored: torch.dtype | None = None,
) -> list[Sample]:
    """The samples of a group, in its order, on the CPU, in the dtype `stored` or the target's.

    The target runs on `batch` rows at a time, of like length, padded on the right.
    """
    by_length = sorted(range(len(group)), key=lambda number: len(group[number].input_ids))
    samples: dict[int, Sample] = {}
    for start in range(0, len(group), batch):
        chosen = by_length[start : start + batch]

        # Pad to the longest, which is the last.
        longest = len(group[chosen[-1]].input_ids)
        ids = torch.zeros(len(chosen), longest, dtype=torch.int64)  # (B, S)
        mask = torch.zeros_like(ids)  # (B, S)
        for row, number in enumerate(chosen):
            length = len(group[number].input_ids)
            ids[row, :length] = group[number].input_ids
            mask[row, :length] = 1

        # (B, S, 3·Ht) and (B, S, Ht)
        aux, last = hidden_states(model, ids.to(model.device), mask.to(model.device), layers)

        # Copies: a sample must not hold the whole batch in memory.
        for row, number in enumerate(chosen):
            length = len(group[number].input_ids)
            samples[number] = Sample(
                input_ids=group[number].input_ids.clone(),
                token_mask=group[number].token_mask.clone(),
                aux_hidden=aux[row, :length].to("cpu", stored, copy=True),
                last_hidden=last[row, :length].to("cpu", stored, copy=True),
            )
    return [samples[number] for number in range(len(group))]

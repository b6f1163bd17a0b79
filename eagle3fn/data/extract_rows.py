"""What an extraction does before the target runs: the conversations encoded, the folder checked.

Rank 0 alone reads the conversations; the other ranks read the samples that it made of them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from eagle3fn.base.errors import UserError, printable
from eagle3fn.base.files import json_sha256
from eagle3fn.base.launch import World
from eagle3fn.base.read import read_object
from eagle3fn.data.encode import encode_file
from eagle3fn.data.row_files import rows_digest
from eagle3fn.data.row_stamps import stamps_of
from eagle3fn.data.sample_file import SampleFile, samples_on_ranks
from eagle3fn.data.samples import SampleMaker
from eagle3fn.data.shards import Shards
from eagle3fn.data.sources import FeatureSource
from eagle3fn.data.target_files import KEPT, check_unchanged, target_digests
from eagle3fn.data.template import ChatTemplate

_SAMPLES = "samples"  # the file of the encoded samples, for as long as the extraction runs


class Rows(NamedTuple):
    """What is read of the conversations, and how."""

    template: ChatTemplate
    conversations: str | Path
    limit: int | None
    skip_bad: float | None
    processes: int
    on_rows: Callable[[int], None]


class Task(NamedTuple):
    """What all stages of an extraction read."""

    source: FeatureSource
    out: Path
    settings: dict[str, Any]  # all of the fingerprint but the conversations
    stored: torch.dtype
    store: str | None  # of `data.storage.STORES`
    rows: Rows
    world: World
    name: str  # of this run, for the places where its ranks meet


@contextmanager
def encoded_shards(task: Task) -> Iterator[tuple[Shards, dict[str, Any]]]:
    """The shards of the encoded conversations, and what rank 0 knows of them for the index."""
    place = f"{task.name}/encoded"
    path = task.out / _SAMPLES
    with samples_on_ranks(task.world, place, path, partial(_encode, task)) as (samples, facts):
        yield _shards(task, facts, samples), facts


def _shards(task: Task, facts: dict[str, Any], samples: SampleFile) -> Shards:
    return Shards(
        out=task.out,
        fingerprint=facts["fingerprint"],
        files=facts["digests"].get("files"),
        source=task.source,
        stored=task.stored,
        store=task.store,
        samples=samples,
        per_shard=task.settings["samples_per_shard"],
    )


def _encode(task: Task, path: Path | None) -> tuple[SampleFile, dict[str, Any]]:
    """The samples, written to `path` or a temporary file; fingerprint, digests and counts.

    Raises:
        UserError: as `encode_file`; the folder holds another extraction; the conversations change.
    """
    # What the folder's fingerprint is made of, and a refusal of a folder that has another.
    source, rows = task.source, task.rows
    stamps = stamps_of(rows.conversations)
    data_hash = rows_digest(rows.conversations)
    fingerprint = json_sha256({**task.settings, "conversations": data_hash})
    digests = {}
    if source.files is not None:
        digests = target_digests(source.files, task.out / KEPT)._asdict()
    check_target(source)
    asked = {**task.settings, "conversations": data_hash}
    _refuse_other(task.out, fingerprint, digests.get("files"), asked)

    # The samples.
    rejects = task.out / "rejects.jsonl"
    encoded = encode_file(
        SampleMaker(rows.template, task.settings["max_length"]),
        rows.conversations,
        source.config.vocab_size,
        path=path,
        limit=rows.limit,
        processes=rows.processes,
        skip_bad=rows.skip_bad,
        rejects=rejects,
        stamps=stamps,
        on_progress=rows.on_rows,
    )
    if rows.skip_bad is None:
        rejects.unlink(missing_ok=True)  # of an earlier call that left rows out
    facts = {
        "fingerprint": fingerprint,
        "data_hash": data_hash,
        "digests": digests,
        "counts": encoded.counts(),
    }
    return encoded.samples, facts


def check_target(source: FeatureSource) -> None:
    """Refuse a target whose files have changed since before it was loaded."""
    if source.files is not None and source.stamps is not None:
        check_unchanged(source.files, source.stamps)


def _refuse_other(out: Path, fingerprint: str, files: str | None, asked: dict[str, Any]) -> None:
    """Refuse a folder that holds an index or a shard of another fingerprint or target.

    `files` is the digest of the target's files. Folders of earlier versions have none. `asked` is
    what the fingerprint is made of.
    """
    for path in [out / "index.json", *sorted(out.glob("shard-*.json"))]:
        if not path.is_file():
            continue
        try:
            tree = read_object(path)
        except UserError:
            if path.name != "index.json":
                continue  # a damaged sidecar: its shard is made anew
            raise UserError(
                f"{path}: not a JSON object; delete this file, if it is a damaged one of this "
                f"folder, whose shards are then kept, or remove the folder {out} or choose another"
            ) from None
        if tree.get("fingerprint") != fingerprint:
            raise UserError(
                f"{path}: made {_differences(tree, asked)}; "
                f"remove the folder {out} or choose another"
            )
        target = tree.get("target") if path.name == "index.json" else None
        found = target.get("files") if isinstance(target, dict) else tree.get("target_files")
        if files and found not in (None, files):
            raise UserError(
                f"{path}: made with other files of the target: its weights, tokenizer or chat "
                f"template have changed; remove the folder {out} or choose another"
            )


def _differences(tree: dict[str, Any], asked: dict[str, Any]) -> str:
    """How an index differs from what is asked for, as far as it says so; a sidecar does not."""
    target = tree.get("target")
    target = target if isinstance(target, dict) else {}
    found = []
    if tree.get("data_hash", asked["conversations"]) != asked["conversations"]:
        found.append("from other conversations")
    if target.get("config_hash", asked.get("config")) != asked.get("config"):
        found.append(f"with another target, {printable(target.get('name'), 80)}")
    for name, was, now in (
        ("layers", target.get("aux_layers"), asked["layers"]),
        ("max_length", tree.get("max_length"), asked["max_length"]),
        ("store", tree.get("store"), asked.get("store")),
        ("engine", tree.get("engine"), asked.get("engine")),
    ):
        if "target" in tree and was != now:
            found.append(f"with {name} {_named(was)}, not {_named(now)}")
    return ", ".join(found) or "from other conversations, another target or other settings"


def _named(value: Any) -> str:
    """A setting's value in a message."""
    return "none" if value is None else printable(value, 80)

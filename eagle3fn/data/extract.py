"""Conversations through a source of features into a feature folder.

An extraction that was cut off, or ended with its time, goes on at its next shard.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from eagle3fn.base.errors import UserError, printable
from eagle3fn.base.files import json_sha256, sha256
from eagle3fn.base.read import read_json
from eagle3fn.base.threads import Kept, read_kept
from eagle3fn.base.types import Sample
from eagle3fn.data.encode import encode_file
from eagle3fn.data.features import remove_index, shard_name, tokens_digest, write_index, write_shard
from eagle3fn.data.held import held
from eagle3fn.data.row_files import data_files, rows_digest
from eagle3fn.data.samples import Encoded, SampleMaker
from eagle3fn.data.sources import FeatureSource, check_extraction
from eagle3fn.data.storage import check_store, store_entry
from eagle3fn.data.target_files import KEPT, check_unchanged, target_digests
from eagle3fn.data.template import ChatTemplate
from eagle3fn.data.validate import hidden_fault

SAMPLE_RULE = 2
"""Version of what a sample is: features of another rule are not mixed with those of this one."""


def extract(
    source: FeatureSource,
    template: ChatTemplate,
    conversations: str | Path,
    out: str | Path,
    *,
    max_length: int,
    samples_per_shard: int = 64,
    limit: int | None = None,
    minutes: float | None = None,
    stored: torch.dtype | None = None,
    store: str | None = None,
    skip_bad: float | None = None,
    processes: int = 1,
    on_rows: Callable[[int], None] = lambda rows: None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Write the features of the first `limit` conversations (all, if None) to the folder `out`.

    What gives no sample is dropped and counted by reason. Finished shards of the same target,
    conversations and settings are kept. With `minutes` no shard is begun that would probably end
    later; the first one always is. The folder is complete with the shards that it has, and a later
    call makes the `remaining` samples of its index.

    Args:
        source: what computes the features: a model in this process (`data.sources.model_source`) or
            a serving engine (`data.engine_source.engine_source`).
        template: the chat template of the target's tokenizer, with its arguments.
        conversations: a file or folder that `data.row_files.read_rows` reads.
        out: the feature folder; made, or gone on with.
        max_length: tokens that a sample is cut to.
        samples_per_shard: samples in one file.
        limit: conversations read.
        minutes: the time for new shards; None, as long as all take.
        stored: the dtype of the features as they are read; None, what the source computes in.
        store: how the hidden states lie on disk, by its name in `data.storage.STORES`, which are
            read as bfloat16; None, the values themselves.
        skip_bad: the share of rows that may be bad: they are written to `out`/rejects.jsonl and
            left out. None: bad rows are refused.
        processes: processes that encode conversations; more than 1 needs a main module that can be
            imported.
        on_rows: called with the conversations read.
        on_progress: called with the samples done and their number.

    Returns:
        The folder's index.

    Raises:
        UserError: malformed conversations; no sample; `max_length` above the target's limit; a
            layer outside the target; `out` holds another extraction; an engine fails, or gives what
            cannot be right, or the target's files change: finished shards are kept.
    """
    out = Path(out)
    check_extraction(source.config, source.layers, max_length)

    stamps = _stamps(conversations)
    stored_dtype = stored or source.dtype
    check_store(store, stored_dtype)
    settings = {
        **source.identity,
        "conversations": rows_digest(conversations),
        "template": [template.tokenizer.chat_template, template.arguments, template.stops],
        "rule": SAMPLE_RULE,
        "layers": list(source.layers),
        "max_length": max_length,
        "dtype": _dtypes(source.dtype, stored_dtype),
        "samples_per_shard": samples_per_shard,
        **store_entry(store),
    }

    # A folder holds the features of one fingerprint, and is written by one process.
    with held(out):
        return _extract(
            source,
            template,
            conversations,
            out,
            settings,
            stamps=stamps,
            stored=stored_dtype,
            store=store,
            limit=limit,
            minutes=minutes,
            skip_bad=skip_bad,
            processes=processes,
            on_rows=on_rows,
            on_progress=on_progress,
        )


def _extract(
    source: FeatureSource,
    template: ChatTemplate,
    conversations: str | Path,
    out: Path,
    settings: dict[str, Any],
    *,
    stamps: list[tuple[str, int, int]],
    stored: torch.dtype,
    store: str | None,
    limit: int | None,
    minutes: float | None,
    skip_bad: float | None,
    processes: int,
    on_rows: Callable[[int], None],
    on_progress: Callable[[int, int], None],
) -> dict[str, Any]:
    """`extract` into a folder that this process holds."""
    max_length = settings["max_length"]
    fingerprint = json_sha256(settings)
    digests = {}
    if source.files is not None:
        digests = target_digests(source.files, out / KEPT)._asdict()
    _check_unchanged(source)
    files = digests.get("files")
    _refuse_other(out, fingerprint, files)

    # All conversations are encoded first: a malformed one is refused before the target runs.
    encoded = encode_file(
        SampleMaker(template, max_length),
        conversations,
        source.config.vocab_size,
        folder=out.parent,
        limit=limit,
        processes=processes,
        skip_bad=skip_bad,
        rejects=out / "rejects.jsonl",
        on_progress=on_rows,
    )
    if stamps != _stamps(conversations):
        encoded.samples.close()
        raise UserError(
            f"{conversations}: changed while it was read; wait until it is written, and call again"
        )
    if skip_bad is None:
        (out / "rejects.jsonl").unlink(missing_ok=True)  # of an earlier call that left rows out
    with encoded.samples as samples:
        total = len(samples)
        per_shard = settings["samples_per_shard"]
        shards = _Shards(out, fingerprint, files, source, per_shard, stored, store)
        sidecars = shards.write(samples, minutes, on_progress)
    _check_unchanged(source)

    made = sum(len(sidecar["samples"]) for sidecar in sidecars)
    index = {
        "fingerprint": fingerprint,
        "data_hash": settings["conversations"],
        "target": {**source.target, **digests},
        **source.index,
        "dtype": _name(stored),
        "computed_in": _name(source.dtype),
        **store_entry(store),
        "max_length": max_length,
        "template_arguments": template.arguments,
        **encoded.counts(),
        "remaining": total - made,
    }
    return write_index(out, index, sidecars)


def _check_unchanged(source: FeatureSource) -> None:
    """Refuse a target whose files have changed since before it was loaded."""
    if source.files is not None and source.stamps is not None:
        check_unchanged(source.files, source.stamps)


def _stamps(conversations: str | Path) -> list[tuple[str, int, int]]:
    """Names, sizes and times of the files of rows."""
    found = [(file.name, file.stat()) for file in data_files(conversations)]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in found]


class _Shards(NamedTuple):
    """How the shards of a folder are made."""

    out: Path
    fingerprint: str
    files: str | None  # digest of the target's files
    source: FeatureSource
    samples_per_shard: int
    stored: torch.dtype
    store: str | None

    def write(
        self,
        samples: Sequence[Encoded],
        minutes: float | None,
        on_progress: Callable[[int, int], None],
    ) -> list[dict[str, Any]]:
        """Write the shards that are not there, as long as there is time; all sidecars.

        The index goes before the first new shard: a folder with an index is complete.
        """
        clock = _Clock(minutes)
        sidecars = []
        for number, start in enumerate(range(0, len(samples), self.samples_per_shard)):
            group = samples[start : start + self.samples_per_shard]
            entries = [_entry(key, row) for key, row in enumerate(group, start)]
            sidecar = _finished(self.out, number, entries)
            if sidecar is None:
                if sidecars and clock.is_up():
                    break
                remove_index(self.out)
                sidecar = self._run(number, group, entries)
                clock.shard_ended()
            sidecars.append(sidecar)
            on_progress(start + len(group), len(samples))
        return sidecars

    def _run(
        self, number: int, group: Sequence[Encoded], entries: list[dict[str, Any]]
    ) -> dict[str, Any]:
        """Compute the features and write a shard; its sidecar."""
        features = self.source.features(group, self.stored)
        for entry, sample in zip(entries, features, strict=True):
            self._check_finite(entry, sample)
        keys = [entry["key"] for entry in entries]
        files = {} if self.files is None else {"target_files": self.files}
        sidecar = {
            "fingerprint": self.fingerprint,
            **files,
            **self.source.sidecar(),
            "samples": entries,
        }
        named = dict(zip(keys, features, strict=True))
        return write_shard(self.out, number, named, sidecar, self.store)

    def _check_finite(self, entry: dict[str, Any], sample: Sample) -> None:
        """Refuse features that training would refuse, by the layer that they come from."""
        last = sample.last_hidden
        what = hidden_fault(
            sample.aux_hidden,
            last,
            length=entry["length"],
            taps=len(self.source.layers),
            size=last.shape[-1],
            dtype=_name(self.stored),
        )
        if what is None:
            return
        layer = "after its last layer"
        layers = self.source.layers
        states = sample.aux_hidden.chunk(len(layers), -1)
        for number, state in zip(layers, states, strict=True):
            if hidden_fault(state, state, entry["length"], taps=1, size=None, dtype=None):
                layer = f"after layer {number}"
                break
        raise UserError(
            f"sample {printable(repr(entry['id']))}: {what}: the target's state {layer} is no "
            f"number that {_name(self.stored)} holds and training takes, computed in "
            f"{_name(self.source.dtype)}; look at the target's weights, compute it in float32 "
            "(--dtype), or leave the row out"
        )


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


def _refuse_other(out: Path, fingerprint: str, files: str | None) -> None:
    """Refuse a folder that holds an index or a shard of another fingerprint or target.

    `files` is the digest of the target's files. Folders of earlier versions have none.
    """
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
        target = tree.get("target") if path.name == "index.json" else None
        found = target.get("files") if isinstance(target, dict) else tree.get("target_files")
        if files and found not in (None, files):
            raise UserError(
                f"{path}: made with other files of the target: its weights, tokenizer or chat "
                f"template have changed; remove the folder {out} or choose another"
            )


def _entry(key: int, row: Encoded) -> dict[str, Any]:
    """A sample's entry in the sidecar and the index.

    By its tokens' digest a shard is made again if another tokenizer gives other tokens.
    """
    return {
        "id": row.id,
        "key": str(key),
        "length": len(row.input_ids),
        "supervised": int(row.token_mask.sum()),
        "tokens": tokens_digest(row.id, row.input_ids, row.token_mask),
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

"""Conversations through a source of features into a feature folder, by one rank or several.

Rank 0 encodes the conversations and writes the index; every rank makes its share of the shards
(`data.shards`). An extraction that was cut off, or ended with its time, goes on at the shards that
are not there, on any number of ranks.
"""

import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from eagle3fn.base.errors import UserError
from eagle3fn.base.files import json_sha256
from eagle3fn.base.launch import World
from eagle3fn.base.read import read_json
from eagle3fn.base.temporary import UNFINISHED, side_folder
from eagle3fn.data.encode import encode_file
from eagle3fn.data.feature_size import FeatureSize, bytes_per_token, feature_size
from eagle3fn.data.features import write_index
from eagle3fn.data.held import held
from eagle3fn.data.row_files import data_files, rows_digest
from eagle3fn.data.sample_file import SampleFile
from eagle3fn.data.samples import SampleMaker
from eagle3fn.data.shards import Shards, Sidecar, dtype_name, in_time
from eagle3fn.data.sources import FeatureSource, check_extraction
from eagle3fn.data.target_files import KEPT, check_unchanged, target_digests
from eagle3fn.data.template import ChatTemplate

SAMPLE_RULE = 2
"""Version of what a sample is: features of another rule are not mixed with those of this one."""

_SAMPLES = "samples"  # the file of the encoded samples, for as long as the extraction runs


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
    skip_bad: float | None = None,
    processes: int = 1,
    world: World = World(),  # noqa: B008
    say: Callable[[str], None] = lambda line: None,
    on_rows: Callable[[int], None] = lambda rows: None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Write the features of the first `limit` conversations (all, if None) to the folder `out`.

    What gives no sample is dropped and counted by reason. Finished shards of the same target,
    conversations and settings are kept. With `minutes` no shard is begun that would probably end
    later; each rank's first one always is. The folder is complete with the shards up to the first
    that is missing, and a later call makes the `remaining` samples of its index.

    All ranks call it alike. Rank 0 alone reads the conversations; `out` is a folder that all see.

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
        stored: the dtype of the stored features; None, what the source computes in.
        skip_bad: the share of rows that may be bad: they are written to `out`/rejects.jsonl and
            left out. None: bad rows are refused.
        processes: processes that encode conversations; more than 1 needs a main module that can be
            imported.
        world: the ranks.
        say: called on rank 0 with a line on the features' size, before the target runs.
        on_rows: called with the conversations read, on rank 0 as `on_progress`.
        on_progress: called with the tokens of the shards that are there and those of all: first
            with what was found, then as all ranks make more.

    Returns:
        The folder's index on rank 0, an empty one on the others.

    Raises:
        UserError: malformed conversations; no sample; `max_length` above the target's limit; a
            layer outside the target; no room for the features; `out` holds another extraction; an
            engine fails, or gives what cannot be right, or the target's files change: finished
            shards are kept. Ranks that were started differently.
    """
    stored_dtype = stored or source.dtype
    check_extraction(source.config, source.layers, max_length)
    settings = {
        **source.identity,
        "template": [template.tokenizer.chat_template, template.arguments, template.stops],
        "rule": SAMPLE_RULE,
        "layers": list(source.layers),
        "max_length": max_length,
        "dtype": _dtypes(source.dtype, stored_dtype),
        "samples_per_shard": samples_per_shard,
    }
    world.agree(_facts(source, settings, minutes))
    rows = _Rows(
        template=template,
        conversations=conversations,
        limit=limit,
        skip_bad=skip_bad,
        processes=processes,
        on_rows=on_rows,
    )
    task = _Task(source, Path(out), settings, stored_dtype, rows, world, _name_of_run(world))

    # A folder holds the features of one fingerprint, and is written by one program.
    with held(out, world=world):
        return _extract(task, minutes, say, on_progress)


class _Rows(NamedTuple):
    """What is read of the conversations, and how."""

    template: ChatTemplate
    conversations: str | Path
    limit: int | None
    skip_bad: float | None
    processes: int
    on_rows: Callable[[int], None]


class _Task(NamedTuple):
    """What all stages of an extraction read."""

    source: FeatureSource
    out: Path
    settings: dict[str, Any]  # all of the fingerprint but the conversations
    stored: torch.dtype
    rows: _Rows
    world: World
    name: str  # of this run, for the places where its ranks meet


def _extract(
    task: _Task,
    minutes: float | None,
    say: Callable[[str], None],
    on_progress: Callable[[int, int], None],
) -> dict[str, Any]:
    """`extract` into a folder that this program holds."""
    world = task.world
    _check_unchanged(task.source)

    # All conversations are encoded first: a malformed one is refused before the target runs.
    with _encoded(task) as (shards, facts):
        found = {}
        for number in shards.numbers(world):
            sidecar = shards.find(number)
            if sidecar is not None:
                found[number] = sidecar

        # What all of it takes on the disk: said, or refused, before the target runs.
        tally = _Tally(task, shards, found)
        if world.main:
            size = tally.size()
            say(size.describe(task.out))
            if minutes is None:
                size.check_fits(task.out)
        world.meet(f"{task.name}/fits", None)

        # This rank's share, as long as there is time.
        show = tally.shown(on_progress)
        show()
        missing = [number for number in shards.numbers(world) if number not in found]
        for number in in_time(missing, minutes, first=not found):
            found[number] = shards.make(number)
            tally.add(found[number])
            show()
        _check_unchanged(task.source)

        # The index, of what all ranks have made.
        end = next((number for number in missing if number not in found), shards.count)
        end = min(world.meet(f"{task.name}/made", end, show))
        if not world.main:
            return {}
        sidecars = [found.get(number) or shards.found_by_others(number) for number in range(end)]
        return _write_index(task, facts, sidecars, len(shards.samples))


def _facts(
    source: FeatureSource, settings: dict[str, Any], minutes: float | None
) -> dict[str, Any]:
    """What all ranks must have in common."""
    facts = {**settings, "template": json_sha256(settings["template"])[:12], "--minutes": minutes}
    if source.head.device.type == "cpu":
        facts |= source.sidecar()  # the threads, on which the last bits may depend
    return facts


def _name_of_run(world: World) -> str:
    """A name that no other run of this program's ranks has."""
    return f"extract/{world.shared(secrets.token_hex(8))}"


# Before the target runs


@contextmanager
def _encoded(task: _Task) -> Iterator[tuple[Shards, dict[str, Any]]]:
    """The shards of the encoded conversations, and what rank 0 knows of them for the index.

    Rank 0 encodes into a file in the folder that the others read; the block's end removes it.
    """
    place = f"{task.name}/encoded"
    if not task.world.main:
        facts = task.world.meet(place, None)[0]
        with SampleFile.written(task.out / facts["samples"]) as samples:
            yield _shards(task, facts, samples), facts
        return

    with side_folder(task.out / _SAMPLES, UNFINISHED) as side:
        path = side / _SAMPLES
        samples, facts = _encode(task, path)
        with samples:
            samples.flush()
            facts["samples"] = str(path.relative_to(task.out))
            task.world.meet(place, facts)
            yield _shards(task, facts, samples), facts


def _shards(task: _Task, facts: dict[str, Any], samples: SampleFile) -> Shards:
    return Shards(
        out=task.out,
        fingerprint=facts["fingerprint"],
        files=facts["digests"].get("files"),
        source=task.source,
        stored=task.stored,
        samples=samples,
        per_shard=task.settings["samples_per_shard"],
    )


def _encode(task: _Task, path: Path) -> tuple[SampleFile, dict[str, Any]]:
    """The samples, written to `path`; fingerprint, digests and counts.

    Raises:
        UserError: as `encode_file`; the folder holds another extraction; the conversations change.
    """
    # What the folder's fingerprint is made of, and a refusal of a folder that has another.
    source, rows = task.source, task.rows
    stamps = _stamps(rows.conversations)
    data_hash = rows_digest(rows.conversations)
    fingerprint = json_sha256({**task.settings, "conversations": data_hash})
    digests = {}
    if source.files is not None:
        digests = target_digests(source.files, task.out / KEPT)._asdict()
    _check_unchanged(source)
    _refuse_other(task.out, fingerprint, digests.get("files"))

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
        on_progress=rows.on_rows,
    )
    if stamps != _stamps(rows.conversations):
        encoded.samples.close()
        raise UserError(
            f"{rows.conversations}: changed while it was read; wait until it is written, and call "
            "again"
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


def _check_unchanged(source: FeatureSource) -> None:
    """Refuse a target whose files have changed since before it was loaded."""
    if source.files is not None and source.stamps is not None:
        check_unchanged(source.files, source.stamps)


def _stamps(conversations: str | Path) -> list[tuple[str, int, int]]:
    """Names, sizes and times of the files of rows."""
    found = [(file.name, file.stat()) for file in data_files(conversations)]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in found]


def _dtypes(computed: torch.dtype, stored: torch.dtype) -> str:
    """What the target computes in, and what is stored where that is another dtype."""
    if stored == computed:
        return dtype_name(computed)
    return f"{dtype_name(computed)}, stored in {dtype_name(stored)}"


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


# While it runs


class _Tally:
    """Counts the tokens of finished shards over all ranks."""

    def __init__(self, task: _Task, shards: Shards, found: dict[int, Sidecar]) -> None:
        self.task = task
        self.samples = shards.samples
        self.all_tokens = shards.samples.tokens
        self.made = 0  # tokens, by this rank

        # Samples and tokens that all ranks have found.
        own = [len(_lengths(found.values())), sum(_lengths(found.values()))]
        every = task.world.meet(f"{task.name}/found", own)
        self.found = (sum(samples for samples, _ in every), sum(tokens for _, tokens in every))

    def size(self) -> FeatureSize:
        """What the features take on the disk."""
        source = self.task.source
        sizes = (source.config.hidden_size, len(source.layers), self.task.stored)
        return feature_size(
            self.task.out,
            samples=len(self.samples),
            tokens=self.all_tokens,
            found=self.found,
            token_bytes=bytes_per_token(*sizes),
        )

    def add(self, sidecar: Sidecar) -> None:
        """Count a shard that this rank has made."""
        self.made += sum(_lengths([sidecar]))
        self.task.world.post(f"{self.task.name}/tokens", self.made)

    def shown(self, on_progress: Callable[[int, int], None]) -> Callable[[], None]:
        """A function that tells rank 0's user how far all ranks are."""

        def show() -> None:
            others = sum(self.task.world.posted(f"{self.task.name}/tokens"))
            on_progress(self.found[1] + self.made + others, self.all_tokens)

        return show if self.task.world.main else lambda: None


def _lengths(sidecars: Iterable[Sidecar]) -> list[int]:
    """Tokens of each sample."""
    return [entry["length"] for sidecar in sidecars for entry in sidecar["samples"]]


def _write_index(
    task: _Task, facts: dict[str, Any], sidecars: list[Sidecar], samples: int
) -> dict[str, Any]:
    """Write the index of finished shards; `samples` is the number of all."""
    source = task.source
    made = sum(len(sidecar["samples"]) for sidecar in sidecars)
    index = {
        "fingerprint": facts["fingerprint"],
        "data_hash": facts["data_hash"],
        "target": {**source.target, **facts["digests"]},
        **source.index,
        "dtype": dtype_name(task.stored),
        "computed_in": dtype_name(source.dtype),
        "max_length": task.settings["max_length"],
        "template_arguments": task.rows.template.arguments,
        **facts["counts"],
        "remaining": samples - made,
    }
    return write_index(task.out, index, sidecars)

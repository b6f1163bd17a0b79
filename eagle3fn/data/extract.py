"""Conversations through a source of features into a feature folder, by one rank or several.

Rank 0 encodes the conversations and writes the index; every rank makes its share of the shards
(`data.shards`). An extraction that was cut off, or ended with its time, goes on at the shards that
are not there, on any number of ranks.
"""

import secrets
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from eagle3fn.base.files import json_sha256
from eagle3fn.base.launch import World
from eagle3fn.data.extract_rows import Rows, Task, check_target, encoded_shards
from eagle3fn.data.feature_size import FeatureSize, bytes_per_token, feature_size
from eagle3fn.data.feature_writing import write_index
from eagle3fn.data.held import held
from eagle3fn.data.shards import Shards, Sidecar, dtype_name, in_time
from eagle3fn.data.sources import FeatureSource, check_extraction
from eagle3fn.data.storage import check_store, store_entry
from eagle3fn.data.template import ChatTemplate

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
    world: World = World(),  # noqa: B008
    say: Callable[[str], None] = lambda line: None,
    on_rows: Callable[[int], None] = lambda rows: None,
    on_check: Callable[[int, int], None] = lambda done, total: None,
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
        stored: the dtype of the features as they are read; None, what the source computes in.
        store: how the hidden states lie on disk, by its name in `data.storage.STORES`, which are
            read as bfloat16; None, the values themselves.
        skip_bad: the share of rows that may be bad: they are written to `out`/rejects.jsonl and
            left out. None: bad rows are refused.
        processes: processes that encode conversations; more than 1 needs a main module that can be
            imported.
        world: the ranks.
        say: called on rank 0 with a line on the features' size, before the target runs.
        on_rows: called with the conversations read, on rank 0 as the other two.
        on_check: called with rank 0's shards that were looked for, and compared with their hashes
            where they are there, and those of all.
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
    check_store(store, stored_dtype)
    check_extraction(source.config, source.layers, max_length)
    settings = {
        **source.identity,
        "template": [template.tokenizer.chat_template, template.arguments, template.stops],
        "rule": SAMPLE_RULE,
        "layers": list(source.layers),
        "max_length": max_length,
        "dtype": _dtypes(source.dtype, stored_dtype),
        "samples_per_shard": samples_per_shard,
        **store_entry(store),
    }
    world.agree(_facts(source, settings, minutes))
    rows = Rows(
        template=template,
        conversations=conversations,
        limit=limit,
        skip_bad=skip_bad,
        processes=processes,
        on_rows=on_rows,
    )
    task = Task(source, Path(out), settings, stored_dtype, store, rows, world, _name_of_run(world))

    # A folder holds the features of one fingerprint, and is written by one program.
    with held(out, world=world):
        return _extract(task, minutes, say, on_check, on_progress)


def _extract(
    task: Task,
    minutes: float | None,
    say: Callable[[str], None],
    on_check: Callable[[int, int], None],
    on_progress: Callable[[int, int], None],
) -> dict[str, Any]:
    """`extract` into a folder that this program holds."""
    world = task.world
    check_target(task.source)

    # All conversations are encoded first: a malformed one is refused before the target runs.
    with encoded_shards(task) as (shards, facts):
        own = shards.numbers(world)
        found = {}
        for place, number in enumerate(own, 1):
            sidecar = shards.find(number)
            if sidecar is not None:
                found[number] = sidecar
            if world.main:
                on_check(place, len(own))

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
        missing = [number for number in own if number not in found]
        for number in in_time(missing, minutes, first=not found):
            found[number] = shards.make(number)
            tally.add(found[number])
            show()
        check_target(task.source)

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


def _dtypes(computed: torch.dtype, stored: torch.dtype) -> str:
    """What the target computes in, and what is stored where that is another dtype."""
    if stored == computed:
        return dtype_name(computed)
    return f"{dtype_name(computed)}, stored in {dtype_name(stored)}"


class _Tally:
    """Counts the tokens of finished shards over all ranks."""

    def __init__(self, task: Task, shards: Shards, found: dict[int, Sidecar]) -> None:
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
        task = self.task
        sizes = (source.config.hidden_size, len(source.layers), task.stored, task.store)
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
    task: Task, facts: dict[str, Any], sidecars: list[Sidecar], samples: int
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
        **store_entry(task.store),
        "max_length": task.settings["max_length"],
        "template_arguments": task.rows.template.arguments,
        **facts["counts"],
        "remaining": samples - made,
    }
    return write_index(task.out, index, sidecars)

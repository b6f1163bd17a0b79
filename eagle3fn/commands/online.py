"""What `train --online` opens: conversations or prompts, and the sources of their features."""

import threading
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eagle3fn.base import progress
from eagle3fn.commands.shared import chat_template, given_options, say
from eagle3fn.commands.sources import check_engine_options, engine_source, model_source

if TYPE_CHECKING:
    from eagle3fn.base.config import Config
    from eagle3fn.base.launch import World
    from eagle3fn.data.features import FeatureSet
    from eagle3fn.data.generate import Sampling
    from eagle3fn.data.on_demand import OnlineSamples
    from eagle3fn.data.sample_file import SampleFile
    from eagle3fn.data.source_pool import Source
    from eagle3fn.data.sources import FeatureSource
    from eagle3fn.data.template import ChatTemplate

GIB = 2**30
_ONLINE = (
    "--target-device",
    "--dtype",
    "--batch-tokens",
    "--max-length",
    "--limit",
    "--skip-bad",
    "--template-arg",
    "--engine",
    "--engine-python",
    "--engine-url",
    "--engine-arg",
    "--check",
    "--sources",
    "--buffer",
    "--keep",
    "--generate",
    "--max-new",
    "--temperature",
)
_GENERATE = ("--max-new", "--temperature")


def check_online_options(options: Any) -> None:
    """Refuse options that would have no effect or do not go together, by name."""
    from eagle3fn.base.errors import UserError

    if options.online is None:
        for name in given_options(options, _ONLINE):
            raise UserError(f"{name}: needs --online, conversations that features are computed of")
        return
    if not options.generate:
        for name in given_options(options, _GENERATE):
            raise UserError(f"{name}: needs --generate, by which the target writes the answers")
    elif options.engine_url:
        raise UserError(
            "--generate: a running server's answers are not taken; name the Python of an "
            "environment that has the engine, --engine-python, or leave --engine out"
        )

    check_engine_options(options, ("engine_arg",))
    for name in given_options(options, _useless(options)):
        raise UserError(f"{name}: {_WHY[name]}; leave it out")


_WHY = {
    "--sources": "is of an engine's processes; each --engine-url is a source, and so is the target "
    "in this process",
    "--target-device": "an engine chooses its device, by --engine-arg",
}


def _useless(options: Any) -> tuple[str, ...]:
    """Names of options that these sources have no use for."""
    if not options.engine:
        return ("--sources",)
    return ("--target-device", "--sources") if options.engine_url else ("--target-device",)


@contextmanager
def online_features(
    options: Any, tree: dict[str, Any], layers: tuple[int, ...], world: "World"
) -> "Iterator[FeatureSet]":
    """The conversations as samples with features on demand, while the block runs.

    Args:
        options: the command's, checked.
        tree: the target's configuration (`data.target_source.target_config`).
        layers: the tapped decoder layers, ascending and counted from 0.
        world: the ranks, each of which has its own sources.

    Raises:
        UserError: bad rows, no sample, a target or an engine that cannot be had.
    """
    from eagle3fn.data.on_demand import OnlineSamples, Widths
    from eagle3fn.data.online import STORED, MadeFrom, online_set
    from eagle3fn.data.sample_file import samples_on_ranks
    from eagle3fn.data.source_pool import Pool

    with ExitStack() as own:
        path = Path(f"{options.out}.samples")
        positions = tree.get("max_position_embeddings")
        encode = partial(_encode, options, tree["vocab_size"], positions)
        rows, known = own.enter_context(samples_on_ranks(world, "train/online", path, encode))
        progress.close()
        for line in known["said"] if world.main else ():
            say(line)

        sources = _sources(options, tree, layers, world)
        pool = own.enter_context(Pool(sources, say=progress.say))
        if options.engine_python and world.main:
            say(
                f"{options.engine} starts; what it prints is in {options.out}.{options.engine}*.log"
            )
        source = pool.first()
        samples = OnlineSamples(
            rows,
            pool,
            Widths(len(layers), tree["hidden_size"], STORED),
            _sampling(options) if options.generate else None,
        )
        made_from = MadeFrom(options.online, known["fingerprint"], known["facts"])
        features = online_set(rows, source, samples, made_from)
        if world.main:
            _say_sources(options, source, len(sources), features)
        yield features
        if world.main:
            progress.say(pool.counts.describe())


def begin_online(features: "FeatureSet", options: Any, config: "Config", world: "World") -> None:
    """Size the buffer, and seed the answers, once the run's configuration is known.

    Raises:
        UserError: a buffer that an update's samples may not fit.
    """
    import numpy as np

    from eagle3fn.base.errors import UserError
    from eagle3fn.data.on_demand import BUFFER

    samples: OnlineSamples = features.on_demand  # type: ignore[assignment]
    samples.seed = config.train.seed

    # The longest samples may come in one update; packed ones all in one rank's bins.
    assert features.lengths is not None
    batch = config.data.global_batch
    count = batch if config.data.pack_tokens else -(-batch // world.size)
    needed = int(np.sort(features.lengths)[-count:].sum()) * samples.widths.bytes_per_token
    given = None if options.buffer is None else int(options.buffer * GIB)
    if given is not None and given < needed:
        raise UserError(
            f"--buffer {options.buffer:g}: one update's features may take {needed / GIB:.3g} GiB; "
            "give as much at least, or lower data.global_batch or --max-length"
        )
    samples.buffer = given or max(BUFFER, 2 * needed)


@contextmanager
def kept_features(
    folder: str, features: "FeatureSet", config: "Config", world: "World"
) -> Iterator[None]:
    """Keep the features that pass, and say at the block's end what is there.

    Raises:
        UserError: as `data.keeping.keeping`.
    """
    from eagle3fn.data.keeping import keeping

    with keeping(folder, features, config.data.held_out, world) as keeper:
        try:
            yield
        except BaseException:
            # Ranks that have not failed do not meet here: the next call writes the index.
            if world.size == 1:
                keeper.finish()
            else:
                keeper.flush()
            raise
        line = keeper.finish()
        if line:
            progress.say(line)


# The rows


def _encode(
    options: Any, vocab_size: int, positions: int | None, path: Path | None
) -> "tuple[SampleFile, dict[str, Any]]":
    """The rows, written to `path` or a temporary file, and what is known of them."""
    from eagle3fn.base.files import json_sha256
    from eagle3fn.data.extract import SAMPLE_RULE
    from eagle3fn.data.row_files import rows_digest
    from eagle3fn.data.row_stamps import check_stamps, stamps_of
    from eagle3fn.data.sources import check_max_length
    from eagle3fn.data.target_loading import load_tokenizer

    check_max_length(options.max_length, positions)
    template = chat_template(options, load_tokenizer(options.target))
    stamps = stamps_of(options.online)
    data_hash = rows_digest(options.online)
    read = _prompts if options.generate else _samples
    samples, counts, said = read(options, template, vocab_size, path)
    check_stamps(options.online, stamps)
    settings = {
        "template": [template.tokenizer.chat_template, template.arguments, template.stops],
        "rule": SAMPLE_RULE,
        "max_length": options.max_length,
        "batch_tokens": options.batch_tokens,
        "conversations": data_hash,
        "answers": _sampling(options)._asdict() if options.generate else None,
    }
    facts = {
        "data_hash": data_hash,
        "max_length": options.max_length,
        "template_arguments": template.arguments,
        **counts,
        "remaining": 0,
    }
    return samples, {"fingerprint": json_sha256(settings), "facts": facts, "said": said}


def _samples(
    options: Any, template: "ChatTemplate", vocab_size: int, path: Path | None
) -> "tuple[SampleFile, dict[str, Any], list[str]]":
    """Conversations, with their answers."""
    from eagle3fn.base.cores import local_ranks, own_cores
    from eagle3fn.data.encode import describe_counts, encode_file
    from eagle3fn.data.samples import NO_ANSWER, SampleMaker

    rejects = f"{options.out}.rejects.jsonl"
    encoded = encode_file(
        SampleMaker(template, options.max_length),
        options.online,
        vocab_size,
        path=path,
        limit=options.limit,
        processes=own_cores() * local_ranks(),  # the other ranks wait meanwhile
        skip_bad=options.skip_bad,
        rejects=rejects,
        on_progress=progress.counter("row"),
    )
    counts = encoded.counts()
    said = describe_counts(counts, rejects)
    if counts["dropped_reasons"].get(NO_ANSWER):
        said.append("with --generate the target answers prompts itself")
    return encoded.samples, counts, said


def _prompts(
    options: Any, template: "ChatTemplate", vocab_size: int, path: Path | None
) -> "tuple[SampleFile, dict[str, Any], list[str]]":
    """Prompts, which the target will answer."""
    from eagle3fn.data.prompt_rows import prompt_rows

    found = prompt_rows(
        template,
        options.online,
        max_length=options.max_length,
        max_new=_sampling(options).max_new,
        out=path,
        limit=options.limit,
        skip_bad=options.skip_bad,
        rejects=f"{options.out}.rejects.jsonl",
    )
    return found.samples, found.counts(), found.describe()


def _sampling(options: Any) -> "Sampling":
    """How answers are drawn: as the options say, else as `regenerate` draws them."""
    from eagle3fn.data.regenerate import ANEW

    given = {name: getattr(options, name, None) for name in ANEW._fields}
    return ANEW._replace(**{name: value for name, value in given.items() if value is not None})


# The sources


def _sources(
    options: Any, tree: dict[str, Any], layers: tuple[int, ...], world: "World"
) -> "Sequence[Source]":
    """The target in this process; or an engine's processes; or its running servers."""
    from eagle3fn.base.device import check_device
    from eagle3fn.data.source_pool import Source

    if not options.engine:
        device = check_device(world.device(options.target_device, "--target-device"))
        return [Source("the target", lambda _: _alone(model_source(options, layers, device)))]

    if options.engine == "vllm" and options.engine_url:
        return [
            Source(url, partial(_engine, _with(options, engine_url=[url]), tree, layers, ""))
            for url in options.engine_url
        ]
    found = []
    for number in range(1, 1 + (1 if options.engine_url else options.sources or 1)):
        rank = f"-{world.rank}" if world.size > 1 else ""
        log = f"{options.out}.{options.engine}{rank}-{number}.log"
        name = f"source {number}" + (f" of rank {world.rank}" if world.size > 1 else "")
        found.append(Source(name, partial(_engine, options, tree, layers, log)))
    return found


def _engine(
    options: Any,
    tree: dict[str, Any],
    layers: tuple[int, ...],
    log: str,
    abandoned: threading.Event,
) -> "AbstractContextManager[FeatureSource]":
    return _alone(engine_source(options, tree, layers, log, progress.say, abandoned))


@contextmanager
def _alone(opened: Any) -> "Iterator[FeatureSource]":
    """A source without the tokenizer that it comes with."""
    with opened as (source, _):
        yield source


def _with(options: Any, **changes: Any) -> Any:
    """The options with others in their places."""
    return Namespace(**{**vars(options), **changes})


def _say_sources(options: Any, source: "FeatureSource", count: int, features: "FeatureSet") -> None:
    """Say what computes the features, of what."""
    from eagle3fn.data.shards import dtype_name

    by = "the target here"
    if options.engine:
        by = options.engine if count == 1 else f"{options.engine}, {count} sources a rank"
    totals = features.index["totals"]
    what = "prompts, which the target answers as training goes" if options.generate else "samples"
    say(
        f"{options.online}: {totals['samples']:,} {what}; features by {by}, computed in "
        f"{dtype_name(source.dtype)}"
    )

"""What `train --online` opens: conversations or prompts, and the sources of their features."""

import json
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from eagle3fn.base import progress
from eagle3fn.commands.shared import chat_template, given_options, say
from eagle3fn.commands.sources import (
    as_transformers,
    check_engine_options,
    engine_source,
    model_source,
)

if TYPE_CHECKING:
    from eagle3fn.base.config import Config
    from eagle3fn.base.launch import World
    from eagle3fn.data.features import FeatureSet
    from eagle3fn.data.generate import Sampling
    from eagle3fn.data.on_demand import OnlineSamples
    from eagle3fn.data.rollout import Source
    from eagle3fn.data.sample_file import SampleFile
    from eagle3fn.data.sources import FeatureSource
    from eagle3fn.data.template import ChatTemplate
    from eagle3fn.train.recipe import Recipe

T = TypeVar("T")

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


def check_answers(options: Any, recipe: "Recipe") -> None:
    """Refuse answers too short to be trained on, whatever the target writes.

    Raises:
        UserError: names --max-new.
    """
    import torch

    from eagle3fn.base.errors import UserError

    sampling = _sampling(options)
    if sampling is None:
        return
    longest = torch.tensor([0, 0, 0] + [1] * sampling.max_new)  # a prompt's places, and its own
    if not recipe.align_mask(longest).any():
        raise UserError(
            f"--max-new {sampling.max_new}: an answer that short has no row to train; give 2 at "
            "least, the stop token included"
        )


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
    from eagle3fn.data.rollout import Pool
    from eagle3fn.data.sample_file import samples_on_ranks
    from eagle3fn.train.begun import check_made_with

    with ExitStack() as own:
        path = Path(f"{options.out}.samples")
        positions = tree.get("max_position_embeddings")
        encode = partial(_encode, options, tree["vocab_size"], positions)
        rows, known = own.enter_context(samples_on_ranks(world, "train/online", path, encode))
        progress.close()
        for line in known["said"] if world.main else ():
            say(line)
        check_made_with(options.out, known["settings"])

        logs = own.enter_context(_Logs(options.out, options.dry_run))
        sources = _sources(options, tree, layers, world, logs)
        pool = own.enter_context(Pool(sources, say=progress.say))
        own.callback(logs.close)
        if options.engine_python and world.main:
            say(
                f"{options.engine} starts; what it prints is in {options.out}.{options.engine}*.log"
            )
        source = pool.first()
        samples = OnlineSamples(
            rows,
            pool,
            Widths(len(layers), tree["hidden_size"], STORED),
            _sampling(options),
        )
        made_from = MadeFrom(
            options.online, known["fingerprint"], known["facts"], known["settings"]
        )
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


def is_kept(folder: str) -> bool:
    """Whether all that has passed is a feature folder: its index is written last."""
    return (Path(folder) / "index.json").is_file()


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


def settings_of(options: Any) -> dict[str, str]:
    """What the rows depend on, by option, as far as it is known before they are encoded."""
    from eagle3fn.base.files import json_sha256
    from eagle3fn.data.extract import SAMPLE_RULE
    from eagle3fn.data.row_files import rows_digest
    from eagle3fn.data.target_loading import load_tokenizer

    template = chat_template(options, load_tokenizer(options.target))
    settings = {
        "--online": f"sha256 {rows_digest(options.online)}",
        "--max-length": str(options.max_length),
        "--batch-tokens": str(options.batch_tokens or "not given"),
        "--template-arg": json.dumps(template.arguments),
        "--generate": "given" if options.generate else "not given",
        "the target's chat template": json_sha256(template.tokenizer.chat_template),
        "the target's stop tokens": ", ".join(map(str, template.stops)),
        "the rule of samples": json.dumps(SAMPLE_RULE),
    }
    sampling = _sampling(options)
    for name, value in sampling._asdict().items() if sampling else ():
        settings[f"--{name.replace('_', '-')}"] = str(value)
    return settings


def _encode(
    options: Any, vocab_size: int, positions: int | None, path: Path | None
) -> "tuple[SampleFile, dict[str, Any]]":
    """The rows, written to `path` or a temporary file, and what is known of them."""
    from eagle3fn.base.files import json_sha256
    from eagle3fn.data.row_stamps import check_stamps, stamps_of
    from eagle3fn.data.sources import check_max_length
    from eagle3fn.data.target_loading import load_tokenizer

    check_max_length(options.max_length, positions)
    template = chat_template(options, load_tokenizer(options.target))
    stamps = stamps_of(options.online)
    settings = settings_of(options)
    read = _prompts if options.generate else _samples
    samples, counts, said = read(options, template, vocab_size, path)
    check_stamps(options.online, stamps)
    facts = {
        "data_hash": settings["--online"].removeprefix("sha256 "),
        "max_length": options.max_length,
        "template_arguments": template.arguments,
        **counts,
        "remaining": 0,
    }
    fingerprint = json_sha256(settings)
    settings["--limit"] = f"{counts['rows']} rows"
    settings["--skip-bad"] = f"{counts.get('rejected', 0)} rows left out"
    return samples, {
        "fingerprint": fingerprint,
        "facts": facts,
        "settings": settings,
        "said": said,
    }


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

    sampling = _sampling(options)
    assert sampling is not None
    found = prompt_rows(
        template,
        options.online,
        max_length=options.max_length,
        max_new=sampling.max_new,
        out=path,
        limit=options.limit,
        skip_bad=options.skip_bad,
        rejects=f"{options.out}.rejects.jsonl",
    )
    return found.samples, found.counts(), found.describe()


def _sampling(options: Any) -> "Sampling | None":
    """How the target's answers are drawn: as the options say, else as `regenerate` draws them; None
    if it writes none.
    """
    from eagle3fn.data.regenerate import ANEW

    if not options.generate:
        return None
    given = {name: getattr(options, name, None) for name in ANEW._fields}
    return ANEW._replace(**{name: value for name, value in given.items() if value is not None})


# The sources


def _sources(
    options: Any, tree: dict[str, Any], layers: tuple[int, ...], world: "World", logs: "_Logs"
) -> "Sequence[Source]":
    """The target in this process; or an engine's processes; or its running servers."""
    from eagle3fn.base.device import check_device
    from eagle3fn.data.rollout import Source

    writing = _sampling(options)
    if not options.engine:
        device = check_device(world.device(options.target_device, "--target-device"))
        return [Source("the target", partial(_target, options, layers, device, writing))]

    def source(name: str, given: Any, log: str) -> "Source":
        return Source(name, partial(_engine, given, tree, layers, log, writing, logs))

    if options.engine == "vllm" and options.engine_url:
        return [source(url, _with(options, engine_url=[url]), "") for url in options.engine_url]
    found = []
    for number in range(1, 1 + (1 if options.engine_url else options.sources or 1)):
        rank = f"-{world.rank}" if world.size > 1 else ""
        name = f"source {number}" + (f" of rank {world.rank}" if world.size > 1 else "")
        found.append(source(name, options, f"{options.out}.{options.engine}{rank}-{number}.log"))
    return found


@contextmanager
def _target(
    options: Any, layers: tuple[int, ...], device: str, writing: "Sampling | None"
) -> "Iterator[FeatureSource]":
    """The target in this process, known as the engine transformers, whose bits it has."""
    with model_source(options, layers, device, writing) as (source, _):
        yield as_transformers(source, options.target, device)


@contextmanager
def _engine(
    options: Any,
    tree: dict[str, Any],
    layers: tuple[int, ...],
    log: str,
    writing: "Sampling | None",
    logs: "_Logs",
) -> "Iterator[FeatureSource]":
    """An engine, whose faults are noted."""
    with ExitStack() as own:
        with logs.fault_noted(log):
            opened = engine_source(options, tree, layers, log, progress.say, writing)
            source, _ = own.enter_context(opened)
        yield source._replace(
            features=logs.faults_noted(source.features),
            write=source.write and logs.faults_noted(source.write),
        )


class _Logs:
    """What engines print, in files that are removed where nothing came of the call.

    That is a dry run, or a call that was refused before its first update was saved, and by no fault
    of an engine.
    """

    def __init__(self, out: str, dry_run: bool) -> None:
        self.out = Path(out)
        self.dry_run = dry_run
        self.files: list[Path] = []
        self.at_fault = False
        self.closing = False  # what engines raise now is no fault

    def __enter__(self) -> "_Logs":
        self._begun_at = self._checkpoint()
        parents = self.out.absolute().parents
        self._new = [folder for folder in parents if not folder.exists()]  # the innermost first
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        refused = kind is not None and self._checkpoint() == self._begun_at
        if self.at_fault or not (refused or self.dry_run):
            return
        for path in self.files:
            path.unlink(missing_ok=True)
        for folder in self._new:
            with suppress(OSError):  # it is not empty, or was never made
                folder.rmdir()

    def _checkpoint(self) -> Path | None:
        from eagle3fn.train.checkpoint import checkpoints

        return max(checkpoints(self.out / "checkpoints"), default=None)

    def close(self) -> None:
        """From now on engines are ended."""
        self.closing = True

    @contextmanager
    def fault_noted(self, log: str = "") -> Iterator[None]:
        """What is raised in the block is an engine's fault, which may write into the file `log`."""
        if log and Path(log) not in self.files:
            self.files.append(Path(log))
        try:
            yield
        except BaseException:
            self.at_fault = self.at_fault or not self.closing
            raise

    def faults_noted(self, asked: Callable[..., T]) -> Callable[..., T]:
        """A function of an engine's, the same."""

        def ask(*given: Any) -> T:
            with self.fault_noted():
                return asked(*given)

        return ask


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

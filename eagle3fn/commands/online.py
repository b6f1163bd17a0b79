"""What `train --online` opens: conversations or prompts, and the sources of their features."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eagle3fn.base import progress
from eagle3fn.commands.online_rows import encode, sampling_of, settings_of
from eagle3fn.commands.online_sources import Logs, sources_of
from eagle3fn.commands.settings import config_of
from eagle3fn.commands.shared import given_options, say
from eagle3fn.commands.sources import check_engine_options

if TYPE_CHECKING:
    from eagle3fn.base.config import Config
    from eagle3fn.base.draft_config import DraftConfig
    from eagle3fn.base.launch import World
    from eagle3fn.data.features import FeatureSet
    from eagle3fn.data.on_demand import OnlineSamples
    from eagle3fn.data.sources import FeatureSource
    from eagle3fn.train.events import End
    from eagle3fn.train.recipe import Recipe

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

    sampling = sampling_of(options)
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


def has_ended(
    options: Any, draft: "DraftConfig", overrides: list[str], recipe: "Recipe", world: "World"
) -> "End | None":
    """How the run in `--out` has ended, which is said then; None if it goes on. All ranks call,
    before sources start.

    Raises:
        UserError: it has begun, and cannot go on under these options; as `check_answers`.
    """
    check_answers(options, recipe)
    ended = _say_ended(options, draft, overrides, recipe, world) if world.main else None
    return world.shared(ended)


def _say_ended(
    options: Any, draft: "DraftConfig", overrides: list[str], recipe: "Recipe", world: "World"
) -> "End | None":
    """The same on rank 0."""
    from eagle3fn.data.held import held
    from eagle3fn.train.begun import check_made_with, ended
    from eagle3fn.train.defaults import begun_settings
    from eagle3fn.train.dry_run import ended_line
    from eagle3fn.use.publish import check_published

    begun = begun_settings(options.out)
    if begun is None:
        return None
    with held(options.out) if not options.dry_run else nullcontext():
        pass  # no other process trains there: its engines' logs are left alone
    given = {"--dtype": options.dtype} if options.dtype else {}
    check_made_with(options.out, settings_of(options) | given)
    config = config_of(options, draft, overrides, options.recipe, begun)
    found = ended(config, options.out, recipe.name, options.source, options.minutes)
    if found is None or (options.keep and not _is_kept(options.keep)):
        return None

    for line in found.lines:
        say(line)
    said = check_published(options.out, found.end, world.size, options.arguments)
    if options.dry_run:
        said = f"the run\n  {ended_line(found.end, found.horizon)}\nnothing was written"
    say(said)
    return found.end


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
    from eagle3fn.train.begun import check_made_with

    with ExitStack() as own:
        path = Path(f"{options.out}.samples")
        written = partial(encode, options, tree["vocab_size"])
        rows, known = own.enter_context(samples_on_ranks(world, "train/online", path, written))
        progress.close()
        for line in known["said"] if world.main else ():
            say(line)
        check_made_with(options.out, known["settings"])

        logs = own.enter_context(Logs(options.out, options.dry_run))
        sources = sources_of(options, tree, layers, world, logs)
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
            sampling_of(options),
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


def _is_kept(folder: str) -> bool:
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
    from eagle3fn.base.errors import UserError
    from eagle3fn.data.keeping import keeping

    with keeping(folder, features, config.data.held_out, world) as keeper:
        try:
            yield
        except BaseException:
            # Ranks that have not failed do not meet here: the next call writes the index. What
            # ended the run is said last.
            try:
                if world.size == 1:
                    keeper.finish()
                else:
                    keeper.flush()
            except UserError as error:
                progress.say(str(error))
            raise
        line = keeper.finish()
        if line:
            progress.say(line)


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

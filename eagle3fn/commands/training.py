"""Commands that train a draft, and that count what training needs."""

import math
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from eagle3fn.base import progress
from eagle3fn.base.output import Result
from eagle3fn.commands.online import (
    begin_online,
    check_online_options,
    has_ended,
    kept_features,
    online_features,
)
from eagle3fn.commands.results import training_values
from eagle3fn.commands.settings import (
    config_of,
    draft_of,
    named_settings,
    overrides_of,
    unnamed_settings,
)
from eagle3fn.commands.shared import choose_max_length, draft_shape, say
from eagle3fn.commands.sources import room

if TYPE_CHECKING:
    from eagle3fn.base.config import Config
    from eagle3fn.base.draft_config import DraftConfig
    from eagle3fn.base.launch import World
    from eagle3fn.base.types import VocabMap
    from eagle3fn.data.features import FeatureSet
    from eagle3fn.data.map_data import CountedOn
    from eagle3fn.data.target_tensors import TargetTensors
    from eagle3fn.train.recipe import Recipe


def train(options: Any) -> Result | None:
    """Train the draft, or go on; the exit code is that of Ctrl-C after it."""
    from eagle3fn.base.device import check_device
    from eagle3fn.base.launch import ranks
    from eagle3fn.base.signals import received
    from eagle3fn.data.map_data import counted_on
    from eagle3fn.data.pipeline import split
    from eagle3fn.data.target_source import target_config
    from eagle3fn.data.vocab import map_size
    from eagle3fn.specforge.feature_files import read_map
    from eagle3fn.specforge.recipes import RECIPES
    from eagle3fn.train.defaults import check_rate
    from eagle3fn.train.recipe import OURS

    check_online_options(options)
    _check_folders(options)
    trackers = _trackers(options)
    recipe = RECIPES[options.recipe] if options.recipe else OURS
    overrides = overrides_of(options)

    with ranks() as world, ExitStack() as own:
        # The configuration: the draft from the target, its vocabulary's size from the map, and what
        # nobody names by the size of both, or as the recipe has it.
        named = named_settings(options, overrides)
        tree = target_config(options.target)
        if options.online:
            choose_max_length(
                options, tree.get("max_position_embeddings"), room(options), world.main
            )
        draft = draft_of(options, tree, map_size(options.vocab, read_map, tree["vocab_size"]))
        ended = has_ended(options, draft, overrides, recipe, world) if options.online else None
        if ended:
            return Result(training_values(options.out, ended) if world.main else None)
        features = own.enter_context(_features(options, tree, draft, world))
        device = check_device(world.device(named.get("train", {}).get("device", "cpu")))
        counted = counted_on(options.vocab, read_map)
        defaults, said = unnamed_settings(
            options, named, draft, features, counted, device, world.size
        )
        config = config_of(options, draft, overrides, options.recipe, defaults)
        check_rate(config.optimizer, draft.hidden_size, named, defaults)
        split(len(features.samples), config.data.held_out)  # refused before anything is said
        if options.online:
            begin_online(features, options, config, world)
        _take_threads(options, config, world)

        # Features, map and target, which must belong together; a draft to start from, unless the
        # run goes on.
        layers = tree["num_hidden_layers"]
        vocab_map, tensors = _read_matching(options, config, features, layers)
        start = _check_start(options, config, layers, vocab_map, tensors)
        if world.main:
            say(said)
            say(start)
            for note in _notes(options, config, features, vocab_map, counted, tensors):
                say(note)

        run = _Run(config, features, vocab_map, tensors, options.out, options.minutes)
        if options.keep:
            own.enter_context(kept_features(options.keep, features, config, world))
        if options.dry_run:
            values = _dry_run(run, layers, world, recipe)
        else:
            values = _train(options, run, layers, trackers, world, recipe)

        # Ctrl-C ends a script that calls this too; SIGTERM, which saved as well, is a good end.
        code = 128 + signal.SIGINT if received() == signal.SIGINT else 0
        return Result(values if world.main else None, code)


@contextmanager
def _features(
    options: Any, tree: dict[str, Any], draft: "DraftConfig", world: "World"
) -> "Iterator[FeatureSet]":
    """What is trained on: a folder of features, or conversations whose features are computed."""
    from eagle3fn.base.draft_config import aux_layers
    from eagle3fn.data.features import open_features
    from eagle3fn.specforge.feature_files import READER

    if not options.online:
        yield open_features(options.features, tree["vocab_size"], tree["hidden_size"], READER)
        return
    layers = aux_layers(draft, tree["num_hidden_layers"])
    with online_features(options, tree, layers, world) as features:
        yield features


def _take_threads(options: Any, config: "Config", world: "World") -> None:
    """Set the number of threads, and say it."""
    import torch

    from eagle3fn.base.thread_timing import large_products
    from eagle3fn.base.threads import take_threads
    from eagle3fn.train.horizon import begun_threads

    dtype = getattr(torch, config.train.dtype)
    shape = config.draft
    line = take_threads(
        lambda: large_products(shape.hidden_size, shape.draft_vocab_size, dtype),
        config.train.device,
        options.threads,
        world.shared(begun_threads(options.out) if world.main else None),
        world,
        bits_depend=config.train.reduce == "tree",
    )
    if world.main:
        say(line)


def _check_folders(options: Any) -> None:
    """Refuse a place for the run that is none, or the run's that it is to go on from."""
    from eagle3fn.base.places import check_apart, check_out_folder

    check_out_folder(options.out)
    if options.source:
        check_apart({"--out": options.out}, {"--from": options.source})


def _trackers(options: Any) -> list[str]:
    """The names of `--track`, each once; refused where a library is missing, and what a dry run
    would not heed.
    """
    from eagle3fn.base.errors import UserError
    from eagle3fn.use.trackers import check_trackers

    unused = {
        "--track": options.track,
        "--max-steps": options.max_steps,
        "--from": options.source,
        "--keep": options.keep,
    }
    for name, given in unused.items() if options.dry_run else ():
        if given:
            raise UserError(
                f"{name} with --dry-run, which makes one update of the run in --out and logs "
                "nothing; drop one"
            )
    names = list(dict.fromkeys(options.track))
    check_trackers(names)
    return names


class _Run(NamedTuple):
    """What a run is made from, in the order in which `train` and `dry_run` take it."""

    config: "Config"
    features: "FeatureSet"
    vocab_map: "VocabMap"
    target: "TargetTensors"
    out: str
    minutes: float | None


def _train(
    options: Any, run: _Run, layers: int, trackers: list[str], world: "World", recipe: "Recipe"
) -> dict[str, Any]:
    """Train, log and export, and print how it ended; that as JSON values."""
    from eagle3fn.base.config import to_dict
    from eagle3fn.train.events import End
    from eagle3fn.train.loop import train
    from eagle3fn.use.model_card import facts_of
    from eagle3fn.use.publish import check_published, run_events
    from eagle3fn.use.trackers import tracked

    facts = facts_of(run.features, options.target)
    events = run_events(run.out, run.config, layers, facts)
    ends: list[End] = []
    events = events._replace(on_end=ends.append)
    with tracked(events, trackers, run.out, to_dict(run.config)) as events:
        train(
            *run,
            events=events,
            world=world,
            recipe=recipe,
            source=options.source,
            max_steps=options.max_steps,
        )
    if world.main:
        progress.close()
        print(check_published(run.out, ends[-1], world.size, options.arguments))
        return training_values(run.out, ends[-1])
    return {}


def _dry_run(run: _Run, layers: int, world: "World", recipe: "Recipe") -> dict[str, Any]:
    """Print what a run would be; that as JSON values. Nothing is written."""
    from eagle3fn.train.dry_run import describe_dry_run, dry_run
    from eagle3fn.use.engine_limits import engines_line
    from eagle3fn.use.publish import run_events

    events = run_events(run.out, run.config, layers)
    found = dry_run(*run, events=events, world=world, recipe=recipe)
    if world.main:
        say(engines_line(run.config.draft, layers))
        say(describe_dry_run(found))
    update = None if found.update is None else found.update._asdict()
    return {
        **found._asdict(),
        "plan": found.plan._asdict(),
        "horizon": found.horizon._asdict(),
        "end": found.end._asdict(),
        "update": update,
    }


def _read_matching(
    options: Any, config: "Config", features: "FeatureSet", target_layers: int
) -> "tuple[VocabMap, TargetTensors]":
    """The map and the target's tensors; refused unless the features are that target's."""
    import torch

    from eagle3fn.base.draft_config import aux_layers
    from eagle3fn.data.features import check_made_for, tensors_of
    from eagle3fn.data.target_files import check_weights_of
    from eagle3fn.data.target_source import config_hashes
    from eagle3fn.data.target_tensors import read_target_tensors
    from eagle3fn.data.vocab import load_map
    from eagle3fn.specforge.feature_files import read_map

    draft = config.draft
    hashes = config_hashes(options.target)
    vocab_map = load_map(options.vocab, draft.vocab_size, draft.draft_vocab_size, hashes, read_map)
    dtype = getattr(torch, config.train.dtype)
    tensors = read_target_tensors(options.target, dtype, tensors_of(features))
    check_made_for(features, hashes, aux_layers(draft, target_layers), options.target)
    check_weights_of(features, options.target)
    return vocab_map, tensors


def _notes(
    options: Any,
    config: "Config",
    features: "FeatureSet",
    vocab_map: "VocabMap",
    counted: "CountedOn",
    tensors: "TargetTensors",
) -> list[str]:
    """What is worth a line of the data: other answers than the target's, another map's data."""
    from eagle3fn.data.map_data import map_note
    from eagle3fn.data.own import foreign_note, measure_agreement

    if features.on_demand and features.on_demand.answers:
        return []  # the answers are the target's, and nothing is known of them yet
    found = measure_agreement(features, tensors.head)
    conversations = options.online or "CONVERSATIONS.jsonl"
    notes = [foreign_note(found, options.target, conversations) or ""]
    held_out = config.data.held_out
    return [*notes, map_note(options.vocab, vocab_map, counted, features, held_out)]


def _check_start(
    options: Any,
    config: "Config",
    target_layers: int,
    vocab_map: "VocabMap",
    target: "TargetTensors",
) -> str:
    """A line on the draft to start from, which must be the run's and lie outside of its folder; a
    run that goes on needs none.
    """
    from eagle3fn.base.places import check_keeps
    from eagle3fn.base.sections import STARTS
    from eagle3fn.train.defaults import begun_settings
    from eagle3fn.train.warm_start import check_start

    if options.source or begun_settings(options.out) is not None:
        return ""
    if config.train.init not in STARTS:
        check_keeps(("--out", options.out), ("train.init", config.train.init))
    return check_start(config, target_layers, vocab_map, target.embed_tokens)


def plan(options: Any) -> Result:
    """Print the bytes that a run needs; refuse what does not fit."""
    from eagle3fn.data.target_source import check_supported, target_config
    from eagle3fn.train.memory import GIB, check_fits, describe, plan_memory

    tree = target_config(options.target) if options.target else {}
    if options.target:
        check_supported(options.target)
    draft = None
    if options.target or options.draft_config:
        draft = draft_shape(options, tree)
    named_settings(options, options.set)
    config = config_of(options, draft, options.set)

    tied = bool(tree.get("tie_word_embeddings"))
    found = plan_memory(config, options.ranks, options.tokens, tied)
    print(describe(found))
    check_fits(config, options.ranks, (options.memory or math.inf) * GIB, "--memory", tied)
    return Result({**found._asdict(), "needed": found.needed})

"""`eagle3fn COMMAND`: builds configurations and calls one function each."""

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eagle3fn.base import progress
from eagle3fn.base.program import exit_code

if TYPE_CHECKING:
    from eagle3fn.base.config import Config
    from eagle3fn.base.draft_config import DraftConfig

Command = Callable[..., argparse.ArgumentParser]
"""`(name, function, what it does)` → the parser of a new sub-command."""


def main(arguments: list[str] | None = None) -> int:
    """Run a sub-command; returns its exit code, or 2 for bad input, with one line on stderr."""
    if arguments is None:
        arguments = sys.argv[1:]
    options = parser().parse_args(arguments)
    options.arguments = arguments
    return exit_code(f"eagle3fn {options.command}", lambda: options.run(options))


# The grammar

_DTYPES = ("float32", "bfloat16", "float16")
_FASTEST = "default: bfloat16 where the device multiplies it, else float32"


def parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    root = argparse.ArgumentParser(prog="eagle3fn", description=__doc__)
    commands = root.add_subparsers(dest="command", required=True)

    def command(name: str, run: Callable[[Any], int | None], about: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=about, description=about)
        sub.set_defaults(run=run)
        return sub

    _add_data_commands(command)
    _add_training_commands(command)
    _add_checking_commands(command)
    return root


def _add_target(sub: argparse.ArgumentParser, runs: bool) -> None:
    """The option that names the target; with `runs`, where it is computed."""
    sub.add_argument(
        "--target", required=True, help="folder or hub id of a Hugging Face causal language model"
    )
    if runs:
        sub.add_argument("--device", default="cpu", help="torch device of the target (default cpu)")


def _add_threads(sub: argparse.ArgumentParser) -> None:
    """The option `--threads`."""
    about = "CPU threads (default: OMP_NUM_THREADS, or the fastest by a short measurement)"
    sub.add_argument("--threads", type=_positive, help=about)


def _add_settings(sub: argparse.ArgumentParser) -> None:
    """The options that make a configuration."""
    sub.add_argument("--config", help="TOML file")
    sub.add_argument("--draft-config", help="draft JSON (default: derived from the target)")
    sub.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="override a setting",
    )


def _add_data_commands(command: Command) -> None:
    sub = command(
        "synthesize", _synthesize, "let the target answer given prompts, or write its own turns too"
    )
    _add_target(sub, runs=True)
    sub.add_argument("--out", required=True, help="JSONL file; .xz and .gz compress")
    sub.add_argument(
        "--prompts",
        help="JSONL of prompts or conversations, whose assistant turns it answers anew; "
        "without: it writes the user turns too",
    )
    sub.add_argument(
        "--count",
        type=_positive,
        help="conversations to write at least (default 1000); of --prompts, the first so many",
    )
    sub.add_argument(
        "--temperature", type=_at_least_zero, help="of the answers (default 0.5; 0: greedy)"
    )
    sub.add_argument(
        "--max-new",
        type=_positive,
        help="tokens of an answer at most (default 224; with --prompts 512)",
    )
    sub.add_argument("--seed", type=_count, default=0)
    sub.add_argument(
        "--batch", type=_positive, default=64, help="conversations sampled together (default 64)"
    )
    sub.add_argument(
        "--exclude", help="JSONL whose texts must not come back: 13 words in a row are too many"
    )
    _add_threads(sub)

    sub = command(
        "extract", _extract, "run the target over conversations and write its features; resumable"
    )
    _add_target(sub, runs=True)
    sub.add_argument("--conversations", required=True, help="JSONL (plain, .gz, .xz)")
    sub.add_argument("--out", required=True, help="feature folder")
    sub.add_argument(
        "--max-length",
        type=_positive,
        default=2048,
        help="tokens kept of a conversation (default 2048)",
    )
    sub.add_argument("--limit", type=_positive, help="use only the first conversations")
    sub.add_argument(
        "--minutes",
        type=_above_zero,
        help="end with the last whole shard within this time; a later call goes on",
    )
    sub.add_argument("--dtype", choices=_DTYPES, help=f"what the target computes in ({_FASTEST})")
    sub.add_argument(
        "--batch",
        type=_positive,
        help="conversations in one run of the target (default 4 on CPUs, else 8)",
    )
    sub.add_argument("--draft-config", help="JSON whose eagle_config names the tapped layers")
    _add_threads(sub)

    sub = command("vocab", _vocab, "count the supervised tokens and write the draft vocabulary map")
    _add_target(sub, runs=False)
    sub.add_argument("--features", required=True)
    sub.add_argument("--out", required=True, help="safetensors file")
    sub.add_argument(
        "--size",
        type=_positive,
        help="draft vocabulary (default: 99.9%% of the supervised tokens, 4096 to 32000)",
    )
    sub.add_argument(
        "--held-out",
        type=_count,
        help="samples at the end that are not counted (default: a tenth, at most 24)",
    )


def _add_training_commands(command: Command) -> None:
    sub = command("train", _train, "train the draft; goes on from the newest checkpoint")
    _add_target(sub, runs=False)
    sub.add_argument("--features", required=True)
    sub.add_argument("--vocab", required=True, help="vocabulary map")
    sub.add_argument(
        "--out", required=True, help="run folder; the best draft is exported to OUT/draft"
    )
    _add_settings(sub)
    sub.add_argument(
        "--recipe",
        choices=("specforge", "specforge-dataflow"),
        help="train as SpecForge does, in the order of its script or of its dataflow launcher",
    )
    sub.add_argument("--on-nonfinite", choices=("stop", "skip"), help="sets train.on_nonfinite")
    sub.add_argument(
        "--minutes", type=_above_zero, help="choose the number of steps to fill this time"
    )
    _add_threads(sub)

    sub = command(
        "plan", _plan, "bytes that a run holds, moves and writes; exit code 2 if it cannot fit"
    )
    sub.add_argument("--target", help="folder or hub id; its config.json is enough")
    _add_settings(sub)
    sub.add_argument("--ranks", type=_positive, default=1)
    sub.add_argument(
        "--tokens", type=_count, default=0, help="of all conversations, for the features' size"
    )
    sub.add_argument(
        "--memory", type=_above_zero, help="GiB that a rank may hold: refuse a plan beyond it"
    )


def _add_checking_commands(command: Command) -> None:
    sub = command(
        "evaluate",
        _evaluate,
        "speculative decoding with an exported draft: losslessness, length, speed",
    )
    _add_target(sub, runs=True)
    sub.add_argument("--draft", required=True, help="exported draft folder")
    sub.add_argument("--prompts", required=True, help="JSONL with a prompt field (plain, .gz, .xz)")
    sub.add_argument("--out", required=True, help="JSON report")
    sub.add_argument(
        "--tasks", type=_positive, default=10, help="prompts, in order from the first (default 10)"
    )
    sub.add_argument("--max-new", type=_positive, default=128)
    sub.add_argument(
        "--plain", help="JSON file that keeps the target's own answers for the next draft"
    )
    sub.add_argument("--untrained", help="an exported untrained draft, to compare with")
    _add_threads(sub)
    sub.add_argument("--dtype", choices=_DTYPES, help=f"that speed is measured in ({_FASTEST})")

    sub = command(
        "report", _report, "gather a run's results in one table, a JSON file and a picture"
    )
    sub.add_argument(
        "--run", dest="folder", required=True, help="folder with train/ and evaluation.json"
    )

    sub = command(
        "parity",
        _parity,
        "SpecForge's recipe against SpecForge, bit for bit, on drawn tiny problems",
    )
    sub.add_argument(
        "--cases", type=_positive, default=100, help="how many are drawn (default 100)"
    )
    sub.add_argument(
        "--seed", type=int, default=0, help="the same cases for the same seed (default 0)"
    )
    sub.add_argument("--json", action="store_true", help="end with one line of JSON")
    sub.add_argument(
        "--bisect",
        action="store_true",
        help="name the unroll step and operation a difference begins at",
    )


def _number(kind: type, low: float, high: float) -> Callable[[str], Any]:
    """A type for argparse: a number in a range."""

    def number(text: str) -> Any:
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text}: must be between {low} and {high:g}")
        return kind(text)

    return number


_positive = _number(int, 1, 2**40)
_count = _number(int, 0, 2**40)
_above_zero = _number(float, 0.01, 1e6)
_at_least_zero = _number(float, 0, 100)


# The commands: imports are inside, so that `--help` is quick


def _say(line: str | None) -> None:
    """Print a line, if there is one, before the first progress bar."""
    if line:
        print(line, flush=True)


def _synthesize(options: Any) -> None:
    from eagle3fn.base.device import fast_dtype
    from eagle3fn.base.thread_timing import sizes_of, thin_products
    from eagle3fn.base.threads import take_threads
    from eagle3fn.data.answers import GIVEN_ANSWER, answer_prompts
    from eagle3fn.data.synthesize import ANSWER, begun_threads, synthesize
    from eagle3fn.data.target import load_target

    given = {"temperature": options.temperature, "max_new": options.max_new}
    given = {name: value for name, value in given.items() if value is not None}
    shared = {"seed": options.seed, "batch": options.batch, "exclude": options.exclude}
    shared["on_progress"] = progress.bar("conversation")

    model, tokenizer = load_target(options.target, fast_dtype(options.device), options.device)
    sizes = sizes_of(model.config.to_dict())
    _say(
        take_threads(
            lambda: thin_products(sizes, [options.batch], model.dtype),
            options.device,
            options.threads,
            begun_threads(options.out),
        )
    )
    if not options.prompts:
        answer = ANSWER._replace(**given)
        count = options.count or 1000
        written = synthesize(model, tokenizer, options.out, count, answer=answer, **shared)
        print(f"{options.out}: {written} conversations")
        return

    sampling = GIVEN_ANSWER._replace(**given)
    names = (options.prompts, options.out, options.count)
    done = answer_prompts(model, tokenizer, *names, sampling=sampling, **shared)
    print(
        f"{options.out}: {done.conversations} conversations, {done.answers} answers, {done.cut} of "
        f"them cut at {sampling.max_new} tokens and kept; {done.excluded} conversations excluded"
    )


def _extract(options: Any) -> None:
    import torch

    from eagle3fn.base.device import fast_dtype
    from eagle3fn.base.draft_config import aux_layers
    from eagle3fn.base.thread_timing import large_products, sizes_of
    from eagle3fn.base.threads import take_threads
    from eagle3fn.data.extract import begun_threads, extract
    from eagle3fn.data.features import open_features
    from eagle3fn.data.own import foreign_note, measure_agreement
    from eagle3fn.data.target import load_target, target_config

    tree = target_config(options.target)
    layers = aux_layers(_draft(options, tree), tree["num_hidden_layers"])
    dtype = getattr(torch, options.dtype) if options.dtype else fast_dtype(options.device)
    model, tokenizer = load_target(options.target, dtype, options.device)
    sizes = sizes_of(tree)
    _say(
        take_threads(
            lambda: large_products(sizes.hidden, sizes.intermediate, model.dtype),
            options.device,
            options.threads,
            begun_threads(options.out),
        )
    )
    name = str(dtype).removeprefix("torch.")
    _say(f"the target computes in {name}, its features are stored in bfloat16")
    index = extract(
        model,
        tokenizer,
        options.conversations,
        options.out,
        layers,
        max_length=options.max_length,
        batch=options.batch or (4 if options.device == "cpu" else 8),
        limit=options.limit,
        minutes=options.minutes,
        stored=torch.bfloat16,
        name=options.target,
        on_progress=progress.bar("conversation"),
    )
    progress.close()
    totals = index["totals"]
    rest = f", {index['remaining']} left for a call with more time" if index["remaining"] else ""
    print(
        f"{options.out}: {totals['samples']} conversations, {totals['tokens']} tokens, "
        f"{totals['supervised']} supervised, {totals['bytes'] / 2**20:.0f} MiB{rest}"
    )
    head = model.get_output_embeddings().weight
    found = measure_agreement(open_features(options.out), head)
    _say(foreign_note(found, options.target, options.conversations))


def _vocab(options: Any) -> None:
    from eagle3fn.data.features import open_features
    from eagle3fn.data.pipeline import split
    from eagle3fn.data.target import config_hash, target_config
    from eagle3fn.data.vocab import (
        build_map,
        chosen_size,
        count_tokens,
        coverage,
        held_out_of,
        save_map,
    )
    from eagle3fn.specforge.feature_files import READER

    tree = target_config(options.target)
    vocab_size = tree["vocab_size"]
    features = open_features(options.features, vocab_size, tree["hidden_size"], READER)
    samples = len(features.samples)
    held_out = held_out_of(samples) if options.held_out is None else options.held_out
    kept, held = split(samples, held_out)

    counts = count_tokens(features, kept, vocab_size)
    size = options.size or chosen_size(counts)
    vocab_map = build_map(counts, min(size, vocab_size))
    covered = coverage(vocab_map, counts)
    provenance = {"target": options.target, "target_hash": config_hash(tree), "covered": covered}
    save_map(options.out, vocab_map, provenance)

    text = f"{options.out}: {len(vocab_map.d2t)} of {vocab_size} tokens, {covered:.2%} of the "
    text += "supervised ones"
    if held:
        unseen = coverage(vocab_map, count_tokens(features, held, vocab_size))
        text += f", {unseen:.2%} in {len(held)} held-out samples"
    print(text)


def _draft(options: Any, tree: dict[str, Any], size: int | None = None) -> "DraftConfig":
    """The draft's shape: from `--draft-config`, or derived from the target's configuration."""
    from eagle3fn.base.draft_config import draft_config_from_json, draft_config_from_target

    if options.draft_config:
        return draft_config_from_json(options.draft_config)
    return draft_config_from_target(tree, options.target, size)


def _named(options: Any, overrides: list[str]) -> dict[str, Any]:
    """The settings that a TOML file and overrides name, by section.

    Those by the names of earlier versions are refused.
    """
    from eagle3fn.base.toml import override, read_toml
    from eagle3fn.specforge.recipes import refuse_old_settings

    named = read_toml(options.config) if options.config else {}
    refuse_old_settings(named, options.config)
    given: dict[str, Any] = {}
    for text in overrides:
        override(given, text)
        override(named, text)
    refuse_old_settings(given, "--set")
    return named


def _unnamed(
    options: Any, named: dict[str, Any], draft: "DraftConfig", samples: int, device: str
) -> tuple[dict[str, dict[str, Any]], str]:
    """Values for the settings that nobody names, by section, and a text of where they are from."""
    from eagle3fn.specforge.recipes import SETTINGS
    from eagle3fn.train.defaults import (
        begun_settings,
        by_section,
        chosen_defaults,
        describe,
        not_named,
    )

    if options.recipe:
        return SETTINGS, ""
    begun = begun_settings(options.out)
    if begun is not None:
        return begun, f"settings that are not named: as the run began, {options.out}/config.toml"
    chosen = not_named(chosen_defaults(draft, samples, device), named)
    return by_section(chosen), describe(chosen)


def _config(
    options: Any,
    draft: "DraftConfig | None",
    overrides: list[str],
    recipe: str | None = None,
    defaults: dict[str, dict[str, Any]] | None = None,
) -> "Config":
    """The run's configuration; losses and optimizers that are not there are refused."""
    from eagle3fn.base.config import load_config
    from eagle3fn.base.errors import UserError
    from eagle3fn.model.checks import check_loss
    from eagle3fn.specforge.recipes import RECIPE
    from eagle3fn.train.optimizer import named_optimizer

    config = load_config(options.config, overrides, draft, defaults)
    loss = config.objective.loss
    if loss in RECIPE.batch_means and not recipe:
        raise UserError(
            f"objective.loss = {loss!r} is a mean over the whole batch: write nla or lk, which are "
            "such losses by row, or add --recipe specforge"
        )
    check_loss(config, RECIPE.batch_means)
    named_optimizer(config.optimizer)
    return config


def _train(options: Any) -> None:
    import torch

    from eagle3fn.base.draft_config import aux_layers
    from eagle3fn.base.launch import ranks
    from eagle3fn.base.thread_timing import large_products
    from eagle3fn.base.threads import take_threads
    from eagle3fn.data.features import check_made_for, open_features
    from eagle3fn.data.own import foreign_note, measure_agreement
    from eagle3fn.data.target import config_hash, read_target_tensors, target_config
    from eagle3fn.data.vocab import load_map, map_size
    from eagle3fn.specforge.feature_files import READER, read_map
    from eagle3fn.specforge.recipes import RECIPES
    from eagle3fn.train.horizon import begun_threads
    from eagle3fn.train.loop import train
    from eagle3fn.train.recipe import OURS
    from eagle3fn.train.run import check_device
    from eagle3fn.use.publish import check_published, run_events

    recipe = RECIPES[options.recipe] if options.recipe else OURS
    overrides = list(options.set)
    if options.on_nonfinite:
        overrides.append(f"train.on_nonfinite={options.on_nonfinite}")

    with ranks() as world:
        # The configuration: the draft from the target, its vocabulary's size from the map, and what
        # nobody names by the size of both, or as the recipe has it.
        named = _named(options, overrides)
        tree = target_config(options.target)
        target_hash = config_hash(tree)
        draft = _draft(options, tree, map_size(options.vocab, read_map))
        features = open_features(options.features, tree["vocab_size"], tree["hidden_size"], READER)
        device = check_device(world.device(named.get("train", {}).get("device", "cpu")))
        defaults, said = _unnamed(options, named, draft, len(features.samples), device)
        config = _config(options, draft, overrides, options.recipe, defaults)
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
            _say(line)

        # Features, map and target, which must belong together.
        vocab_map = load_map(
            options.vocab,
            config.draft.vocab_size,
            config.draft.draft_vocab_size,
            target_hash,
            read_map,
        )
        tensors = read_target_tensors(options.target, dtype)
        layers = tree["num_hidden_layers"]
        check_made_for(features, target_hash, aux_layers(config.draft, layers), options.target)
        if world.main:
            _say(said)
            found = measure_agreement(features, tensors.head)
            _say(foreign_note(found, options.target, "CONVERSATIONS.jsonl"))

        state = train(
            config,
            features,
            vocab_map,
            tensors,
            options.out,
            minutes=options.minutes,
            events=run_events(options.out, config, layers),
            world=world,
            recipe=recipe,
        )
        if world.main:
            progress.close()
            print(check_published(options.out, int(state.step), world.size, options.arguments))


def _plan(options: Any) -> None:
    from eagle3fn.data.target import target_config
    from eagle3fn.train.memory import GIB, check_fits, describe, plan_memory

    tree = target_config(options.target) if options.target else {}
    draft = None
    if options.target or options.draft_config:
        draft = _draft(options, tree)
    _named(options, options.set)
    config = _config(options, draft, options.set)

    tied = bool(tree.get("tie_word_embeddings"))
    print(describe(plan_memory(config, options.ranks, options.tokens, tied)))
    check_fits(config, options.ranks, (options.memory or math.inf) * GIB, "--memory", tied)


def _evaluate(options: Any) -> None:
    import torch

    from eagle3fn.base.files import write_json
    from eagle3fn.base.thread_timing import sizes_of, thin_products
    from eagle3fn.base.threads import take_threads
    from eagle3fn.data.target import target_config
    from eagle3fn.use.evaluate import EvalSettings, evaluate, read_prompts

    sizes = sizes_of(target_config(options.target))
    rows = [1, 1 + EvalSettings.draft_length]  # a token, and a block that is verified
    _say(
        take_threads(
            lambda: thin_products(sizes, rows, torch.float32), options.device, options.threads
        )
    )
    settings = EvalSettings(
        tasks=options.tasks,
        max_new=options.max_new,
        device=options.device,
        speed_dtype=options.dtype,
    )
    report = evaluate(
        options.target,
        options.draft,
        read_prompts(options.prompts),
        settings,
        untrained_folder=options.untrained,
        plain_store=options.plain,
        on_progress=progress.bars("prompt"),
        prompts_name=Path(options.prompts).name,
    )
    progress.close()
    write_json(options.out, report)
    print(
        f"{options.out}: lossless {report['lossless']}, "
        f"accepted length {report['accepted_length']:.3f}, "
        f"{report['speedup']:.2f} times as fast in {report['speed_dtype']}"
    )


def _report(options: Any) -> None:
    from eagle3fn.use.report import write_report

    print(write_report(Path(options.folder)))


def _parity(options: Any) -> int:
    from eagle3fn.specforge.parity import run

    return run(options.cases, options.seed, options.json, options.bisect, progress.bar)


if __name__ == "__main__":
    sys.exit(main())

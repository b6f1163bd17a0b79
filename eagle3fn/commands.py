"""What the commands do: each builds its configuration and calls one function.

They take the parsed options. Imports are inside, so that `eagle3fn --help` is quick.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eagle3fn.base import progress

if TYPE_CHECKING:
    import torch

    from eagle3fn.base.config import Config
    from eagle3fn.base.draft_config import DraftConfig
    from eagle3fn.data.sources import FeatureSource
    from eagle3fn.data.template import ChatTemplate


_JSON_VALUES = {"True": "true", "False": "false", "None": "null"}


def _say(line: str | None) -> None:
    """Print a line, if there is one, before the first progress bar."""
    if line:
        print(line, flush=True)


def synthesize(options: Any) -> None:
    """Let the target write conversations, or answer given prompts."""
    from eagle3fn.base.device import check_device, fast_dtype
    from eagle3fn.base.thread_timing import sizes_of, thin_products
    from eagle3fn.base.threads import take_threads
    from eagle3fn.data.answers import GIVEN_ANSWER, answer_prompts
    from eagle3fn.data.synthesize import ANSWER, begun_threads, synthesize
    from eagle3fn.data.target import load_target

    check_device(options.device)
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
    template = _template(options, tokenizer)
    if not options.prompts:
        answer = ANSWER._replace(**given)
        count = options.count or 1000
        written = synthesize(model, template, options.out, count, answer=answer, **shared)
        print(f"{options.out}: {written} conversations")
        return

    sampling = GIVEN_ANSWER._replace(**given)
    names = (options.prompts, options.out, options.count)
    done = answer_prompts(model, template, *names, sampling=sampling, **shared)
    print(
        f"{options.out}: {done.conversations} conversations, {done.answers} answers, {done.cut} of "
        f"them cut at {sampling.max_new} tokens and kept; {done.excluded} conversations excluded"
    )


def _template_arguments(options: Any) -> dict[str, Any]:
    """The chat template's arguments: JSON values, else texts."""
    from eagle3fn.data.turns import check_given

    arguments = _named_values(options.template_arg, "--template-arg", "enable_thinking=false")
    check_given(arguments, "--template-arg")
    return arguments


def _named_values(texts: list[str], option: str, example: str) -> dict[str, Any]:
    """`NAME=VALUE` of an option that is given once a name: JSON values, else texts."""
    import json

    from eagle3fn.base.errors import UserError

    values = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not name or not equals:
            raise UserError(f"{option} {text}: must be NAME=VALUE, such as {example}")
        try:
            values[name] = json.loads(_JSON_VALUES.get(value) or value)
        except ValueError:
            values[name] = value
    return values


def _template(options: Any, tokenizer: Any) -> "ChatTemplate":
    """The target's chat template, with the options' arguments."""
    from eagle3fn.data.target import stop_ids
    from eagle3fn.data.template import ChatTemplate

    stops = stop_ids(options.target, tokenizer)
    return ChatTemplate(tokenizer, stops, _template_arguments(options))


def inspect(options: Any) -> None:
    """Show the samples of conversations, and count."""
    import json
    import os
    import sys

    from eagle3fn.base.cores import own_cores
    from eagle3fn.data.inspection import describe, inspect_file, numbers, show_sample
    from eagle3fn.data.samples import SampleMaker
    from eagle3fn.data.target import load_tokenizer
    from eagle3fn.data.target_source import known_hidden_size
    from eagle3fn.data.vocab import load_map
    from eagle3fn.specforge.feature_files import read_map

    tokenizer = load_tokenizer(options.target)
    found = inspect_file(
        SampleMaker(_template(options, tokenizer), options.max_length),
        options.conversations,
        limit=options.limit,
        processes=own_cores(),
        skip_bad=options.skip_bad,
        show=options.show,
        row_id=options.id,
        vocab_map=load_map(options.vocab, read=read_map) if options.vocab else None,
        hidden_size=known_hidden_size(options.target),
        on_rows=progress.counter("row"),
    )
    progress.close()
    if options.json:
        print(json.dumps(numbers(found)))
        return
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for sample in found.shown:
        print(show_sample(tokenizer, sample, colour), end="\n\n")
    for line in found.missing:
        print(f"not trained: {line}", end="\n\n")
    print(describe(found, options.conversations))


def extract(options: Any) -> None:
    """Write the target's features of conversations."""
    import torch

    from eagle3fn.base.cores import own_cores
    from eagle3fn.base.device import check_device
    from eagle3fn.base.draft_config import aux_layers
    from eagle3fn.data.encode import describe_counts
    from eagle3fn.data.extract import extract
    from eagle3fn.data.features import open_features
    from eagle3fn.data.own import foreign_note, measure_agreement
    from eagle3fn.data.target_source import target_config

    _check_extract(options)
    check_device(options.device)
    tree = target_config(options.target)
    layers = aux_layers(_draft(options, tree), tree["num_hidden_layers"])
    opened = _engine_source if options.engine else _model_source
    with opened(options, tree, layers) as (source, tokenizer):
        name = str(source.dtype).removeprefix("torch.")
        _say(f"the target computes in {name}, its features are stored in bfloat16")
        index = extract(
            source,
            _template(options, tokenizer),
            options.conversations,
            options.out,
            max_length=options.max_length,
            limit=options.limit,
            minutes=options.minutes,
            stored=torch.bfloat16,
            skip_bad=options.skip_bad,
            processes=own_cores(),
            on_rows=progress.counter("row"),
            on_progress=progress.bar("sample"),
        )
    progress.close()
    totals = index["totals"]
    rest = f", {index['remaining']} left for a call with more time" if index["remaining"] else ""
    print(
        f"{options.out}: {totals['samples']} samples, {totals['tokens']} tokens, "
        f"{totals['supervised']} supervised, {totals['bytes'] / 2**20:.0f} MiB{rest}"
    )
    for line in describe_counts(index, Path(options.out) / "rejects.jsonl"):
        print(line)
    found = measure_agreement(open_features(options.out), source.head)
    _say(foreign_note(found, options.target, options.conversations))


def _check_extract(options: Any) -> None:
    """Refuse options of `extract` that would have no effect or do not go together, by name."""
    from eagle3fn.base.errors import UserError

    if not options.engine:
        for name in _given(options, ("--engine-python", "--engine-url", "--engine-arg", "--check")):
            raise UserError(f"{name}: needs --engine, such as --engine vllm")
        return

    for name in _given(options, ("--device",)):
        raise UserError(f"{name}: the engine chooses its device; leave it out")
    if bool(options.engine_python) == bool(options.engine_url):
        raise UserError(
            f"--engine {options.engine}: needs either --engine-python, a Python that has it, or "
            "--engine-url, a running server"
        )
    if options.engine_url:
        for name in ("engine_arg", "threads"):
            if getattr(options, name) is not None:
                option = f"--{name.replace('_', '-')}"
                raise UserError(f"{option}: a running server has its own; give it at its start")
    if options.engine == "sglang" and options.engine_python:
        raise UserError("--engine sglang: is asked as running servers alone; give --engine-url")
    if options.engine == "vllm" and len(options.engine_url or []) > 1:
        raise UserError("--engine-url: vLLM has one server; give it once")


@contextmanager
def _model_source(
    options: Any, tree: dict[str, Any], layers: tuple[int, ...]
) -> "Iterator[tuple[FeatureSource, Any]]":
    """The target in this process as a source of features, and its tokenizer."""
    import torch

    from eagle3fn.base.device import fast_dtype
    from eagle3fn.base.thread_timing import large_products, sizes_of
    from eagle3fn.base.threads import take_threads
    from eagle3fn.data.extract import begun_threads
    from eagle3fn.data.sources import model_source
    from eagle3fn.data.target import load_target

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
    batch = options.batch or (4 if options.device == "cpu" else 8)
    yield model_source(model, layers, batch=batch, name=options.target), tokenizer


@contextmanager
def _engine_source(
    options: Any, tree: dict[str, Any], layers: tuple[int, ...]
) -> "Iterator[tuple[FeatureSource, Any]]":
    """An engine as a source of features, and the target's tokenizer."""
    import torch

    from eagle3fn.data.engine_source import check_room, default_check, engine_source
    from eagle3fn.data.target import load_tokenizer
    from eagle3fn.data.target_source import loaded_config

    check_room(loaded_config(options.target), options.max_length, options.engine)
    arguments = _named_values(options.engine_arg or [], "--engine-arg", "tensor_parallel_size=2")
    check = options.check or default_check(options.target, arguments)
    tokenizer = load_tokenizer(options.target)
    dtype = getattr(torch, options.dtype) if options.dtype else None
    with _open_engine(options, tree, layers, dtype, arguments) as engine:
        batch = options.batch or 32
        source = engine_source(engine, options.target, layers, batch=batch, check=check, say=_say)
        yield source, tokenizer


def _open_engine(
    options: Any,
    tree: dict[str, Any],
    layers: tuple[int, ...],
    dtype: "torch.dtype | None",
    arguments: dict[str, Any],
) -> Any:
    """The engine that the options name, a context manager."""
    from eagle3fn.engines.sglang import SglangServers
    from eagle3fn.engines.vllm_process import VllmProcess, taps_of
    from eagle3fn.engines.vllm_server import VllmServer

    if options.engine == "sglang":
        return SglangServers(options.engine_url, layers, dtype=dtype)
    taps = taps_of(layers, tree["num_hidden_layers"])
    if options.engine_url:
        (url,) = options.engine_url
        return VllmServer(url, taps, max_length=options.max_length, dtype=dtype)
    return VllmProcess(
        options.engine_python,
        options.target,
        taps,
        f"{Path(options.out)}.vllm.log",
        max_length=options.max_length,
        dtype=dtype,
        arguments=arguments,
        threads=options.threads,
    )


def vocab(options: Any) -> None:
    """Count the supervised tokens and write the vocabulary map."""
    from eagle3fn.data.features import open_features
    from eagle3fn.data.pipeline import split
    from eagle3fn.data.target_source import check_supported, config_hash, target_config
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
    check_supported(options.target)
    vocab_size = tree["vocab_size"]
    features = open_features(options.features, vocab_size, tree["hidden_size"], READER)
    samples = len(features.samples)
    held_out = held_out_of(samples) if options.held_out is None else options.held_out
    kept, held = split(samples, held_out)

    counts = count_tokens(features, kept, vocab_size)
    size = options.size or chosen_size(counts)
    vocab_map = build_map(counts, min(size, vocab_size))
    covered = coverage(vocab_map, counts)
    provenance = {"target": options.target, "covered": covered}
    provenance["target_hash"] = config_hash(options.target)
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


def _check_start(options: Any, config: "Config", target_layers: int) -> None:
    """Refuse a draft to start from that is not the run's; a run that goes on needs none."""
    from eagle3fn.train.defaults import begun_settings
    from eagle3fn.train.drafts import check_start

    if begun_settings(options.out) is None:
        check_start(config, target_layers)


def train(options: Any) -> None:
    """Train the draft, or go on."""
    import torch

    from eagle3fn.base.device import check_device
    from eagle3fn.base.draft_config import aux_layers
    from eagle3fn.base.launch import ranks
    from eagle3fn.base.thread_timing import large_products
    from eagle3fn.base.threads import take_threads
    from eagle3fn.data.features import check_made_for, open_features, tensors_of
    from eagle3fn.data.own import foreign_note, measure_agreement
    from eagle3fn.data.target_source import config_hashes, target_config
    from eagle3fn.data.target_tensors import read_target_tensors
    from eagle3fn.data.vocab import load_map, map_size
    from eagle3fn.specforge.feature_files import READER, read_map
    from eagle3fn.specforge.recipes import RECIPES
    from eagle3fn.train.horizon import begun_threads
    from eagle3fn.train.loop import train
    from eagle3fn.train.recipe import OURS
    from eagle3fn.use.model_card import facts_of
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
        hashes = config_hashes(options.target)
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

        # A draft to start from, unless the run goes on; then features, map and target, which must
        # belong together.
        layers = tree["num_hidden_layers"]
        _check_start(options, config, layers)
        vocab_map = load_map(
            options.vocab,
            config.draft.vocab_size,
            config.draft.draft_vocab_size,
            hashes,
            read_map,
        )
        tensors = read_target_tensors(options.target, dtype, tensors_of(features))
        check_made_for(features, hashes, aux_layers(config.draft, layers), options.target)
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
            events=run_events(options.out, config, layers, facts_of(features, options.target)),
            world=world,
            recipe=recipe,
        )
        if world.main:
            progress.close()
            print(check_published(options.out, int(state.step), world.size, options.arguments))


def plan(options: Any) -> None:
    """Print the bytes that a run needs; refuse what does not fit."""
    from eagle3fn.data.target_source import check_supported, target_config
    from eagle3fn.train.memory import GIB, check_fits, describe, plan_memory

    tree = target_config(options.target) if options.target else {}
    if options.target:
        check_supported(options.target)
    draft = None
    if options.target or options.draft_config:
        draft = _draft(options, tree)
    _named(options, options.set)
    config = _config(options, draft, options.set)

    tied = bool(tree.get("tie_word_embeddings"))
    print(describe(plan_memory(config, options.ranks, options.tokens, tied)))
    check_fits(config, options.ranks, (options.memory or math.inf) * GIB, "--memory", tied)


def evaluate(options: Any) -> None:
    """Decode prompts plainly and with the draft, by this package or in a serving engine."""
    _check_evaluate(options)
    if options.engine:
        _evaluate_in_engine(options)
        return
    import torch

    from eagle3fn.base.device import check_device
    from eagle3fn.base.files import write_json
    from eagle3fn.base.thread_timing import sizes_of, thin_products
    from eagle3fn.base.threads import take_threads
    from eagle3fn.data.target_source import target_config
    from eagle3fn.use.evaluate import EvalSettings, evaluate, read_prompts

    check_device(options.device)
    sizes = sizes_of(target_config(options.target))
    rows = [1, 1 + options.draft_length]  # a token, and a block that is verified
    _say(
        take_threads(
            lambda: thin_products(sizes, rows, torch.float32), options.device, options.threads
        )
    )
    settings = EvalSettings(
        tasks=options.tasks,
        max_new=options.max_new,
        draft_length=options.draft_length,
        device=options.device,
        speed_dtype=options.dtype,
        template_arguments=_template_arguments(options),
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
    if not report["accepted_length"]:
        print("nothing was drafted: every answer ended with its first token")
    print(
        f"{options.out}: lossless {report['lossless']}, "
        f"accepted length {report['accepted_length']:.3f}, "
        f"{report['speedup']:.2f} times as fast in {report['speed_dtype']}"
    )


_HERE_ALONE = ("--device", "--plain", "--untrained", "--threads")
_ENGINES_ALONE = (
    "--engine-python",
    "--engine-arg",
    "--converter",
    "--temperature",
    "--top-p",
    "--seed",
)


def _check_evaluate(options: Any) -> None:
    """Refuse options of `evaluate` that would have no effect, by name."""
    from eagle3fn.base.errors import UserError

    if options.engine:
        for name in _given(options, _HERE_ALONE):
            raise UserError(
                f"{name}: has no effect on an engine; leave it out, or give the engine's own "
                "setting with --engine-arg NAME=VALUE"
            )
        _check_engine(options)
    else:
        for name in _given(options, _ENGINES_ALONE):
            raise UserError(f"{name}: is for --engine vllm or llamacpp; name one, or leave it out")


def _check_engine(options: Any) -> None:
    """Refuse what the engine cannot do, and options that would have no effect on it."""
    from eagle3fn.base.errors import UserError

    if not options.engine_python:
        raise UserError(
            f"--engine {options.engine}: name the Python of an environment that has it with "
            "--engine-python"
        )
    if not options.temperature:
        for name in _given(options, ("--top-p", "--seed")):
            raise UserError(f"{name}: greedy decoding draws nothing; give --temperature above 0")

    # GGUF files.
    files = [Path(options.target).suffix, Path(options.draft).suffix]
    if options.engine == "vllm" and options.converter:
        raise UserError("--converter: is for --engine llamacpp; vLLM loads exported folders")
    if options.engine == "vllm" and files[1] == ".gguf":
        raise UserError(f"--draft {options.draft}: vLLM loads exported folders; name one")
    if files == [".gguf", ".gguf"]:
        for name in _given(options, ("--dtype", "--converter")):
            raise UserError(f"{name}: GGUF files are loaded as they are; leave it out")


def _given(options: Any, names: tuple[str, ...]) -> list[str]:
    """Those of an option's names that are among a command's arguments, also shortened."""
    words = [word.partition("=")[0] for word in options.arguments if len(word) > 2]
    words = [word for word in words if word.startswith("--")]
    return [name for name in names if any(name.startswith(word) for word in words)]


def _engine_dtype(options: Any) -> str | None:
    """What an engine computes in; None where a GGUF file of the target says it."""
    gguf = options.engine == "llamacpp" and Path(options.target).suffix == ".gguf"
    return options.dtype or (None if gguf else "float32")


def _evaluate_in_engine(options: Any) -> None:
    """Decode prompts plainly and with the draft, in a serving engine."""
    from contextlib import nullcontext

    from eagle3fn.base.files import write_json
    from eagle3fn.engines.decoding import Sampling
    from eagle3fn.engines.llamacpp import gguf_files
    from eagle3fn.use.engine_evaluate import EngineEvalSettings, describe, engine_evaluate
    from eagle3fn.use.evaluate import read_prompts

    settings = EngineEvalSettings(
        engine=options.engine,
        python=options.engine_python,
        tasks=options.tasks,
        max_new=options.max_new,
        draft_length=options.draft_length,
        dtype=_engine_dtype(options),
        sampling=Sampling(
            options.temperature or 0.0,
            1.0 if options.top_p is None else options.top_p,
            options.seed or 0,
        ),
        arguments=_named_values(options.engine_arg or [], "--engine-arg", "enforce_eager=true"),
        template_arguments=_template_arguments(options),
    )
    prompts = read_prompts(options.prompts)
    out = Path(options.out)
    out.parent.mkdir(parents=True, exist_ok=True)

    served = nullcontext((options.target, options.draft))
    if options.engine == "llamacpp":
        served = gguf_files(
            options.target,
            options.draft,
            options.converter,
            options.dtype,
            out.parent,
            options.engine_python,
        )
    with served as loaded:
        report = engine_evaluate(
            options.target,
            options.draft,
            prompts,
            settings,
            out.with_suffix(""),
            served=loaded,
            on_progress=progress.bars("prompt"),
            prompts_name=Path(options.prompts).name,
        )
    progress.close()
    write_json(out, report)
    print(f"{out}: {describe(report)}")


def _target_layers(draft: "DraftConfig", target: str | None) -> tuple[int, dict[str, Any]]:
    """The target's number of layers and its configuration; without it, as many as are tapped."""
    from eagle3fn.base.errors import UserError
    from eagle3fn.data.target_source import target_config

    if target is None:
        if draft.aux_layers is None:
            raise UserError(
                "--target: the draft's config.json lists no taps, so the default ones of its "
                "target are needed; name the target"
            )
        return max(draft.aux_layers) + 1, {}

    tree = target_config(target)
    pairs = (("vocab_size", draft.vocab_size), ("hidden_size", draft.target_hidden_size))
    for key, size in pairs:
        if tree[key] != size:
            raise UserError(
                f"--target {target}: its {key} is {tree[key]}, the draft's target has {size}; name "
                "the target that the draft was trained for"
            )
    return tree["num_hidden_layers"], tree


def export(options: Any) -> None:
    """Write a draft as an engine reads it."""
    from eagle3fn.base.errors import UserError
    from eagle3fn.train.drafts import load_draft, stored_dtype
    from eagle3fn.use.engine_limits import ENGINES
    from eagle3fn.use.export import export_for
    from eagle3fn.use.model_card import read_facts

    engine = ENGINES[options.engine]
    _check_apart(options, "--draft", options.draft)
    name = options.target_name or options.target
    if engine.by_number and not name:
        raise UserError(
            f"--for {engine.name}: its layout names the target; add --target FOLDER_OR_ID"
        )
    dtype = stored_dtype(options.draft)
    draft = load_draft(options.draft, dtype)
    layers, tree = _target_layers(draft.config, options.target)
    if name and Path(name).is_dir():
        name = str(Path(name).resolve())

    facts = read_facts(options.draft)
    export_for(
        draft,
        engine,
        options.out,
        layers,
        dtype,
        name or "",
        tuple(tree.get("architectures") or ()),
        facts._replace(target=name or facts.target),
    )
    print(f"{options.out}: for {engine.read}")


def _check_apart(options: Any, option: str, path: str) -> None:
    """Refuse to write over what is read."""
    from eagle3fn.base.errors import UserError

    if Path(options.out).resolve() == Path(path).resolve():
        raise UserError(f"--out {options.out}: is {option} too, and would replace it; name another")


def convert(options: Any) -> None:
    """Bring drafts, maps or features of other trainers to ours, or maps and features to theirs."""
    from eagle3fn.base.errors import UserError

    if options.origin and not options.draft:
        raise UserError(
            "--from: of drafts alone; files of maps and features are known by themselves"
        )
    given = ("--draft", "--vocab", "--features")
    for option, path in zip(given, (options.draft, options.vocab, options.features), strict=True):
        if path:
            _check_apart(options, option, path)
    if options.draft:
        if options.kind != "eagle3fn":
            raise UserError(
                "--for: of maps and features; a draft goes to engines by eagle3fn export"
            )
        _convert_draft(options)
    elif options.vocab:
        _convert_map(options)
    else:
        _convert_features(options)


def _convert_draft(options: Any) -> None:
    import torch

    from eagle3fn.base.types import Frozen
    from eagle3fn.use.export import export
    from eagle3fn.use.foreign_drafts import read_foreign
    from eagle3fn.use.model_card import read_facts

    found = read_foreign(options.draft, options.origin)
    draft = found.draft
    layers, _ = _target_layers(draft.config, options.target)
    frozen = Frozen(draft.embed_tokens, torch.empty(0), *draft.vocab)
    facts = read_facts(options.draft)
    facts = facts._replace(target=options.target or facts.target)
    export(draft.params, frozen, draft.config, options.out, layers, found.dtype, True, facts)
    for line in found.changes:
        print(line)
    print(f"{options.out}: a draft of {draft.config.draft_vocab_size} tokens, from {found.origin}")


def _convert_map(options: Any) -> None:
    from functools import partial

    from eagle3fn.data.target_source import config_hash, config_hashes, target_config
    from eagle3fn.data.vocab import load_map
    from eagle3fn.specforge.feature_files import read_map, write_map
    from eagle3fn.use.convert import read_map_of, write_map_for

    # Checked, and where the target is named, as its map.
    provenance: dict[str, Any] = {"converted_from": Path(options.vocab).name}
    vocab_size = hashes = None
    if options.target:
        vocab_size = target_config(options.target)["vocab_size"]
        hashes = config_hashes(options.target)
        provenance |= {"target": options.target, "target_hash": config_hash(options.target)}
    read = partial(read_map_of, read=read_map)
    vocab_map = load_map(options.vocab, vocab_size, None, hashes, read)
    stored = read(Path(options.vocab)).provenance
    write_map_for(options.out, vocab_map, options.kind, stored | provenance, write_map, read_map)
    sizes = f"{len(vocab_map.d2t)} of {len(vocab_map.t2d)} tokens"
    print(f"{options.out}: {sizes}, for {options.kind}")


def _convert_features(options: Any) -> None:
    from eagle3fn.base.errors import UserError
    from eagle3fn.data.features import open_features
    from eagle3fn.specforge.feature_files import write_ckpt
    from eagle3fn.use.convert import LAST_BEFORE_NORM, write_files

    if options.kind == "speculators":
        raise UserError(
            f"--for speculators: {LAST_BEFORE_NORM}; let speculators generate its own states"
        )
    if options.kind == "eagle3fn":
        _convert_features_to_ours(options)
        return
    features = open_features(options.features)
    count = write_files(features, options.out, write_ckpt, ".ckpt", progress.bar("sample"))
    progress.close()
    print(f"{options.out}: {count} samples as .ckpt files")


def _convert_features_to_ours(options: Any) -> None:
    import torch

    from eagle3fn.base.errors import UserError
    from eagle3fn.data.features import open_features
    from eagle3fn.data.target_source import config_hash, target_config
    from eagle3fn.data.target_tensors import read_stored_target
    from eagle3fn.specforge.feature_files import READER
    from eagle3fn.use.convert import write_ours
    from eagle3fn.use.speculators_data import has_states, speculators_reader

    if not options.target:
        raise UserError("--target: such files do not say of which target they are; name it")
    tree = target_config(options.target)
    sizes = {key: tree[key] for key in ("vocab_size", "hidden_size")}

    # speculators keeps the last state before the target's final norm.
    reader = READER
    if has_states(options.features):
        stored = read_stored_target(options.target, torch.float32)
        reader = speculators_reader(options.features, lambda last: stored.norm(last.float()))
    features = open_features(options.features, **sizes, reader=reader)
    if not features.reader:
        raise UserError(f"--features {options.features}: are ours already; add --for specforge")

    target = {
        "name": options.target,
        **sizes,
        "num_layers": tree["num_hidden_layers"],
        "config_hash": config_hash(options.target),
    }
    index = write_ours(features, options.out, target, progress.bar("sample"))
    progress.close()
    totals = index["totals"]
    print(
        f"{options.out}: {totals['samples']} samples, {totals['tokens']} tokens, "
        f"{totals['supervised']} supervised"
    )


def report(options: Any) -> None:
    """Gather a run's results."""
    from eagle3fn.use.report import write_report

    print(write_report(Path(options.folder)))


def parity(options: Any) -> int:
    """Compare SpecForge's recipe with SpecForge; returns the exit code."""
    from eagle3fn.specforge.parity import run

    return run(options.cases, options.seed, options.json, options.bisect, progress.bar)

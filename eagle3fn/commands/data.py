"""Commands that make conversations and show them, and that make the vocabulary map of features."""

from typing import TYPE_CHECKING, Any

from eagle3fn.base import progress
from eagle3fn.base.errors import printable
from eagle3fn.commands.shared import chat_template, given_options, say

if TYPE_CHECKING:
    from eagle3fn.base.types import VocabMap
    from eagle3fn.data.features import FeatureSet
    from eagle3fn.data.generate import Sampling
    from eagle3fn.data.regenerate import Source
    from eagle3fn.data.template import ChatTemplate


def synthesize(options: Any) -> None:
    """Let the target write conversations."""
    from eagle3fn.data.openings import check_languages
    from eagle3fn.data.synthesize import ANSWER, Settings, read_systems, synthesize

    _check_out(options)
    settings = Settings(
        answer=_sampling(options, ANSWER),
        seed=options.seed,
        batch=options.batch,
        turns=options.turns,
        systems=read_systems(options.system) if options.system else (),
        languages=tuple(options.languages.split(",")),
    )
    check_languages(settings.languages)
    model, template = _ready_target(options)
    written = synthesize(
        model,
        template,
        options.out,
        options.count,
        settings,
        exclude=options.exclude,
        most_repeated=options.max_repeated,
        on_progress=progress.bar("conversation"),
    )
    turns = f", {written.turns} user turns" if options.turns > 1 else ""
    print(f"{options.out}: {written.conversations} conversations{turns}")
    say(written.dropped.describe(written.asked))


def regenerate(options: Any) -> None:
    """Replace the answers of conversations by the target's own."""
    from eagle3fn.data.regenerate import ANEW, regenerate

    _check_regenerate(options)
    _check_out(options)
    sampling = _sampling(options, ANEW)
    source, template = _endpoint_source(options) if options.url else _own_source(options)
    done = regenerate(
        source,
        template,
        options.conversations,
        options.out,
        sampling,
        seed=options.seed,
        limit=options.limit,
        skip_bad=options.skip_bad,
        exclude=options.exclude,
        on_progress=progress.bar("conversation"),
    )
    progress.close()
    say(done.rejects)
    print(
        f"{options.out}: {done.conversations} conversations, {done.answers} answers, {done.cut} of "
        f"them cut at {sampling.max_new} tokens and kept; {done.excluded} conversations excluded"
    )
    if done.empty:
        print(f"{done.empty} answers are empty: they give no sample")
    if done.calls:
        print(f"{done.calls} conversations end early, at a call of a tool")
    if done.kept:
        print(f"{done.kept} calls of tools and answers of weight 0 stay as they were, untrained")


def _check_regenerate(options: Any) -> None:
    """Refuse options of `regenerate` that would have no effect, by name."""
    from eagle3fn.base.errors import UserError

    own = ("--device", "--batch", "--threads")
    of_server = ("--model", "--api-key-env", "--concurrent")
    for name in given_options(options, own if options.url else of_server):
        if options.url:
            raise UserError(f"{name}: the server has its own; leave it out, or --url")
        raise UserError(f"{name}: needs --url, a running server")


def _check_out(options: Any) -> None:
    """Refuse a place of conversations before the target is loaded."""
    from eagle3fn.data.parts import check_out_conversations, hold_parts

    check_out_conversations(options.out)
    with hold_parts(options.out):
        pass


def _sampling(options: Any, default: "Sampling") -> "Sampling":
    """How answers are drawn: as the options say, and else by default."""
    given = {name: getattr(options, name, None) for name in default._fields}
    return default._replace(**{name: value for name, value in given.items() if value is not None})


def _ready_target(options: Any) -> "tuple[Any, ChatTemplate]":
    """The target in this process with the number of threads that it shall have; its template."""
    from eagle3fn.base.device import check_device, fast_dtype
    from eagle3fn.base.thread_timing import sizes_of, thin_products
    from eagle3fn.base.threads import take_threads
    from eagle3fn.data.parts import begun_threads
    from eagle3fn.data.target import load_target

    check_device(options.device)
    model, tokenizer = load_target(options.target, fast_dtype(options.device), options.device)
    sizes = sizes_of(model.config.to_dict())
    say(
        take_threads(
            lambda: thin_products(sizes, [options.batch], model.dtype),
            options.device,
            options.threads,
            begun_threads(options.out),
        )
    )
    return model, chat_template(options, tokenizer)


def _own_source(options: Any) -> "tuple[Source, ChatTemplate]":
    """The target in this process as a source of answers, and its template."""
    from eagle3fn.data.regenerate import ByModel

    model, template = _ready_target(options)
    return ByModel(model, template, options.batch), template


def _endpoint_source(options: Any) -> "tuple[Source, ChatTemplate]":
    """A running server as a source of answers, and the target's template."""
    from eagle3fn.data.by_endpoint import ByEndpoint
    from eagle3fn.data.endpoint import Endpoint
    from eagle3fn.data.target_loading import load_tokenizer
    from eagle3fn.data.target_source import target_config

    endpoint = Endpoint(options.url, options.api_key_env)
    template = chat_template(options, load_tokenizer(options.target))
    positions = target_config(options.target).get("max_position_embeddings")
    model = options.model or endpoint.only_model()
    return ByEndpoint(endpoint, model, template, positions, options.concurrent), template


def inspect(options: Any) -> None:
    """Show the samples of conversations, and count."""
    import json
    import os
    import sys

    from eagle3fn.base.cores import own_cores
    from eagle3fn.data.inspection import describe, inspect_file, numbers, show_sample
    from eagle3fn.data.samples import SampleMaker
    from eagle3fn.data.target_loading import load_tokenizer
    from eagle3fn.data.target_source import config_hashes, known_hidden_size
    from eagle3fn.data.vocab import load_map
    from eagle3fn.specforge.feature_files import read_map

    tokenizer = load_tokenizer(options.target)
    hidden_size = known_hidden_size(options.target)
    hashes = None if hidden_size is None else config_hashes(options.target)
    found = inspect_file(
        SampleMaker(chat_template(options, tokenizer), options.max_length),
        options.conversations,
        limit=options.limit,
        processes=own_cores(),
        skip_bad=options.skip_bad,
        show=options.show,
        row_id=options.id,
        vocab_map=load_map(options.vocab, target_hash=hashes, read=read_map)
        if options.vocab
        else None,
        hidden_size=hidden_size,
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


def vocab(options: Any) -> None:
    """Count the supervised tokens and write the vocabulary map."""
    from eagle3fn.data.features import check_made_for, open_features
    from eagle3fn.data.kept_tokens import kept_tokens
    from eagle3fn.data.map_data import samples_hash
    from eagle3fn.data.pipeline import split
    from eagle3fn.data.target_files import check_weights_of
    from eagle3fn.data.target_source import check_supported, config_hashes, target_config
    from eagle3fn.data.vocab import (
        build_map,
        chosen_size,
        count_tokens,
        coverage,
        held_out_of,
        read_map,
        save_map,
    )
    from eagle3fn.specforge.feature_files import READER
    from eagle3fn.use.convert import check_out_map

    check_out_map(options.out, "eagle3fn", read_map)
    tree = target_config(options.target)
    check_supported(options.target)
    vocab_size = tree["vocab_size"]
    features = open_features(options.features, vocab_size, tree["hidden_size"], READER)
    hashes = config_hashes(options.target)
    check_made_for(features, hashes, None, options.target)
    check_weights_of(features, options.target)
    samples = len(features.samples)
    held_out = held_out_of(samples) if options.held_out is None else options.held_out
    kept, held = split(samples, held_out)

    # The map.
    always = kept_tokens(options.target, vocab_size)
    counts = count_tokens(features, kept, vocab_size)
    size = options.size or max(chosen_size(counts), len(always.ids))
    vocab_map = build_map(counts, size, always.ids)
    covered = coverage(vocab_map, counts)
    text = f"{options.out}: {len(vocab_map.d2t)} of {vocab_size} tokens, {covered:.2%} of the "
    text += "supervised ones"
    provenance = {
        "target": options.target,
        "target_hash": hashes[0],
        "samples": samples_hash(features),
        "held_out": held_out,
        "always": list(always.ids),
        "covered": covered,
    }

    # What it has of samples that were not counted.
    choices = "no samples are held out: how many of the target's own choices it has is not known"
    if held:
        unseen = coverage(vocab_map, count_tokens(features, held, vocab_size))
        text += f", {unseen:.2%} in {len(held)} held-out samples"
        found, choices = _own_choices(options.target, features, held, vocab_map)
        provenance |= {"covered_held_out": unseen, **found}
    save_map(options.out, vocab_map, provenance)

    print(text)
    print(choices)
    names = ", ".join(printable(text) for text in always.texts[:12])
    more = len(always.texts) - 12
    names += f" and {more} more" if more > 0 else ""
    print(f"always in the map: {names or 'none'}")
    if always.unknown:
        say(f"only the configuration's stop tokens are always in the map: {always.unknown}")


def _own_choices(
    target: str, features: "FeatureSet", held: list[int], vocab_map: "VocabMap"
) -> tuple[dict[str, Any], str]:
    """The share of the target's own choices that a map has: for its file, and as a line."""
    import torch

    from eagle3fn.base.errors import UserError
    from eagle3fn.data.choices import count_choices
    from eagle3fn.data.features import tensors_of
    from eagle3fn.data.target_tensors import read_target_tensors
    from eagle3fn.data.vocab import coverage

    try:
        tensors = read_target_tensors(target, torch.bfloat16, tensors_of(features))
    except UserError as error:
        return {}, f"the target's own choices in them are not counted: {error}"
    found = count_choices(features, held, tensors.head)
    if not found.places:
        return {}, "the target's own choices in them are not counted: no place is supervised"
    share = coverage(vocab_map, found.counts)
    places = f"{found.places:,} places"
    if found.places < found.all_places:
        places += f" of {found.all_places:,}"
    line = f"{share:.2%} of the target's own choices in them, at {places}, are in the map"
    return {"choices_held_out": share, "choices_counted": found.places}, line

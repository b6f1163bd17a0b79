"""Commands that make conversations, and that show what is trained on of them."""

from contextlib import suppress
from typing import TYPE_CHECKING, Any

from eagle3fn.base import progress
from eagle3fn.base.output import Result, has_colours
from eagle3fn.commands.shared import chat_template, choose_max_length, given_options, say

if TYPE_CHECKING:
    from eagle3fn.data.generate import Sampling
    from eagle3fn.data.regenerate import Source
    from eagle3fn.data.template import ChatTemplate


def synthesize(options: Any) -> Result:
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
    return Result({"out": options.out, **written._asdict()})


def regenerate(options: Any) -> Result:
    """Replace the answers of conversations by the target's own."""
    from eagle3fn.base.errors import UserError
    from eagle3fn.data.regenerate import ANEW, regenerate
    from eagle3fn.data.user_turns import describe_prompts

    _check_regenerate(options)
    _check_out(options)
    sampling = _sampling(options, ANEW)
    source, template = _endpoint_source(options) if options.url else _own_source(options)
    with suppress(UserError):  # a template that takes no lone user turn may take the rows'
        say(describe_prompts(template))
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
    counts = done._asdict()
    del counts["rejects"]  # a line, which is printed
    return Result({"out": options.out, **counts})


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


def inspect(options: Any) -> Result:
    """Show the samples of conversations, and count."""
    import sys

    from eagle3fn.base.cores import own_cores
    from eagle3fn.data.inspection import describe, inspect_file, numbers, show_sample
    from eagle3fn.data.samples import SampleMaker
    from eagle3fn.data.target_loading import load_tokenizer
    from eagle3fn.data.target_source import config_hashes, known_hidden_size, known_positions
    from eagle3fn.data.vocab import load_map
    from eagle3fn.specforge.feature_files import read_map

    tokenizer = load_tokenizer(options.target)
    hidden_size = known_hidden_size(options.target)
    choose_max_length(options, known_positions(options.target))
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
    colour = has_colours(sys.stdout)
    for sample in found.shown:
        print(show_sample(tokenizer, sample, colour), end="\n\n")
    for line in found.missing:
        print(f"not trained: {line}", end="\n\n")
    print(describe(found, options.conversations))
    return Result(numbers(found))

"""The command that makes features, on one rank or several, by the target here or by an engine."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eagle3fn.base import progress
from eagle3fn.base.output import Result
from eagle3fn.commands.shared import (
    chat_template,
    choose_max_length,
    draft_shape,
    given_options,
    say,
)
from eagle3fn.commands.sources import (
    card_of,
    check_engine_options,
    engine_source,
    model_source,
    room,
)

if TYPE_CHECKING:
    import torch

    from eagle3fn.base.launch import World
    from eagle3fn.data.sources import FeatureSource


def extract(options: Any) -> Result | None:
    """Write the target's features of conversations, on one rank or several."""
    import torch

    from eagle3fn.base.cores import local_ranks, own_cores
    from eagle3fn.base.draft_config import aux_layers
    from eagle3fn.base.launch import ranks
    from eagle3fn.data.extract import extract
    from eagle3fn.data.held import held
    from eagle3fn.data.storage import STORES
    from eagle3fn.data.target_source import target_config

    _check_options(options)
    with ranks() as world:
        device = _device(options, world)
        with held(options.out, world=world):
            pass  # refused before the target is loaded

        # What is tapped.
        tree = target_config(options.target)
        choose_max_length(options, tree.get("max_position_embeddings"), room(options), world.main)
        shape = draft_shape(options, tree)
        if options.aux_layers:
            shape = replace(shape, aux_layers=options.aux_layers)
        layers = aux_layers(shape, tree["num_hidden_layers"])

        # The target, or an engine that has it.
        if options.engine:
            log = f"{Path(options.out)}.{options.engine}.log"
            opened = engine_source(options, tree, layers, log, say)
        else:
            opened = _own_source(options, tree, layers, device, world)

        with opened as (source, tokenizer):
            name = str(source.dtype).removeprefix("torch.")
            if world.main:
                say(f"the target computes in {name}, its features are stored in {options.store}")
            index = extract(
                source,
                chat_template(options, tokenizer),
                options.conversations,
                options.out,
                max_length=options.max_length,
                limit=options.limit,
                minutes=options.minutes,
                stored=torch.bfloat16,
                store=options.store if options.store in STORES else None,
                skip_bad=options.skip_bad,
                processes=own_cores() * local_ranks(),  # the other ranks wait meanwhile
                world=world,
                say=say,
                on_rows=progress.counter("row"),
                on_check=progress.bar("shard", "checked"),
                on_progress=progress.bar("token", rate=True),
            )
        progress.close()
        if not world.main:
            return None
        _say_extracted(options, index, source.head)
        return _extracted(options, index)


def _check_options(options: Any) -> None:
    """Refuse options that would have no effect or do not go together, by name."""
    from eagle3fn.base.cores import all_ranks
    from eagle3fn.base.errors import UserError

    if options.engine:
        for name in given_options(options, ("--device",)):
            raise UserError(f"{name}: the engine chooses its device; leave it out")
        if all_ranks() > 1:
            raise UserError(
                f"--engine {options.engine}: an engine spreads by itself; start one process, with "
                "the engine's own setting, such as --engine-arg tensor_parallel_size=2"
            )
    check_engine_options(options)
    if options.engine == "vllm" and len(options.engine_url or []) > 1:
        raise UserError("--engine-url: extraction asks one server of vLLM; give it once")


def _device(options: Any, world: "World") -> str:
    """Where this rank computes the target."""
    from eagle3fn.base.device import SPREAD, check_device, check_spread
    from eagle3fn.base.errors import UserError

    if options.device == SPREAD:
        if world.size > 1:
            raise UserError(
                f"--device = {SPREAD!r} on {world.size} ranks: one process has all cards then; "
                "start it without torchrun, or set --device=cuda, a card for each rank"
            )
        check_spread()
        return SPREAD
    return check_device(world.device(options.device, "--device"))


@contextmanager
def _own_source(
    options: Any, tree: dict[str, Any], layers: tuple[int, ...], device: str, world: "World"
) -> "Iterator[tuple[FeatureSource, Any]]":
    """The target in this process, with the number of threads that it shall have."""
    from eagle3fn.base.thread_timing import large_products, sizes_of
    from eagle3fn.base.threads import take_threads
    from eagle3fn.data.shards import begun_threads

    with model_source(options, layers, device) as (source, tokenizer):
        sizes = sizes_of(tree)
        line = take_threads(
            lambda: large_products(sizes.hidden, sizes.intermediate, source.dtype),
            card_of(device),
            options.threads,
            world.shared(begun_threads(options.out) if world.main else None),
            world,
        )
        if world.main:
            say(line)
        yield source, tokenizer


def _extracted(options: Any, index: dict[str, Any]) -> Result:
    """What a feature folder holds, and what was left out."""
    names = ("rows", "rejected", "dropped", "remaining")
    counts = {name: index[name] for name in names}
    return Result({"out": options.out, **index["totals"], **counts})


def _say_extracted(options: Any, index: dict[str, Any], head: "torch.Tensor") -> None:
    """Print what a feature folder holds, what was left out, and whose answers they are."""
    from eagle3fn.data.encode import describe_counts
    from eagle3fn.data.features import open_features
    from eagle3fn.data.own import foreign_note, measure_agreement

    totals = index["totals"]
    rest = f", {index['remaining']} left for a call with more time" if index["remaining"] else ""
    print(
        f"{options.out}: {totals['samples']} samples, {totals['tokens']} tokens, "
        f"{totals['supervised']} supervised, {totals['bytes'] / 2**20:.0f} MiB{rest}"
    )
    for line in describe_counts(index, Path(options.out) / "rejects.jsonl"):
        print(line)
    found = measure_agreement(open_features(options.out), head)
    say(foreign_note(found, options.target, options.conversations))

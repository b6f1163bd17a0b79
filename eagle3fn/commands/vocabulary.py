"""The command that makes the vocabulary map, of features or of conversations."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from eagle3fn.base import progress
from eagle3fn.base.errors import printable
from eagle3fn.base.output import Result
from eagle3fn.commands.shared import chat_template, choose_max_length, given_options

if TYPE_CHECKING:
    from eagle3fn.base.types import VocabMap
    from eagle3fn.data.features import FeatureSet
    from eagle3fn.data.kept_tokens import KeptTokens


def vocab(options: Any) -> Result:
    """Count the supervised tokens and write the vocabulary map."""
    from eagle3fn.data.kept_tokens import kept_tokens
    from eagle3fn.data.map_data import samples_hash
    from eagle3fn.data.pipeline import split
    from eagle3fn.data.target_source import check_supported, config_hashes, target_config
    from eagle3fn.data.vocab import (
        build_map,
        check_draft_size,
        chosen_size,
        count_tokens,
        coverage,
        held_out_of,
        read_map,
        save_map,
    )
    from eagle3fn.use.convert import check_out_map

    _check_options(options)
    check_out_map(options.out, "eagle3fn", read_map)
    tree = target_config(options.target)
    check_supported(options.target)
    vocab_size = tree["vocab_size"]
    always = kept_tokens(options.target, vocab_size)
    if options.size:
        check_draft_size(options.size, vocab_size, always.ids)

    with _samples(options, tree) as (features, left_out):
        samples = len(features.samples)
        held_out = held_out_of(samples) if options.held_out is None else options.held_out
        kept, held = split(samples, held_out)

        # The map.
        counts = count_tokens(features, kept, vocab_size)
        size = options.size or max(chosen_size(counts), len(always.ids))
        vocab_map = build_map(counts, size, always.ids)
        covered = coverage(vocab_map, counts)
        text = f"{options.out}: {len(vocab_map.d2t)} of {vocab_size} tokens, {covered:.2%} of the "
        text += "supervised ones"
        provenance = {
            "target": options.target,
            "target_hash": config_hashes(options.target)[0],
            "samples": samples_hash(features),
            "held_out": held_out,
            "always": list(always.ids),
            "covered": covered,
        }

        # What it has of samples that were not counted.
        choices = "no samples are held out: how many of the target's own choices it has is not "
        choices += "known"
        if held:
            unseen = coverage(vocab_map, count_tokens(features, held, vocab_size))
            text += f", {unseen:.2%} in {len(held)} held-out samples"
            found, choices = _own_choices(options.target, features, held, vocab_map)
            provenance |= {"covered_held_out": unseen, **found}
    save_map(options.out, vocab_map, provenance)

    for line in (text, choices, *_always_lines(always), *left_out):
        print(line)
    return Result(
        {
            "out": options.out,
            "draft_vocab_size": len(vocab_map.d2t),
            "vocab_size": vocab_size,
            "counted_samples": len(kept),
            **provenance,
        }
    )


# What is counted


class _Counted(NamedTuple):
    """Samples whose tokens are counted."""

    features: "FeatureSet"
    left_out: Sequence[str]  # lines on what is no sample


def _check_options(options: Any) -> None:
    """Refuse options that would have no effect, or a file that would replace the conversations."""
    from eagle3fn.base.errors import UserError
    from eagle3fn.base.places import check_apart

    reading = ("--max-length", "--limit", "--skip-bad", "--template-arg")
    for name in given_options(options, reading) if options.features else ():
        raise UserError(
            f"{name}: the samples of --features were made with their own; leave it out, or name "
            "--conversations"
        )
    if options.skip_bad is not None:
        rejects = {"--skip-bad of --out": _rejects(options)}
        check_apart(rejects, {"--conversations": options.conversations})


def _rejects(options: Any) -> str:
    """The file of bad rows."""
    return f"{options.out}.rejects.jsonl"


@contextmanager
def _samples(options: Any, tree: dict[str, Any]) -> Iterator[_Counted]:
    """The samples of a feature folder, or those that extraction makes of conversations."""
    if options.features:
        yield _Counted(_stored(options, tree), ())
        return

    with _encoded(options, tree) as counted:
        yield counted


def _stored(options: Any, tree: dict[str, Any]) -> "FeatureSet":
    """The target's features, opened."""
    from eagle3fn.data.features import check_made_for, open_features
    from eagle3fn.data.target_files import check_weights_of
    from eagle3fn.data.target_source import config_hashes
    from eagle3fn.specforge.feature_files import READER

    features = open_features(options.features, tree["vocab_size"], tree["hidden_size"], READER)
    check_made_for(features, config_hashes(options.target), None, options.target)
    check_weights_of(features, options.target)
    return features


@contextmanager
def _encoded(options: Any, tree: dict[str, Any]) -> Iterator[_Counted]:
    """The samples of conversations, without features."""
    from eagle3fn.base.cores import own_cores
    from eagle3fn.base.draft_config import DEFAULT_TAPS
    from eagle3fn.data.encode import describe_counts, encode_file
    from eagle3fn.data.on_demand import OnlineSamples, Widths
    from eagle3fn.data.online import STORED, MadeFrom, sample_set
    from eagle3fn.data.samples import SampleMaker
    from eagle3fn.data.target_loading import load_tokenizer

    choose_max_length(options, tree.get("max_position_embeddings"))
    encoded = encode_file(
        SampleMaker(chat_template(options, load_tokenizer(options.target)), options.max_length),
        options.conversations,
        tree["vocab_size"],
        limit=options.limit,
        processes=own_cores(),
        skip_bad=options.skip_bad,
        rejects=_rejects(options),
        on_progress=progress.counter("row"),
    )
    progress.close()
    with encoded.samples as rows:
        # Nothing goes on from this set by its fingerprint, and no features of it are asked for.
        made_from = MadeFrom(options.conversations, fingerprint="")
        sizes = {name: tree[name] for name in ("vocab_size", "hidden_size")}
        widths = Widths(DEFAULT_TAPS, tree["hidden_size"], STORED)
        tokens = OnlineSamples(rows, pool=None, widths=widths)
        features = sample_set(rows, sizes, tokens, made_from)
        yield _Counted(features, describe_counts(encoded.counts(), _rejects(options)))


# What is said


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

    unknown = "the target's own choices in them are not counted"
    if features.on_demand:
        return {}, (
            f"{unknown}: that takes its hidden states; eagle3fn vocab --features counts them, and "
            "train says as `counted` how many rows have theirs in the map"
        )
    try:
        tensors = read_target_tensors(target, torch.bfloat16, tensors_of(features))
    except UserError as error:
        return {}, f"{unknown}: {error}"
    found = count_choices(features, held, tensors.head)
    if not found.places:
        return {}, f"{unknown}: no place is supervised"
    share = coverage(vocab_map, found.counts)
    places = f"{found.places:,} places"
    if found.places < found.all_places:
        places += f" of {found.all_places:,}"
    line = f"{share:.2%} of the target's own choices in them, at {places}, are in the map"
    return {"choices_held_out": share, "choices_counted": found.places}, line


def _always_lines(always: "KeptTokens") -> Iterator[str]:
    """Lines on the tokens that a map has however rare they are."""
    names = ", ".join(printable(text) for text in always.texts[:12])
    more = len(always.texts) - 12
    names += f" and {more} more" if more > 0 else ""
    yield f"always in the map: {names or 'none'}"
    if always.unknown:
        yield f"only the configuration's stop tokens are always in the map: {always.unknown}"

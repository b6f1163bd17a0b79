"""What stays the same during a run: configuration, frozen tensors, samples.

Checked before the first step.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.distributed.device_mesh import DeviceMesh

from eagle3fn.base.config import Config, to_dict
from eagle3fn.base.device import check_device
from eagle3fn.base.errors import UserError
from eagle3fn.base.launch import World
from eagle3fn.base.sections import MOST_STEPS
from eagle3fn.base.types import Batch, Frozen, VocabMap
from eagle3fn.data import stages
from eagle3fn.data.collate import AlignMask
from eagle3fn.data.features import FeatureSet, read_tokens
from eagle3fn.data.pipeline import batches, split
from eagle3fn.data.target_tensors import TargetTensors, make_frozen
from eagle3fn.model.checks import check_loss
from eagle3fn.train.bind import Functions, bind
from eagle3fn.train.changes import FEATURES, made_with
from eagle3fn.train.counted import check_first_labels
from eagle3fn.train.memory import check_fits, memory_of
from eagle3fn.train.recipe import OURS, Recipe
from eagle3fn.train.reduce import check_ranks

_SAMPLES_CHECKED = 100


class Run(NamedTuple):
    """Everything that stays the same during a run."""

    config: Config
    frozen: Frozen
    fns: Functions
    features: FeatureSet
    train: list[int]  # the samples trained on
    held_out: list[int]  # the samples evaluated on
    out: Path
    data: dict[str, str]  # `fingerprints`, and the recipe where it is not ours
    device: str  # this rank's
    world: World = World()
    mesh: DeviceMesh | None = None
    recipe: Recipe = OURS
    shift: int = 0  # an update's number and this one make its place in the data's order
    earlier: Mapping[str, int] = {}  # `changes.trained_with`, before `--from`


def prepare(
    config: Config,
    features: FeatureSet,
    vocab_map: VocabMap,
    target: TargetTensors,
    out: str | Path,
    world: World = World(),  # noqa: B008
    recipe: Recipe = OURS,
) -> Run:
    """Check that all parts fit together, on all ranks alike, and bind the functions.

    Raises:
        UserError: tensors that don't fit the configuration, a device that is not there, samples
            beyond the position limit, none to train on, or none with a supervised row, of those to
            train on or of those held out; labels that are all outside the draft
            vocabulary; a number of ranks that the global batch or `train.reduce` does not fit, or
            ranks that were started differently.
    """
    # Refuse what cannot work before anything large is made.
    if not recipe.name and recipe != OURS:
        raise UserError(
            "recipe.name is empty: a run is resumed under the recipe that it began with, which is "
            "known by its name; give it one, as Recipe(name='mine', …)"
        )
    check_loss(config, recipe.batch_means)
    check_world(config, world)
    device = check_device(world.device(config.train.device))
    tied = target.head is target.embed_tokens
    where = f"the memory of {device}"
    check_fits(config, world.size, memory_of(device), where, tied, recipe)

    frozen = make_frozen(target, vocab_map, config, device)
    kept, held_out = split(len(features.samples), config.data.held_out)
    if features.on_demand:
        features.on_demand.fix(held_out)
    _check_batch(config, len(kept))
    _check_lengths(config, features)
    _check_trained(config, features, kept, recipe.align_mask)
    _check_evaluated(config, features, held_out, recipe.align_mask)
    check_first_labels(config, frozen, features, kept, recipe.align_mask)

    # All ranks must have been started alike.
    mesh = world.mesh(device)
    data = fingerprints(features, vocab_map)
    if recipe.name:
        data["recipe"] = recipe.name
    world.agree(_settings(config) | data)

    fns = bind(config, frozen, mesh, recipe)
    return Run(
        config=config,
        frozen=frozen,
        fns=fns,
        features=features,
        train=kept,
        held_out=held_out,
        out=Path(out),
        data=data,
        device=device,
        world=world,
        mesh=mesh,
        recipe=recipe,
    )


def training_batches(run: Run, start: int, stop: int) -> Iterator[tuple[Batch, ...]]:
    """This rank's micro-batches of the steps `start` … `stop - 1` of the data's order, on its
    device: of update `n`, counted from 0, that is step `n + run.shift`.
    """
    world, recipe = run.world, run.recipe
    micro = batches(
        run.features,
        run.train,
        run.config,
        start,
        stop,
        world.rank,
        world.size,
        recipe.align_mask,
        recipe.order,
    )
    return stages.to_device(micro, run.device)


def check_world(config: Config, world: World) -> None:
    """Refuse a number of ranks that cannot share every global batch alike; packed ones all can.

    Raises:
        UserError: names the micro-batches of an update and the ranks.
    """
    data, size = config.data, world.size
    count = data.global_batch // data.micro_batch
    if not data.pack_tokens and count % size:
        raise UserError(
            f"data.global_batch = {data.global_batch} and data.micro_batch = {data.micro_batch} "
            f"make {count} "
            f"micro-batches an update, {size} ranks must divide them; set data.global_batch to a "
            "multiple of "
            f"{size * data.micro_batch}, start other ranks, or set data.pack_tokens, with which "
            "any number does"
        )
    check_ranks(size, config.train.reduce)


def _settings(config: Config) -> dict[str, Any]:
    """Dotted settings, and the number of threads where bits are promised."""
    every = {
        f"{section}.{key}": value
        for section, part in to_dict(config).items()
        for key, value in part.items()
    }
    return every | (
        {"number of threads": torch.get_num_threads()} if config.train.reduce == "tree" else {}
    )


def _check_batch(config: Config, samples: int) -> None:
    """Refuse an update of more samples than all epochs have, and more updates than can be named."""
    batch, epochs = config.data.global_batch, config.train.epochs
    if batch > samples * epochs:
        raise UserError(
            f"data.global_batch = {batch}: an update would have more than the {samples} samples "
            f"of {epochs} epochs; set it to {samples} at most, or extract more"
        )
    if not config.train.steps and samples * epochs // batch > MOST_STEPS:
        raise UserError(
            f"train.epochs = {epochs}: {samples} samples make more than {MOST_STEPS} updates; set "
            "train.steps"
        )


def _check_lengths(config: Config, features: FeatureSet) -> None:
    limit = config.draft.max_position_embeddings
    if features.lengths is None or config.data.max_length <= limit:
        return
    too_long = np.flatnonzero(features.lengths > limit)
    if len(too_long):
        sample = features.samples[int(too_long[0])]
        length = min(sample["length"], config.data.max_length)
        raise UserError(
            f"{features.folder}: sample {sample['id']} has {length} tokens, beyond the draft's "
            f"max_position_embeddings = {limit}; set data.max_length={limit}"
        )


def _check_trained(
    config: Config, features: FeatureSet, kept: list[int], align_mask: AlignMask
) -> None:
    """Refuse data whose first samples train no row at all."""
    looked_at = kept[:_SAMPLES_CHECKED]
    if _any_row(config, features, looked_at, align_mask):
        return
    raise UserError(
        f"{features.folder}: no row to train in the first {len(looked_at)} samples, cut to "
        f"data.max_length = {config.data.max_length}; raise it, or extract conversations with "
        "longer answers"
    )


def _check_evaluated(
    config: Config, features: FeatureSet, held_out: list[int], align_mask: AlignMask
) -> None:
    """Refuse held-out samples of which no row counts: every draft would have the same value."""
    if not held_out or _any_row(config, features, held_out, align_mask):
        return
    raise UserError(
        f"data.held_out = {len(held_out)}: no supervised row in these last samples of "
        f"{features.folder}, cut to data.max_length = {config.data.max_length}; hold out more "
        "samples, raise data.max_length, or set data.held_out=0"
    )


def _any_row(
    config: Config, features: FeatureSet, numbers: list[int], align_mask: AlignMask
) -> bool:
    """Whether any of these samples has a supervised row."""
    for number in numbers:
        _, token_mask = read_tokens(features, number)
        if align_mask(token_mask[: config.data.max_length]).any():
            return True
    return False


def fingerprints(features: FeatureSet, vocab_map: VocabMap) -> dict[str, str]:
    """Hashes of what a run reads: the feature index and the vocabulary map.

    The shards' own hashes are left out, and the index's, which depends on them, so that a damaged
    shard may be extracted again. Files of a `Reader` have no index: their names and sizes stand in
    for it. What is known of how features are made on demand is there too (`changes.MADE_WITH`).
    """
    left_out = ("shards", "totals", "sha256")
    index: Any = {key: value for key, value in features.index.items() if key not in left_out}
    if not index:
        index = [
            (sample["id"], (features.folder / sample["shard"]).stat().st_size)
            for sample in features.samples
        ]
    text = json.dumps(index, sort_keys=True).encode()
    tokens = vocab_map.t2d.cpu().numpy().tobytes()
    return {
        FEATURES: hashlib.sha256(text).hexdigest(),
        "vocabulary map": hashlib.sha256(tokens).hexdigest(),
        **made_with(features.made_with),
    }

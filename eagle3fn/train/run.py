"""What stays the same during a run: configuration, frozen tensors, samples; checked before the first step."""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch.distributed.device_mesh import DeviceMesh

from eagle3fn.base.config import Config, to_dict
from eagle3fn.base.device import send
from eagle3fn.base.errors import UserError
from eagle3fn.base.tree import tree_map
from eagle3fn.base.types import Frozen, VocabMap
from eagle3fn.data.collate import align_mask
from eagle3fn.data.features import FeatureSet, read_tokens
from eagle3fn.data.pipeline import split
from eagle3fn.data.target import TargetTensors
from eagle3fn.train.bind import Functions, bind
from eagle3fn.train.launch import World
from eagle3fn.train.memory import check_fits, memory_of
from eagle3fn.train.reduce import check_ranks

T = TypeVar("T")
_LOOKED_AT = 100


class Run(NamedTuple):
    """Everything that stays the same during a run."""

    config: Config
    frozen: Frozen
    fns: Functions
    features: FeatureSet
    train: list[int]
    held_out: list[int]
    out: Path
    data: dict[str, str]  # hashes of features and vocabulary map
    device: str  # this rank's
    world: World = World()
    mesh: DeviceMesh | None = None


def prepare(
    config: Config,
    features: FeatureSet,
    vocab_map: VocabMap,
    target: TargetTensors,
    out: str | Path,
    world: World = World(),  # noqa: B008
) -> Run:
    """Check that all parts fit together, on all ranks alike, and bind the functions.

    Raises:
        UserError: tensors that don't fit the configuration, a device that is not there, samples beyond the position
            limit, none to train on, or none with a trained row; a number of ranks that the global batch or
            `train.reduce` does not fit, or ranks that were started differently.
    """
    check_world(config, world)
    device, tied = (
        check_device(world.device(config.train.device)),
        target.head is target.embed_tokens,
    )
    check_fits(config, world.size, memory_of(device), f"the memory of {device}", tied)
    own = config.draft.hidden_size != config.draft.target_hidden_size
    dtype = getattr(torch, config.train.dtype)
    frozen = Frozen(
        None if own else target.embed_tokens.to(device, dtype),
        target.head.to(device, dtype),
        vocab_map.t2d.to(device),
        vocab_map.d2t.to(device),
    )
    kept, held_out = split(len(features.samples), config.data.held_out)
    _check_lengths(config, features)
    _check_trained(config, features, kept)
    mesh, data = world.mesh(device), fingerprints(features, vocab_map)
    world.agree(_settings(config) | data)
    fns = bind(config, frozen, mesh)
    return Run(config, frozen, fns, features, kept, held_out, Path(out), data, device, world, mesh)


def check_world(config: Config, world: World) -> None:
    """Refuse a number of ranks that cannot share every global batch alike.

    Raises:
        UserError: names the micro-batches of an update and the ranks.
    """
    data, size = config.data, world.size
    count = data.global_batch // data.micro_batch
    if count % size:
        raise UserError(
            f"data.global_batch = {data.global_batch} and data.micro_batch = {data.micro_batch} make {count} "
            f"micro-batches an update, {size} ranks must divide them; set data.global_batch to a multiple of "
            f"{size * data.micro_batch}, or start other ranks"
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


def check_device(name: str) -> str:
    """The name of a device that tensors can be made on.

    Raises:
        UserError: unknown, or not on this machine.
    """
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"device {name!r}: not usable here ({str(error).splitlines()[0]}); name another"
        ) from None
    return name


def _check_lengths(config: Config, features: FeatureSet) -> None:
    limit = config.draft.max_position_embeddings
    for sample in features.samples:
        length = min(sample.get("length", 0), config.data.max_length)
        if length > limit:
            raise UserError(
                f"{features.folder}: sample {sample['id']} has {length} tokens, beyond the draft's "
                f"max_position_embeddings = {limit}; set data.max_length={limit}"
            )


def _check_trained(config: Config, features: FeatureSet, kept: list[int]) -> None:
    """Refuse data whose first samples train no row at all."""
    data = config.data
    for number in kept[:_LOOKED_AT]:
        _, mask = read_tokens(features, number)
        if align_mask(mask[: data.max_length], data.mask_alignment).any():
            return
    raise UserError(
        f"{features.folder}: no row to train in the first {min(len(kept), _LOOKED_AT)} samples, cut to data.max_length"
        f" = {data.max_length}; raise it, or extract conversations with longer answers"
    )


def fingerprints(features: FeatureSet, vocab_map: VocabMap) -> dict[str, str]:
    """Hashes of what a run reads: the feature index and the vocabulary map.

    The shards' own hashes are left out, so that a damaged shard may be extracted again. Files of the older trainer
    have no index: their names and sizes stand in for it.
    """
    index: Any = {
        key: value for key, value in features.index.items() if key not in ("shards", "totals")
    }
    if not index:
        index = [
            (sample["id"], (features.folder / sample["shard"]).stat().st_size)
            for sample in features.samples
        ]
    text, tokens = json.dumps(index, sort_keys=True).encode(), vocab_map.t2d.cpu().numpy().tobytes()
    return {
        "features": hashlib.sha256(text).hexdigest(),
        "vocabulary map": hashlib.sha256(tokens).hexdigest(),
    }


def to_device(values: T, device: str) -> T:
    """The tree of tensors, such as a batch, with every tensor on `device`; on the way there the host does not wait."""
    return tree_map(lambda value: send(value, device), values)

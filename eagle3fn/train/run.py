"""What stays the same during a run: configuration, frozen tensors, samples; checked before the first step."""

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import torch

from eagle3fn.base.config import Config
from eagle3fn.base.errors import UserError
from eagle3fn.base.types import Batch, Frozen, VocabMap
from eagle3fn.data.collate import align_mask
from eagle3fn.data.features import FeatureSet, read_tokens
from eagle3fn.data.pipeline import split
from eagle3fn.data.target import TargetTensors
from eagle3fn.train.bind import Functions, bind

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
    data: str  # fingerprint of features and vocabulary map


def prepare(config: Config, features: FeatureSet, vocab_map: VocabMap, target: TargetTensors, out: str | Path) -> Run:
    """Check that all parts fit together and bind the functions.

    Raises:
        UserError: tensors that don't fit the configuration, a device that is not there, samples beyond the position
            limit, none to train on, or none with a trained row.
    """
    own = config.draft.hidden_size != config.draft.target_hidden_size
    dtype, device = getattr(torch, config.train.dtype), check_device(config.train.device)
    frozen = Frozen(
        None if own else target.embed_tokens.to(device, dtype),
        target.head.to(device, dtype),
        vocab_map.t2d.to(device),
        vocab_map.d2t.to(device),
    )
    kept, held_out = split(len(features.samples), config.data.held_out)
    _check_lengths(config, features)
    _check_trained(config, features, kept)
    fns = bind(config, frozen)
    return Run(config, frozen, fns, features, kept, held_out, Path(out), fingerprint(features, vocab_map))


def check_device(name: str) -> str:
    """The name of a device that tensors can be made on.

    Raises:
        UserError: unknown, or not on this machine.
    """
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r}: not usable here ({str(error).splitlines()[0]}); name another") from None
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


def fingerprint(features: FeatureSet, vocab_map: VocabMap) -> str:
    """Hash of what a run reads: the features' own fingerprint, their samples, and the vocabulary map.

    Files of the older trainer have no fingerprint of their own: their names and sizes stand in for it.
    """
    names = [sample["id"] for sample in features.samples]
    own = features.index.get("fingerprint")
    if not features.index:
        own = [(features.folder / sample["shard"]).stat().st_size for sample in features.samples]
    text = json.dumps([own, names])
    return hashlib.sha256(text.encode() + vocab_map.t2d.cpu().numpy().tobytes()).hexdigest()


def to_device(batch: Batch, device: str) -> Batch:
    """The batch with every tensor on `device`."""
    return Batch(*(None if value is None else value.to(device) for value in batch))  # pyright: ignore[reportArgumentType]

"""Refusals before any work: a batch that does not fit the parameters, the configuration or the
frozen tensors.
"""

from collections.abc import Callable, Collection

import torch
from torch import Tensor

from eagle3fn.base.config import Config, require
from eagle3fn.base.errors import UserError
from eagle3fn.base.tree import check_whole
from eagle3fn.base.types import Batch, Frozen, Params
from eagle3fn.model.losses import RowLoss, find_loss
from eagle3fn.model.table import check_params


def check_batch(params: Params, batch: Batch, config: Config, frozen: Frozen) -> None:
    """Check shapes and dtypes, without reading values (no device synchronisation).

    Raises:
        UserError: names the field, what it is and what it must be; or a `torch.autocast` is on.
    """
    draft = config.draft
    check_no_autocast(batch.input_ids.device.type)
    check_whole(params)
    check_params(params, draft)

    if batch.input_ids.ndim != 2:
        raise UserError(
            f"batch.input_ids has shape {tuple(batch.input_ids.shape)}; it must be (B, S)"
        )
    b, s = batch.input_ids.shape
    limit = draft.max_position_embeddings
    if s > limit:
        raise UserError(
            f"batch.input_ids: sequence length {s} is beyond max_position_embeddings = {limit}; "
            "lower data.max_length"
        )

    _shape("batch.attention_mask", batch.attention_mask, (b, s))
    _shape("batch.row_mask", batch.row_mask, (b, s))
    _shape("batch.aux_hidden", batch.aux_hidden, (b, s, 3 * draft.target_hidden_size))
    _shape("batch.last_hidden", batch.last_hidden, (b, s, draft.target_hidden_size))
    _shape("batch.position_ids", batch.position_ids, (b, s), (1, s))
    _shape("batch.row_counts", batch.row_counts, (config.objective.ttt_length,))

    for name, value in (("rows", batch.rows), ("labels", batch.labels)):
        if value is not None and value.ndim != 1:
            raise UserError(
                f"batch.{name} has shape {tuple(value.shape)}; it must have one axis (base.rows)"
            )
    for name in ("input_ids", "row_mask", "attention_mask", "position_ids", "rows", "labels"):
        _kind(f"batch.{name}", getattr(batch, name), torch.int64)
    for name in ("aux_hidden", "last_hidden"):
        if not getattr(batch, name).is_floating_point():
            raise UserError(
                f"batch.{name} has dtype {getattr(batch, name).dtype}; it must be floating point"
            )
    check_frozen(frozen, config)


def check_no_autocast(device: str) -> None:
    """Refuse to compute inside the caller's `torch.autocast`: it would give other numbers.

    Raises:
        UserError: it is on for this type of device.
    """
    # A device without values, "meta", has no autocast.
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        raise UserError(
            f"torch.autocast is on for {device!r}: the compute dtype is that of the parameters; "
            "call outside of it, "
            f"or inside torch.autocast({device!r}, enabled=False)"
        )


def check_frozen(frozen: Frozen, config: Config) -> None:
    """Check the frozen tensors' shapes against the configuration.

    Raises:
        UserError: names the field, what it is and what it must be.
    """
    draft = config.draft
    v, d = draft.vocab_size, draft.draft_vocab_size
    own = draft.target_hidden_size != draft.hidden_size
    if own != (frozen.embed_tokens is None):
        rule = (
            "must be None: the draft trains its own"
            if own
            else "is None: give the target's embedding"
        )
        raise UserError(f"frozen.embed_tokens {rule} (hidden_size {draft.hidden_size})")
    for name in ("target_head", "t2d", "d2t"):
        if getattr(frozen, name) is None:
            raise UserError(f"frozen.{name} is None: give the tensor")
    _shape("frozen.embed_tokens", frozen.embed_tokens, (v, draft.hidden_size))
    _shape("frozen.target_head", frozen.target_head, (v, draft.target_hidden_size))
    _shape("frozen.target_norm", frozen.target_norm, (draft.target_hidden_size,))
    _shape("frozen.t2d", frozen.t2d, (v,))
    _shape("frozen.d2t", frozen.d2t, (d,))
    _kind("frozen.t2d", frozen.t2d, torch.bool)
    _kind("frozen.d2t", frozen.d2t, torch.int64)


def _kind(name: str, value: Tensor | None, dtype: torch.dtype) -> None:
    if value is not None and value.dtype != dtype:
        raise UserError(f"{name} has dtype {value.dtype}; it must be {dtype}")


def _shape(name: str, value: Tensor | None, *allowed: tuple[int, ...]) -> None:
    if value is not None and tuple(value.shape) not in allowed:
        raise UserError(f"{name} has shape {tuple(value.shape)}; it must be {allowed[0]}")


def check_loss(
    config: Config, batch_means: Collection[str] = (), own: RowLoss | Callable | None = None
) -> None:
    """Check that the loss is there, before any work.

    Args:
        config: `objective.loss` is read, and how `data` splits a batch.
        batch_means: see `train.recipe.Recipe`.
        own: a user's loss, in place of the named one.

    Raises:
        UserError: no such loss, or one with means over the whole batch where that is split.
    """
    name = config.objective.loss
    if own is not None or name not in batch_means:
        find_loss(config.objective, own)
        return
    data = config.data
    require(
        data.micro_batch == data.global_batch,
        "data.micro_batch",
        data.micro_batch,
        f"{data.global_batch}, all of data.global_batch: objective.loss = {name!r} has means over "
        "the whole batch",
    )


def check_micro_batches(
    batches: tuple[Batch, ...], config: Config, world: int = 1, batch_means: Collection[str] = ()
) -> None:
    """Check that micro-batches of one update can be summed, those of the other ranks included.

    Raises:
        UserError: none at all, several under a loss with means over the whole batch (one of
            `batch_means`), or several without `row_counts`.
    """
    if not batches:
        raise UserError("step: an empty tuple of micro-batches; give at least one Batch")
    count = len(batches) * world
    if count == 1:
        return

    objective = config.objective
    if objective.loss in batch_means:
        ranks = f" on {world} ranks" if world > 1 else ""
        raise UserError(
            f"step: {count} micro-batches{ranks} under objective.loss = {objective.loss!r}, with "
            "means over the whole batch; give one Batch on one rank, or set objective.loss to a "
            "loss by row, as 'lk'"
        )
    if objective.normalization == "mask" and any(batch.row_counts is None for batch in batches):
        raise UserError(
            "batch.row_counts is missing: with several micro-batches and objective.normalization = "
            "'mask' each must carry the global row counts (data.collate.global_row_counts)"
        )

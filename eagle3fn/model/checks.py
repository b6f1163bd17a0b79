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
    check_no_autocast(batch.next_ids.device.type)
    check_whole(params)
    check_params(params, draft)

    if batch.aux_hidden.ndim != 3:
        raise UserError(
            f"batch.aux_hidden has shape {tuple(batch.aux_hidden.shape)}; it must be (B, S, 3·Ht)"
        )
    b, s, _ = batch.aux_hidden.shape
    k = config.objective.ttt_length
    width = draft.target_hidden_size
    if s > draft.max_position_embeddings:
        raise UserError(
            f"batch.aux_hidden: sequence length {s} is beyond max_position_embeddings = "
            f"{draft.max_position_embeddings}; lower data.max_length"
        )

    # Each field's shapes and dtype; None: floating point, of any width.
    fields = {
        "next_ids": (torch.int64, (b, s + k - 1)),
        "attention_mask": (torch.int64, (b, s)),
        "row_mask": (torch.int64, (b, k, s)),
        "aux_hidden": (None, (b, s, 3 * width)),
        "label_hidden": (None, (b, s, width)),
        "position_ids": (torch.int64, (b, s), (1, s)),
        "row_counts": (None, (k,)),
    }
    for name, (dtype, *shapes) in fields.items():
        value = getattr(batch, name)
        _shape(f"batch.{name}", value, *shapes)
        _kind(f"batch.{name}", value, dtype)
    for name in ("rows", "labels"):
        value = getattr(batch, name)
        if value is not None and value.ndim != 1:
            raise UserError(
                f"batch.{name} has shape {tuple(value.shape)}; it must have one axis (base.rows)"
            )
        _kind(f"batch.{name}", value, torch.int64)
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
    own = draft.own_embedding
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


def _kind(name: str, value: Tensor | None, dtype: torch.dtype | None) -> None:
    if value is None:
        return
    if dtype is None and not value.is_floating_point():
        raise UserError(f"{name} has dtype {value.dtype}; it must be floating point")
    if dtype is not None and value.dtype != dtype:
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

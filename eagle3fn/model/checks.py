"""Refusals before any work: a batch that does not fit the parameters, the configuration or the
frozen tensors.
"""

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor

from eagle3fn.base.config import Config
from eagle3fn.base.errors import UserError
from eagle3fn.base.sections import require
from eagle3fn.base.tree import check_whole
from eagle3fn.base.types import Batch, Frozen, Params
from eagle3fn.model.losses import LOSSES, RowLoss
from eagle3fn.model.named_loss import check_read, find_loss
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

    width = draft.target_hidden_size
    _check("batch.aux_hidden", batch.aux_hidden, None, ("B", "S", draft.taps * width))
    b, s, _ = batch.aux_hidden.shape
    k = config.objective.ttt_length
    longest = _longest(batch)
    if longest > draft.max_position_embeddings:
        raise UserError(
            f"batch.aux_hidden: sequence length {longest} is beyond max_position_embeddings = "
            f"{draft.max_position_embeddings}; lower data.max_length"
        )

    _check("batch.next_ids", batch.next_ids, torch.int64, (b, s + k - 1))
    _check("batch.attention_mask", batch.attention_mask, torch.int64, (b, s))
    _check("batch.row_mask", batch.row_mask, torch.int64, (b, k, s))
    _check("batch.label_hidden", batch.label_hidden, None, (b, s, width))
    _check("batch.position_ids", batch.position_ids, torch.int64, (b, s), (1, s))
    _check("batch.row_counts", batch.row_counts, None, (k,))
    _check("batch.survives", batch.survives, torch.int64, (b, s))
    _check("batch.starts", batch.starts, torch.int64, (b, s))
    _check_packed(batch, config)
    check_frozen(frozen, config)


def _longest(batch: Batch) -> int:
    """Places of the longest conversation; without a plan of packed rows at least 1."""
    if batch.starts is None:
        return batch.aux_hidden.shape[1]
    if batch.plan is None or batch.plan.lengths is None:
        return 1
    return int(batch.plan.lengths.max())


def _check_packed(batch: Batch, config: Config) -> None:
    """Check what goes with `starts`."""
    if batch.plan is not None and (batch.plan.bounds is None) != (batch.starts is None):
        raise UserError(
            "batch.plan is not of batch.starts: make it by plan_rows(row_mask, survives, starts), "
            "or leave it out"
        )
    if batch.starts is None:
        return
    if batch.position_ids is None:
        raise UserError(
            "batch.position_ids is missing: with batch.starts each conversation's begin at 0 "
            "(data.collate.collate_packed)"
        )
    _refuse_all_rows(config, "batch.starts")


def _refuse_all_rows(config: Config, packed: str) -> None:
    """Refuse the normalization by all rows where conversations are packed."""
    if config.objective.normalization == "rows":
        raise UserError(
            f"objective.normalization = 'rows' with {packed}: it divides by padding too, which "
            "packed rows do not have; set objective.normalization = 'mask'"
        )


def check_no_autocast(device: str) -> None:
    """Refuse to compute inside the caller's `torch.autocast`: it would give other numbers.

    Raises:
        UserError: it is on for this type of device.
    """
    # A device without values, "meta", has no autocast.
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        raise UserError(
            f"torch.autocast is on for {device!r}: the compute dtype is that of the parameters; "
            f"call outside of it, or inside torch.autocast({device!r}, enabled=False)"
        )


def check_frozen(frozen: Frozen, config: Config) -> None:
    """Check the frozen tensors' shapes against the configuration.

    Raises:
        UserError: names the field, what it is and what it must be.
    """
    draft = config.draft
    v, d = draft.vocab_size, draft.draft_vocab_size
    width = draft.target_hidden_size
    if frozen.embed_tokens is None and not draft.own_embedding:
        raise UserError("frozen.embed_tokens is None: give the target's embedding")
    if frozen.embed_tokens is not None and draft.other_width:
        raise UserError(
            "frozen.embed_tokens must be None: the draft trains its own, of hidden_size "
            f"{draft.hidden_size}"
        )
    for name in ("target_head", "t2d", "d2t"):
        if getattr(frozen, name) is None:
            raise UserError(f"frozen.{name} is None: give the tensor")

    _check("frozen.embed_tokens", frozen.embed_tokens, None, (v, draft.hidden_size))
    _check("frozen.target_head", frozen.target_head, None, (v, width))
    _check("frozen.target_norm", frozen.target_norm, None, (width,))
    _check("frozen.t2d", frozen.t2d, torch.bool, (v,))
    _check("frozen.d2t", frozen.d2t, torch.int64, (d,))


def _check(
    name: str, value: Tensor | None, dtype: torch.dtype | None, *shapes: tuple[int | str, ...]
) -> None:
    """Check a tensor that is there: its dtype, None for any floating point, and its shape.

    It must have one of `shapes`, in which a letter is any size.
    """
    if value is None:
        return
    found = tuple(value.shape)
    if not any(_fits(found, shape) for shape in shapes):
        wanted = str(shapes[0]).replace("'", "")
        raise UserError(f"{name} has shape {found}; it must be {wanted}")
    if value.dtype != dtype and not (dtype is None and value.is_floating_point()):
        raise UserError(f"{name} has dtype {value.dtype}; it must be {dtype or 'floating point'}")


def _fits(found: tuple[int, ...], shape: tuple[int | str, ...]) -> bool:
    sizes = zip(found, shape, strict=False)
    return len(found) == len(shape) and all(isinstance(size, str) or size == n for n, size in sizes)


def check_loss(
    config: Config,
    batch_means: Mapping[str, tuple[str, ...]] | None = None,
    own: RowLoss | Callable | None = None,
) -> None:
    """Check that the loss is there, before any work.

    Args:
        config: `objective.loss` is read, and how `data` splits a batch.
        batch_means: see `train.recipe.Recipe`.
        own: a user's loss, in place of the named one.

    Raises:
        UserError: no such loss, a setting that it does not read, or one with means over the whole
            batch where that is split, or in a sum.
    """
    means = batch_means or {}
    name = config.objective.loss
    data = config.data
    for part in name if isinstance(name, Mapping) else ():
        if part in means:
            raise UserError(
                f"objective.loss.{part}: its means over the whole batch cannot be part of a sum of "
                f"losses by row; take one of {', '.join(map(repr, LOSSES))}"
            )
    if own is None and isinstance(name, str) and name in means:
        check_read(config.objective, means[name], f"objective.loss = {name!r}")
        whole = (
            f"all of data.global_batch: objective.loss = {name!r} has means over the whole batch"
        )
        holds = data.micro_batch == data.global_batch
        constraint = f"{data.global_batch}, {whole}"
        require(holds, "data.micro_batch", data.micro_batch, constraint)
        rate = config.objective.survival
        constraint = f"1 under objective.loss = {name!r}, whose means are of every row"
        require(rate == 1, "objective.survival", rate, constraint)
    else:
        find_loss(config.objective, own)


def check_packing(config: Config, batch_means: Collection[str] = ()) -> None:
    """Check that the objective can be computed on packed rows, where `data.pack_tokens` asks for
    them.

    Raises:
        UserError: under `objective.normalization = "rows"`, or a recipe with `batch_means`.
    """
    if not config.data.pack_tokens:
        return
    packed = f"data.pack_tokens = {config.data.pack_tokens}"
    _refuse_all_rows(config, packed)
    if batch_means:
        raise UserError(
            f"{packed} under a recipe whose losses are means over padded batches: set "
            "data.pack_tokens = 0, or train without the recipe"
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

"""The loss that a configuration names, or a user's own, as one function of logits and teacher."""

from collections.abc import Callable, Collection
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from eagle3fn.base.errors import UserError
from eagle3fn.base.named import check_arguments, find
from eagle3fn.base.sections import ObjectiveConfig
from eagle3fn.base.toml import as_override
from eagle3fn.model.losses import LOSSES, RowLoss

Loss = RowLoss | Callable[..., Tensor]
"""A loss, or its `value` alone: a function of `(logits, p_draft, p_full)`."""

_TEACHER = ("p_draft", "p_full")
_ARGUMENTS = ("logits", *_TEACHER)


def find_loss(objective: ObjectiveConfig, own: Loss | None = None) -> RowLoss:
    """The loss that `objective.loss` names, or a user's `own`, with its settings filled in.

    Args:
        objective: `loss` is a name of `LOSSES`, "module:function" for a function
            `(logits, p_draft, p_full) → (…,)`, all three `(…, D)` in at least fp32, or a table of
            such names with their weights.
        own: a loss, or such a function, in place of the named one.

    Returns:
        A loss whose functions take `p_draft` and `p_full` after the logits (and their softmax). A
        sum has a closed form if all of its parts have one.

    Raises:
        UserError: no such loss, a user's function of other arguments, or a setting that the loss
            does not read; or, when it is called, one that does not return one value a row.
    """
    if own is not None:
        loss = _row_loss(own, f"loss = {own!r}")
        check_read(objective, loss.needs, "the loss that was given")
        return _filled(loss, objective)

    named = objective.loss
    weights = {named: 1.0} if isinstance(named, str) else named
    losses = []
    for name in weights:
        loss = find(name, LOSSES, "objective.loss", _ARGUMENTS)
        losses.append(_row_loss(loss, f"objective.loss = {name!r}"))
    read = {need for loss in losses for need in loss.needs}
    check_read(objective, read, f"objective.loss = {named!r}")

    filled = [_filled(loss, objective) for loss in losses]
    return filled[0] if isinstance(named, str) else _sum_of(filled, list(weights.values()))


def _row_loss(loss: Loss, given: str) -> RowLoss:
    """A loss, or a function as one; `given` names it in errors."""
    if not isinstance(loss, RowLoss):
        check_arguments(loss, _ARGUMENTS, given)
        return RowLoss(loss)
    for name in loss.needs:
        if name not in {*_TEACHER, *(field.name for field in fields(ObjectiveConfig))}:
            raise UserError(
                f"the loss needs {name!r}; it must be p_draft, p_full or a setting of [objective]"
            )
    return loss


def check_read(objective: ObjectiveConfig, read: Collection[str], named: str) -> None:
    """Refuse a loss's setting that differs from its default where the loss does not read it.

    Args:
        objective: the settings.
        read: those that the loss reads.
        named: names the loss in errors.
    """
    for field in fields(objective):
        readers = [repr(name) for name, loss in LOSSES.items() if field.name in loss.needs]
        value = getattr(objective, field.name)
        if readers and field.name not in read and value != field.default:
            raise UserError(
                f"objective.{field.name} = {value!r}: {named} does not read it; set "
                f"{as_override(f'objective.{field.name}', field.default)}, its default, or "
                f"objective.loss = {' or '.join(readers)}"
            )


def _filled(loss: RowLoss, objective: ObjectiveConfig) -> RowLoss:
    """The loss as functions of logits and teacher alone, which check what it returns."""

    def needed(p_draft: Tensor, p_full: Tensor) -> list:
        given = vars(objective) | {"p_draft": p_draft, "p_full": p_full}
        return [given[name] for name in loss.needs]

    def value(logits: Tensor, p_draft: Tensor, p_full: Tensor) -> Tensor:
        before = _versions(p_draft, p_full)
        rows = loss.value(logits, *needed(p_draft, p_full))
        _check_rows(rows, logits.shape[:-1], "one value a row")
        if _versions(p_draft, p_full) != before:
            raise UserError("the loss wrote into p_draft or p_full, which others read; copy them")
        return rows

    def closed(logits: Tensor, draft: Tensor, *teacher: Tensor) -> tuple[Tensor, Tensor]:
        assert loss.closed is not None
        pair = loss.closed(logits, draft, *needed(*teacher))
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise UserError(
                f"the loss's closed form returned {type(pair).__name__}; it must be a pair"
            )
        _check_rows(pair[0], logits.shape[:-1], "one value a row")
        _check_rows(pair[1], logits.shape, "the gradient by the logits")
        return pair

    return RowLoss(value, loss.closed and closed, kernel=loss.kernel)


def _sum_of(losses: list[RowLoss], weights: list[float]) -> RowLoss:
    """`Σ weight · loss` of losses that `_filled` returned."""

    def value(logits: Tensor, *teacher: Tensor) -> Tensor:
        rows = torch.zeros_like(logits[..., 0])
        for loss, weight in zip(losses, weights, strict=True):
            rows = rows + weight * loss.value(logits, *teacher)
        return rows

    def closed(logits: Tensor, draft: Tensor, *teacher: Tensor) -> tuple[Tensor, Tensor]:
        values = torch.zeros_like(logits[..., 0])
        gradient = torch.zeros_like(logits)
        for loss, weight in zip(losses, weights, strict=True):
            assert loss.closed is not None
            # A part may write over the softmax, which the next one reads.
            part, slope = loss.closed(logits, draft.clone(), *teacher)
            values.add_(part, alpha=weight)
            gradient.add_(slope, alpha=weight)
        return values, gradient

    return RowLoss(value, closed if all(loss.closed for loss in losses) else None)


def _check_rows(found: Any, shape: tuple[int, ...], what: str) -> None:
    """Refuse what a loss returned if it is no floating-point tensor of this shape."""
    if isinstance(found, Tensor) and found.shape == shape and found.is_floating_point():
        return
    is_tensor = isinstance(found, Tensor)
    kind = f"shape {tuple(found.shape)}, {found.dtype}" if is_tensor else type(found).__name__
    raise UserError(f"the loss returned {kind}; it must be floating point {tuple(shape)}, {what}")


def _versions(*tensors: Tensor) -> list[int]:
    """How often each was written into; inference tensors don't count it."""
    return [0 if x.is_inference() else x._version for x in tensors]

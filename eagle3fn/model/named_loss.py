"""The loss that a configuration names, or a user's own, as one function of logits and teacher."""

import math
from collections.abc import Callable, Collection
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from eagle3fn.base.config import Config
from eagle3fn.base.dtypes import at_least_fp32
from eagle3fn.base.errors import UserError
from eagle3fn.base.grad import value_and_grad
from eagle3fn.base.named import call_own, check_arguments, find
from eagle3fn.base.sections import ObjectiveConfig
from eagle3fn.base.toml import as_override
from eagle3fn.model.losses import LOSSES, RowLoss

Loss = RowLoss | Callable[..., Tensor]
"""A loss, or its `value` alone: a function of `(logits, p_draft, p_full)`."""

_TEACHER = ("p_draft", "p_full")
_ARGUMENTS = ("logits", *_TEACHER)
_GIVEN = "the loss that was given"
_WANTED = "it must be torch operations that write into no argument"


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
        loss = _own_loss(own, _GIVEN)
        check_read(objective, loss.needs, _GIVEN)
        return _filled(loss, objective, _GIVEN)

    named = objective.loss
    weights = {named: 1.0} if isinstance(named, str) else named
    losses = {}
    for name in weights:
        loss = find(name, LOSSES, "objective.loss", _ARGUMENTS)
        losses[name] = loss if name in LOSSES else _own_loss(loss, f"objective.loss = {name!r}")
    read = {need for loss in losses.values() for need in loss.needs}
    check_read(objective, read, f"objective.loss = {named!r}")

    filled = [
        _filled(loss, objective, f"objective.loss = {name!r}") for name, loss in losses.items()
    ]
    return filled[0] if isinstance(named, str) else _sum_of(filled, list(weights.values()))


def try_loss(config: Config, device: torch.device, own: Loss | None = None) -> None:
    """Call a user's loss and its gradient once, on a few made-up rows, before any work.

    Args:
        config: names the loss; its rows have the form of a run's.
        device: of the run.
        own: a user's loss, in place of the named one.

    Raises:
        UserError: the loss fails, does not return one value a row, writes into an argument, or has
            no gradient by the logits.
    """
    objective = config.objective
    loss = find_loss(objective, own)
    given = _GIVEN if own is not None else f"objective.loss = {objective.loss!r}"

    # Rows as the numerics have them, each other than the next.
    rows = (2, 3) if objective.numerics == "plain" else (6,)
    shape = (*rows, config.draft.draft_vocab_size)
    dtype = at_least_fp32(getattr(torch, config.train.dtype))
    logits = torch.arange(math.prod(shape), dtype=dtype, device=device).sin().view(shape)

    def teacher(logits: Tensor) -> tuple[Tensor, Tensor]:
        p_draft = torch.softmax(-logits.detach(), -1)
        return p_draft, 0.9 * p_draft

    def total(logits: Tensor) -> Tensor:
        found = loss.value(logits, *teacher(logits))
        if not found.requires_grad:
            raise UserError(
                f"{given}: has no gradient by the logits, so that it would train nothing; make it "
                "of differentiable operations on them"
            )
        return found.sum()

    call_own(value_and_grad(total), (logits,), f"{given}: the gradient of the function", _WANTED)
    if loss.closed is not None:
        loss.closed(logits, torch.softmax(logits, -1), *teacher(logits))


def _own_loss(loss: Loss, given: str) -> RowLoss:
    """A user's loss, or function as one, whose errors name it as `given`."""
    if not isinstance(loss, RowLoss):
        check_arguments(loss, _ARGUMENTS, given)
        loss = RowLoss(loss)
    for name in loss.needs:
        if name not in {*_TEACHER, *(field.name for field in fields(ObjectiveConfig))}:
            raise UserError(
                f"{given}: needs {name!r}; it must be p_draft, p_full or a setting of [objective]"
            )

    value, closed = loss.value, loss.closed

    def own_value(*arguments: Any) -> Tensor:
        return call_own(value, arguments, f"{given}: the function", _WANTED)

    def own_closed(*arguments: Any) -> tuple[Tensor, Tensor]:
        assert closed is not None
        return call_own(closed, arguments, f"{given}: its closed form", _WANTED)

    return loss._replace(value=own_value, closed=closed and own_closed)


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


def _filled(loss: RowLoss, objective: ObjectiveConfig, given: str) -> RowLoss:
    """The loss as functions of logits and teacher alone, which check what it returns."""

    def needed(p_draft: Tensor, p_full: Tensor) -> list:
        settings = vars(objective) | {"p_draft": p_draft, "p_full": p_full}
        return [settings[name] for name in loss.needs]

    def value(logits: Tensor, p_draft: Tensor, p_full: Tensor) -> Tensor:
        before = _versions(p_draft, p_full)
        rows = loss.value(logits, *needed(p_draft, p_full))
        _check_rows(rows, logits.shape[:-1], f"{given}: the function", "one value a row")
        if _versions(p_draft, p_full) != before:
            raise UserError(f"{given}: wrote into p_draft or p_full, which others read; copy them")
        return rows

    def closed(logits: Tensor, draft: Tensor, *teacher: Tensor) -> tuple[Tensor, Tensor]:
        assert loss.closed is not None
        pair = loss.closed(logits, draft, *needed(*teacher))
        returned = f"{given}: its closed form"
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise UserError(f"{returned} returned {type(pair).__name__}; it must be a pair")
        _check_rows(pair[0], logits.shape[:-1], returned, "one value a row")
        _check_rows(pair[1], logits.shape, returned, "the gradient by the logits")
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


def _check_rows(found: Any, shape: tuple[int, ...], given: str, what: str) -> None:
    """Refuse what a loss returned if it is no floating-point tensor of this shape."""
    if isinstance(found, Tensor) and found.shape == shape and found.is_floating_point():
        return
    is_tensor = isinstance(found, Tensor)
    kind = f"shape {tuple(found.shape)}, {found.dtype}" if is_tensor else type(found).__name__
    raise UserError(
        f"{given} returned {kind}; it must be a floating-point tensor {tuple(shape)}, {what}"
    )


def _versions(*tensors: Tensor) -> list[int]:
    """How often each was written into; inference tensors don't count it."""
    return [0 if x.is_inference() else x._version for x in tensors]

"""`forward_loss(params, batch) → (loss, aux)`: the EAGLE-3 objective as one pure function."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import optree
import torch
from torch import Tensor

from eagle3fn.base.config import Config
from eagle3fn.base.types import Aux, Batch, Frozen, Params
from eagle3fn.model.autograd import differentiable_once, is_mapped
from eagle3fn.model.checks import check_batch
from eagle3fn.model.fast import FAST
from eagle3fn.model.losses import Loss, RowLoss, find_loss
from eagle3fn.model.plain import PLAIN
from eagle3fn.model.unroll import Ops, unroll

NUMERICS = {"plain": PLAIN, "fast": FAST}
"""The operations that `objective.numerics` names."""


class ForwardLoss(Protocol):
    """A loss of one micro-batch and its metrics, as `forward_loss`."""

    def __call__(
        self, params: Params, batch: Batch, *, config: Config, frozen: Frozen, loss: Any = None
    ) -> tuple[Tensor, Aux]:
        """Scalar loss, and metrics without gradient."""
        ...


def forward_loss(
    params: Params,
    batch: Batch,
    *,
    config: Config,
    frozen: Frozen,
    loss: Loss | None = None,
) -> tuple[Tensor, Aux]:
    """The training loss of one micro-batch, `Σ_i decay^i · L_i` over unroll steps `i`, and its
    metrics.

    Args:
        params: the draft's tensors in the compute dtype (`model.table.shapes`).
        batch: see `Batch`; padding on the right.
        config: `draft` and `objective` are read; `objective.numerics` chooses the operations.
        frozen: target embedding, head and vocabulary map.
        loss: a loss by row of your own, in place of `objective.loss`; see `find_loss`.

    Returns:
        Scalar loss (fp32, or fp64 for fp64 parameters), and `Aux` without gradient.

    Under `torch.func.vmap` the plain operations are batched; the fast ones run once for each
    entry, forward and backward, and their backward makes the forward again.

    Raises:
        UserError: shapes, dtypes or values that don't fit together, or a `torch.autocast` around
            the call; it names the field.
    """
    check_batch(params, batch, config, frozen)
    row_loss = find_loss(config.objective, loss)
    ops = NUMERICS[config.objective.numerics]
    if ops is FAST and is_mapped((params, batch, frozen)):
        return _entry_by_entry(params, batch, config, frozen, row_loss)
    return forward(params, batch, config, frozen, ops, row_loss)


def forward(
    params: Params, batch: Batch, config: Config, frozen: Frozen, ops: Ops, loss: RowLoss | None
) -> tuple[Tensor, Aux]:
    """`forward_loss` by given operations, without its checks."""
    plan = ops.plan(batch)
    states = unroll(params, batch, plan.rows, config, frozen, ops)
    return ops.score(params, states, plan, batch, config, frozen, loss)


# `vmap` over the fast operations, which read the rows on the host: one call for each entry.


class _Call(NamedTuple):
    leaves: tuple[Tensor, ...]
    function: Callable[..., tuple[Tensor, Aux]]  # of the leaves


class _Scored(NamedTuple):
    loss: Tensor
    losses: Tensor  # from here on the fields of `Aux`
    correct: Tensor
    rows: Tensor
    accept: Tensor
    accept_rows: Tensor
    greedy: Tensor
    sampled: Tensor


def _entry_by_entry(
    params: Params, batch: Batch, config: Config, frozen: Frozen, loss: RowLoss
) -> tuple[Tensor, Aux]:
    tree: Any = (params, batch, frozen)
    leaves, treespec = optree.tree_flatten(tree)

    def function(*leaves: Tensor) -> tuple[Tensor, Aux]:
        entry: Any = optree.tree_unflatten(treespec, leaves)
        params, batch, frozen = entry
        return forward(params, batch, config, frozen, FAST, loss)

    loss_value, *aux = _mapped(_Call(tuple(leaves), function))
    return loss_value, Aux(*aux)


def _mapped_forward(call: _Call) -> _Scored:
    loss, aux = call.function(*call.leaves)
    return _Scored(loss, *aux)


def _mapped_backward(call: _Call, outputs: _Scored, grads: _Scored) -> dict[str, Any]:
    """The forward again, and its gradient by every floating-point leaf."""
    places = [i for i, leaf in enumerate(call.leaves) if leaf.is_floating_point()]

    def loss_of(*floats: Tensor) -> Tensor:
        leaves = list(call.leaves)
        for place, leaf in zip(places, floats, strict=True):
            leaves[place] = leaf
        return call.function(*leaves)[0]

    _, pull_back, *_ = torch.func.vjp(loss_of, *(call.leaves[place] for place in places))
    found: list[Tensor | None] = [None] * len(call.leaves)
    for place, grad in zip(places, pull_back(grads.loss), strict=True):
        found[place] = grad
    return {"leaves": found}


_mapped = differentiable_once(
    _mapped_forward,
    _mapped_backward,
    inputs=_Call,
    outputs=_Scored,
    without_gradient=Aux._fields,
)

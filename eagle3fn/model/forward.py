"""`forward_loss(params, batch) → (loss, aux)`: the EAGLE-3 objective as one pure function."""

from typing import Protocol

from torch import Tensor

from eagle3fn.base.config import Config
from eagle3fn.base.entries import entry_by_entry, is_mapped
from eagle3fn.base.types import Aux, Batch, Frozen, Params
from eagle3fn.model.checks import check_batch
from eagle3fn.model.fast import FAST
from eagle3fn.model.losses import RowLoss
from eagle3fn.model.named_loss import Loss, find_loss
from eagle3fn.model.plain import PLAIN
from eagle3fn.model.unroll import Ops, Rows, unroll

NUMERICS = {"plain": PLAIN, "fast": FAST}
"""The operations that `objective.numerics` names."""

_NO_OTHER = "one backward derivative alone here; for others use objective.numerics = 'plain'"


class ForwardLoss(Protocol):
    """A loss of one micro-batch and its metrics, as `forward_loss`."""

    def __call__(
        self, params: Params, batch: Batch, *, config: Config, frozen: Frozen
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

    def function(params: Params, batch: Batch, frozen: Frozen) -> tuple[Tensor, Aux]:
        return forward(params, batch, config, frozen, ops, row_loss)

    # The fast operations read their rows on the host: under `vmap` entry by entry.
    if ops is FAST and is_mapped((params, batch, frozen)):
        function = entry_by_entry(function, _NO_OTHER, once=True)
    return function(params, batch, frozen)


def forward(
    params: Params, batch: Batch, config: Config, frozen: Frozen, ops: Ops, loss: RowLoss | None
) -> tuple[Tensor, Aux]:
    """`forward_loss` by given operations, without its checks."""
    plan = ops.plan(batch)
    rows = None
    if plan is not None:
        batch = batch._replace(plan=plan)
        rows = Rows(plan.rows, plan.sizes)
    states = unroll(params, batch, rows, config, frozen, ops)
    return ops.score(params, states, plan, batch, config, frozen, loss)

"""SpecForge's arithmetic, operation by operation: the plain unroll with SpecForge's loss.

The plain unroll has SpecForge's order of operations. On the CPU, and in fp64, that loss is the
plain expression. On CUDA SpecForge runs a Triton kernel, and so does this.
"""

import torch
from torch import Tensor

from eagle3fn.base.config import Config
from eagle3fn.base.types import Aux, Batch, Frozen, Params
from eagle3fn.model.checks import check_batch
from eagle3fn.model.forward import Operations, forward_plain
from eagle3fn.model.losses import KL, kl_loss
from eagle3fn.model.table import FC


def kl_on(device: torch.device, dtype: torch.dtype) -> KL:
    """The KL that SpecForge computes on a device, for logits of this dtype."""
    if device.type == "cuda" and dtype != torch.float64:
        # Imported here: it needs Triton.
        from eagle3fn.specforge.kl_kernel import mean_kl

        return mean_kl
    return kl_loss


def operations_on(device: torch.device, dtype: torch.dtype) -> Operations:
    """What SpecForge's `sdpa` backend computes on a device, for parameters of this dtype."""
    return Operations(kl=kl_on(device, dtype))


def forward_loss(
    params: Params, batch: Batch, *, config: Config, frozen: Frozen
) -> tuple[Tensor, Aux]:
    """`eagle3fn.forward_loss` by SpecForge's arithmetic; `objective.numerics` is not read.

    Raises:
        UserError: as `eagle3fn.forward_loss`.
    """
    check_batch(params, batch, config, frozen)
    operations = operations_on(batch.aux_hidden.device, params[FC].dtype)
    return forward_plain(params, batch, config=config, frozen=frozen, operations=operations)

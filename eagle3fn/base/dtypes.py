"""Where numbers need more than the compute dtype: norms, softmax, losses, masters, sums of
gradients.
"""

import torch
from torch import Tensor


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    """fp32 for narrower dtypes; fp64 stays."""
    return torch.promote_types(dtype, torch.float32)


def wide(x: Tensor) -> Tensor:
    """A tensor in at least fp32; fp64 stays."""
    return x.to(at_least_fp32(x.dtype))

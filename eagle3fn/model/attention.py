"""Attention over the unroll: step 0's keys are a causal block, every later step adds one key to its
own row.
"""

import math

import torch
from torch import Tensor

from eagle3fn.base.dtypes import at_least_fp32


def block_mask(attention_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive mask `(B, 1, S, S)` of step 0's block from `(B, S)` ones on real tokens.

    `dtype`'s most negative finite value where the key is later than the query, and again where it
    is padding; both together overflow to -inf.
    """
    s = attention_mask.shape[1]
    low = torch.finfo(dtype).min
    zero = torch.zeros((), dtype=dtype, device=attention_mask.device)

    later = torch.ones(s, s, dtype=torch.bool, device=attention_mask.device).triu(1)
    padding = (attention_mask == 0)[:, None, None, :]
    return zero.masked_fill(padding, low) + zero.masked_fill(later, low)


def unrolled_attention(q: Tensor, keys: list[Tensor], values: list[Tensor], mask: Tensor) -> Tensor:
    """Attention at unroll step `len(keys) - 1` of queries `(B, N, R, E)`.

    The result has the same shape.

    `keys[0]` `(B, N, S, E)` is the block, masked by `mask` `(B, 1, R, S)`. Of each later step's
    keys `(B, N, R, E)` a row sees its own entry alone, unmasked. One softmax over both parts, in at
    least fp32.
    """
    scale = math.sqrt(q.shape[-1])
    s = keys[0].shape[2]

    # Scores against the block (B, N, R, S), then one column (B, N, R, 1) for each later step.
    scores = torch.matmul(q, keys[0].transpose(2, 3)) / scale + mask
    own_scores = [(q * key).sum(-1, keepdim=True) / scale for key in keys[1:]]

    scores = torch.cat([scores, *own_scores], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=at_least_fp32(q.dtype)).to(q.dtype)

    # The block's values, then each later step's, added in their order.
    out = torch.matmul(weights[..., :s], values[0])
    for i, value in enumerate(values[1:]):
        out = out + weights[..., s + i, None] * value
    return out

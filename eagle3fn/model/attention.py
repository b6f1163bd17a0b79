"""Attention over the unroll: step 0's keys are a causal block, every later step adds one key to its own row."""

import math

import torch
from torch import Tensor

from eagle3fn.model.layers import at_least_fp32


def block_mask(attention_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive mask `(B, 1, S, S)` of step 0's block from `(B, S)` ones on real tokens.

    `dtype`'s most negative finite value where the key is later than the query, and again where it is padding;
    both together overflow to -inf, as in the old tool.
    """
    s, low = attention_mask.shape[1], torch.finfo(dtype).min
    zero = torch.zeros((), dtype=dtype, device=attention_mask.device)
    later = torch.ones(s, s, dtype=torch.bool, device=attention_mask.device).triu(1)
    padding = (attention_mask == 0)[:, None, None, :]
    return zero.masked_fill(padding, low) + zero.masked_fill(later, low)


def unrolled_attention(q: Tensor, keys: list[Tensor], values: list[Tensor], mask: Tensor) -> Tensor:
    """Attention at unroll step `len(keys) - 1` of queries `(B, N, R, E)`; the result has the same shape.

    `keys[0]` `(B, N, S, E)` is the block, masked by `mask` `(B, 1, R, S)`; a row also sees its own entry of each
    later key `(B, N, R, E)`, unmasked.
    One softmax over both parts, in fp32. The order of operations is the old `sdpa` backend's.
    """
    scale, s = math.sqrt(q.shape[-1]), keys[0].shape[2]
    scores = torch.matmul(q, keys[0].transpose(2, 3)) / scale + mask
    own = [(q * key).sum(-1, keepdim=True) / scale for key in keys[1:]]
    weights = torch.softmax(
        torch.cat([scores, *own], dim=-1), dim=-1, dtype=at_least_fp32(q.dtype)
    ).to(q.dtype)
    out = torch.matmul(weights[..., :s], values[0])
    for i, value in enumerate(values[1:]):
        out = out + weights[..., s + i, None] * value
    return out

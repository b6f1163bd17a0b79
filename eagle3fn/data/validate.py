"""What is wrong with a sample's tensors, in words; None if nothing is."""

import math

import torch
from torch import Tensor

LARGEST = 1e12
"""The largest feature: in fp32 a row's norm, its square and 1 / norm³ are normal numbers."""


def token_fault(
    ids: Tensor, mask: Tensor, length: int | None = None, vocab_size: int | None = None
) -> str | None:
    """The fault of a sample's `input_ids` and `token_mask`.

    Both must be `(S,)` int64 and not empty, ids in [0, V), the mask 0 or 1. `length` is S and
    `vocab_size` V, where they are known.
    """
    same_shape = ids.ndim == 1 and ids.shape == mask.shape
    if not same_shape or len(ids) == 0 or length not in (None, len(ids)):
        found = f"input_ids {tuple(ids.shape)} and token_mask {tuple(mask.shape)}"
        return f"{found}: both must be ({length or 'S'},)"
    if ids.dtype != torch.int64 or mask.dtype != torch.int64:
        return f"input_ids {ids.dtype} and token_mask {mask.dtype}: both must be int64"

    lowest = int(ids.min())
    highest = int(ids.max())
    limit = vocab_size or "V"
    if lowest < 0:
        return f"token id {lowest}: must be in [0, {limit})"
    if vocab_size is not None and highest >= vocab_size:
        return f"token id {highest}: must be in [0, {limit})"

    if ((mask != 0) & (mask != 1)).any():
        return "token_mask holds values other than 0 and 1"
    return None


def hidden_fault(
    aux: Tensor, last: Tensor, length: int, taps: int, size: int | None, dtype: str | None
) -> str | None:
    """The fault of a sample's `aux_hidden` and `last_hidden`.

    They must be `(S, A·Ht)` and `(S, Ht)`, finite, in one floating-point dtype. `length` is S,
    `taps` A; `size`, Ht, and `dtype`, as in "bfloat16", where they are known.
    """
    size = size or last.shape[-1]
    if aux.shape != (length, taps * size) or last.shape != (length, size):
        found = f"aux_hidden {tuple(aux.shape)}, last_hidden {tuple(last.shape)}"
        return f"{found}: must be ({length}, {taps * size}), ({length}, {size})"

    dtype = dtype or str(last.dtype).removeprefix("torch.")
    right = str(aux.dtype) == str(last.dtype) == f"torch.{dtype}"
    if not right or not last.is_floating_point():
        return f"aux_hidden {aux.dtype}, last_hidden {last.dtype}: both must be {dtype}"

    for name, value in (("aux_hidden", aux), ("last_hidden", last)):
        # Of all values at once, as NaN and infinity reach an end; where one is, a token is named.
        largest = max(abs(end) for end in torch.stack(value.aminmax()).tolist())
        if not math.isfinite(largest):
            row = int((~value.isfinite()).any(-1).nonzero()[0])
            return f"{name} holds NaN or infinity at token {row}"
        if largest > LARGEST:
            row = int((value.abs() > LARGEST).any(-1).nonzero()[0])
            return (
                f"{name} holds {largest:.1e} at token {row}: must be within {LARGEST:.0e}, beyond "
                "which a norm is wrong in float32"
            )
    return None

"""What is wrong with a sample's tensors, in words; None if nothing is."""

import torch
from torch import Tensor


def token_fault(
    ids: Tensor, mask: Tensor, length: int | None = None, vocab_size: int | None = None
) -> str | None:
    """The fault of `input_ids` and `token_mask`: both must be `(S,)` int64, not empty, ids below V, the mask 0 or 1.

    `length` is S and `vocab_size` V, where they are known.
    """
    if ids.ndim != 1 or ids.shape != mask.shape or len(ids) == 0 or length not in (None, len(ids)):
        return f"input_ids {tuple(ids.shape)} and token_mask {tuple(mask.shape)}: both must be ({length or 'S'},)"
    if ids.dtype != torch.int64 or mask.dtype != torch.int64:
        return f"input_ids {ids.dtype} and token_mask {mask.dtype}: both must be int64"
    worst = int(ids.max()) if int(ids.min()) >= 0 else int(ids.min())
    if worst < 0 or (vocab_size is not None and worst >= vocab_size):
        return f"token id {worst}: must be in [0, {vocab_size or 'V'})"
    if ((mask != 0) & (mask != 1)).any():
        return "token_mask holds values other than 0 and 1"
    return None


def hidden_fault(
    aux: Tensor, last: Tensor, length: int, size: int | None, dtype: str | None
) -> str | None:
    """The fault of `aux_hidden` and `last_hidden`: they must be `(S, 3·Ht)` and `(S, Ht)`, finite, in one dtype.

    `length` is S; `size`, Ht, and `dtype` where they are known.
    """
    size = size or last.shape[-1]
    if aux.shape != (length, 3 * size) or last.shape != (length, size):
        found = f"aux_hidden {tuple(aux.shape)}, last_hidden {tuple(last.shape)}"
        return f"{found}: must be ({length}, {3 * size}), ({length}, {size})"
    wanted = dtype or str(last.dtype).removeprefix("torch.")
    if not last.is_floating_point() or any(str(x.dtype) != f"torch.{wanted}" for x in (aux, last)):
        return f"aux_hidden {aux.dtype}, last_hidden {last.dtype}: both must be {wanted}"
    for name, value in (("aux_hidden", aux), ("last_hidden", last)):
        if not value.isfinite().all():
            row = int((~value.isfinite()).any(-1).nonzero()[0])
            return f"{name} holds NaN or infinity at token {row}"
    return None

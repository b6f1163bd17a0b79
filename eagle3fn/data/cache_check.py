"""Can the target's cache do what decoding asks of it? Found by a short run, not by a list.

Recurrent layers keep a state that cannot be rolled back, nor always be cut to some rows of a batch.
"""

from typing import Any

import torch
from torch import Tensor

from eagle3fn.base.errors import UserError
from eagle3fn.data.target import cache_name, empty_cache
from eagle3fn.data.target_model import nan_named

_STRIDE = 7  # between tokens


@torch.no_grad()
def check_roll_back(model: Any) -> None:
    """Read wrong tokens, drop them from the cache, read the right ones; compare with no cache.

    Raises:
        UserError: the model cannot, or its logits differ.
    """
    key = cache_name(model)
    right = _tokens(model, 8)  # (1, 8)
    wrong = _tokens(model, 12)[:, 8:]  # (1, 4)
    try:
        cache = empty_cache()
        model(input_ids=right[:, :4], use_cache=True, **{key: cache})
        model(input_ids=wrong, use_cache=True, **{key: cache})
        cache.crop(-wrong.shape[1])
        found = model(input_ids=right[:, 4:], use_cache=True, **{key: cache}).logits
        error = _error(found, _without_cache(model, right))
        fault = _fault(model, error)
    except Exception as caught:
        fault = _first_line(caught)
    if fault:
        with nan_named(model, model.config.name_or_path):
            raise UserError(
                f"{_name(model)}: its cache cannot be rolled back ({fault}), as speculative "
                "decoding must where a drafted token is wrong; choose a target without recurrent "
                "layers"
            )


@torch.no_grad()
def check_batch(model: Any, remedy: str = "set batch to 1 (--batch 1)") -> None:
    """Read two rows together, one of them padded on its left; drop the other, and go on.

    `remedy` ends an error.

    Raises:
        UserError: the model cannot, or its logits are others than those of the row alone.
    """
    key = cache_name(model)
    rows = _tokens(model, 12)
    ids = torch.cat([rows[:, :6], rows[:, 6:]])  # (2, 6): the last two of row 1 come later
    mask = torch.ones(2, 6, dtype=torch.int64, device=ids.device)
    mask[1, :2] = 0
    ids[1, 2:] = ids[1, :4].clone()
    alone = torch.cat([ids[1:, 2:], rows[:, -1:]], dim=1)  # (1, 5): row 1 and its next token
    try:
        out = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp_min(0),
            use_cache=True,
        )
        cache = out[key]
        error = _error(out.logits[1:], _without_cache(model, alone[:, :4]))
        cache.batch_select_indices(torch.tensor([1], device=ids.device))
        out = model(
            input_ids=alone[:, 4:],
            attention_mask=torch.cat([mask[1:], mask[:1, :1]], dim=1),
            position_ids=torch.full((1, 1), 4, device=ids.device),
            use_cache=True,
            **{key: cache},
        )
        error = max(error, _error(out.logits, _without_cache(model, alone)))
        fault = _fault(model, error)
    except Exception as caught:
        fault = _first_line(caught)
    if fault:
        with nan_named(model, model.config.name_or_path):
            raise UserError(
                f"{_name(model)}: rows of a batch cannot be padded and dropped ({fault}); {remedy}"
            )


def _tokens(model: Any, count: int) -> Tensor:
    """Different tokens `(1, count)`."""
    ids = (1 + _STRIDE * torch.arange(count)) % model.config.get_text_config().vocab_size
    return ids[None].to(model.device)


def _without_cache(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits


def _error(found: Tensor, expected: Tensor) -> float:
    """Of the last row, relative to its size."""
    left, right = found[0, -1].float(), expected[0, -1].float()
    return float((left - right).norm() / right.norm().clamp_min(1e-30))


def _fault(model: Any, error: float) -> str | None:
    # Another state changes the logits by about their size, rounding by far less.
    tolerance = 0.01 if model.dtype == torch.float32 else 0.25
    return None if error <= tolerance else f"its logits differ by {error:.0%} then"


def _name(model: Any) -> str:
    return f"{model.config.name_or_path}: model_type {model.config.model_type!r}"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:200]

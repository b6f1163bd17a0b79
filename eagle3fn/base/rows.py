"""Rows of a batch over the unroll: which ones a mask trains at each step, and the plan of them."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


class RowPlan(NamedTuple):
    """Which rows are computed at each unroll step, and which pairs of a row and a label are scored.

    For example one sample of S = 8 with K = 3, whose labels at places 2, 3 and 6 are trained:

        step 0 scores   row 2 · label 2   row 3 · label 3   row 6 · label 6
        step 1          row 1 · label 2   row 2 · label 3   row 5 · label 6
        step 2          row 0 · label 2   row 1 · label 3   row 4 · label 6

        rows    0 1 4  2 5  3 6       those of three steps, of two, of one
        sizes   7 5 3                 so a step works on the first rows: all, five, three

    Tensors may be on any device. The arrays are on the host: a step's shapes follow from them, and
    nothing is read from a device.
    """

    rows: Tensor  # (T,) int64: places `b·S + t`, those of most steps first, else ascending
    sizes: np.ndarray  # (_,) int64: rows of each step; steps without a row are left out
    labels: Tensor  # (P,) int64: places whose label is scored, ascending
    # Each of X pairs, by label and then by step.
    label: Tensor  # (X,) int64: index into `labels`
    row: Tensor  # (X,) int64: index into `rows`
    step: Tensor  # (X,) int64
    state: Tensor  # (X,) int64: index into all steps' rows, one step after another
    first: np.ndarray  # (P + 1,) int64: number of the first pair of each label; X at the end
    # Of packed rows, for attention that is kept apart; absent: one conversation a row.
    lengths: np.ndarray | None = None  # (C,) int64: places of each conversation
    bounds: Tensor | None = None  # (C + 1,) int32: each one's first place `b·S + t`, then B·S


def plan_rows(
    row_mask: Tensor, survives: Tensor | None = None, starts: Tensor | None = None
) -> RowPlan:
    """The rows and pairs of a row mask `(B, K, S)`; tensors on its device, which is waited for.

    A row is computed up to the last step at which it is trained. Any other row matters only by its
    step-0 key and value. If no row is trained at all, the pair of place 0 with itself stands in.

    Args:
        row_mask: see `Batch`.
        survives: at how many steps each row takes part, `(B, S)` int64; None: at all.
        starts: where conversations begin in packed rows, see `Batch`; None: one conversation a row.
    """
    mask = surviving(row_mask, survives).cpu() > 0
    _, k, s = mask.shape
    for step in range(1, k):
        mask[:, step, max(s - step, 0) :] = False  # no label past the end
    if not mask.any():
        mask[0, 0, 0] = True

    # Rows, by the number of steps that they are computed at.
    number = torch.arange(1, k + 1)[:, None]
    steps = (mask * number).amax(1).flatten()  # (B·S,)
    order = steps.argsort(descending=True, stable=True)
    sizes = [int((steps > step).sum()) for step in range(k)]
    sizes = [size for size in sizes if size]
    rows = order[: sizes[0]]

    # Pairs, by label and step. Row t at step i is scored against the label at t + i.
    sample, step, t = mask.nonzero().unbind(1)
    place = sample * s + t
    by_label = ((place + step) * k + step).argsort()
    place = place[by_label]
    step = step[by_label]
    labels, label, count = (place + step).unique_consecutive(
        return_inverse=True, return_counts=True
    )
    index = torch.empty_like(steps)
    index[rows] = torch.arange(len(rows))

    row = index[place]

    # Of the rows of all steps, how many come before each step's.
    sizes = np.array(sizes)
    before = torch.from_numpy(sizes.cumsum() - sizes)
    device = row_mask.device
    bounds, lengths = (None, None) if starts is None else _conversations(starts)
    return RowPlan(
        rows=rows.to(device),
        sizes=sizes,
        labels=labels.to(device),
        label=label.to(device),
        row=row.to(device),
        step=step.to(device),
        state=(before[step] + row).to(device),
        first=np.cumsum([0, *count.tolist()]),
        bounds=None if bounds is None else bounds.to(device),
        lengths=lengths,
    )


def _conversations(starts: Tensor) -> tuple[Tensor, np.ndarray]:
    """`RowPlan.bounds`, on the host, and `RowPlan.lengths` of packed rows."""
    starts = starts.cpu()
    is_first = starts == torch.arange(starts.shape[1])
    first = is_first.flatten().nonzero()[:, 0]
    bounds = torch.cat([first, first.new_tensor([starts.numel()])])
    return bounds.to(torch.int32), bounds.diff().numpy()


def surviving(row_mask: Tensor, survives: Tensor | None) -> Tensor:
    """A row mask `(B, K, S)` of the rows that survive to each step; `survives` is `(B, S)`."""
    if survives is None:
        return row_mask
    step = torch.arange(row_mask.shape[1], device=row_mask.device)[:, None]
    return row_mask * (survives[:, None] > step)


def shift(x: Tensor, dim: int = -1) -> Tensor:
    """Move `x` one place left along `dim`; a zero enters at the end."""
    rest = x.narrow(dim, 1, x.shape[dim] - 1)
    return torch.cat([rest, torch.zeros_like(x.narrow(dim, 0, 1))], dim)


def over_steps(row_mask: Tensor, k: int) -> Tensor:
    """A mask `(…, S)` of step 0's rows at each of `k` unroll steps: `(…, k, S)`.

    Row `t` is trained at step `i` if the label at `t + i` is: entry `(i, t)` is `row_mask[t + i]`,
    0 past the end.
    """
    s = row_mask.shape[-1]
    padded = F.pad(row_mask, (0, k - 1))
    return torch.stack([padded[..., i : i + s] for i in range(k)], dim=-2)


def trained_row_counts(row_masks: Sequence[Tensor]) -> Tensor:
    """Rows trained at each unroll step by row masks `(B, K, S)` together: `(K,)` fp32, at least
    1.
    """
    counts = [mask.sum((0, 2)) for mask in row_masks]
    return torch.stack(counts).sum(0).to(torch.float32).clamp(min=1)

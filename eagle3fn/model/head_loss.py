"""Draft head and loss in one pass over chunks of labels; the forward makes the gradients.

A label is a place where the target's choice is learned. At an unroll step one draft row is scored
against it, or none. For a pair of label and draft row, with l the row's draft logits, z the label's
target logits, and D the draft vocabulary:

    p_draft = softmax(z over D)                            the teacher
    p_full  = softmax(z) at D                              what a verifier compares with
    L = row loss of l, p_draft, p_full                     `losses.RowLoss`

    loss = Σ weight · L                                    over pairs whose label's argmax is in D

For the KL, L = log Σ exp(l) − Σ p_draft · l and ∂L / ∂l = softmax(l) − p_draft.

Nothing of size `(rows, D)` or `(rows, V)` outlives a chunk of labels, and a label's teacher is made
once for all draft rows that are scored against it.
"""

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from eagle3fn.base.dtypes import at_least_fp32
from eagle3fn.base.grad import value_and_grad
from eagle3fn.model.autograd import differentiable_once, is_last_pull_back
from eagle3fn.model.losses import RowLoss

_CHUNK_BYTES = 32 << 20  # logits of a chunk, on the CPU
_CUDA_CHUNK_BYTES = 256 << 20
_GROUP_BYTES = 4 << 20  # fp32 logits of a group of labels: they fit in the processor's cache
_CUDA_GROUP_BYTES = 64 << 20  # there a group is cut for memory's sake alone


class Pairs(NamedTuple):
    """What is scored: `P` labels, and `X` pairs of a label and a draft row, by label."""

    target: Tensor  # (P, Ht): the target's last hidden state that predicts the label
    label: Tensor  # (X,) int64: index into `target`, ascending
    row: Tensor  # (X,) int64: which draft row is scored; no row twice
    weight: Tensor  # (X,) fp32: the pair's factor in the loss, 0 if the pair does not count
    # (P + 1,) int64, on the host: number of each label's first pair; X at the end
    first: np.ndarray


class PairScores(NamedTuple):
    """Each pair's loss and metrics, without gradient."""

    row_loss: Tensor  # (X,) fp32: any value, not finite ones too, where the pair does not count
    correct: Tensor  # (X,) bool: the draft's argmax is the target's
    accept: Tensor  # (X,) fp32: Σ min of draft and target probabilities over the draft vocabulary
    known: Tensor  # (X,) bool: the target's argmax is in the draft vocabulary


class Scores(NamedTuple):
    """The loss, and what it is a sum of; as `PairScores`."""

    loss: Tensor  # () fp32: Σ weight · row_loss over labels whose argmax is in the draft vocabulary
    row_loss: Tensor
    correct: Tensor
    accept: Tensor
    known: Tensor


class _Inputs(NamedTuple):
    draft: Tensor  # (R, H)
    head: Tensor  # (D, H)
    target: Tensor  # (P, Ht)
    label: Tensor  # (X,) int64
    row: Tensor  # (X,) int64
    weight: Tensor  # (X,) fp32
    first: np.ndarray  # (P + 1,)
    target_head: Tensor  # (V, Ht)
    t2d: Tensor  # (V,) bool
    d2t: Tensor  # (D,) int64
    row_loss_of: RowLoss
    with_gradients: bool


class _Outputs(NamedTuple):
    loss: Tensor
    row_loss: Tensor
    correct: Tensor
    accept: Tensor
    known: Tensor
    grad_draft: Tensor  # of `draft` by a loss gradient of 1; empty if gradients are not wanted
    grad_head: Tensor


def head_and_loss(
    draft: Tensor,
    head: Tensor,
    pairs: Pairs,
    target_head: Tensor,
    t2d: Tensor,
    d2t: Tensor,
    loss: RowLoss,
) -> Scores:
    """Score draft rows with the draft head against the labels' teacher.

    Differentiable once, by `draft` and `head`; a second derivative raises. Works under `vjp` and
    `vmap`.

    Args:
        draft: normed hidden states `(R, H)` of draft rows.
        head: the draft's, `(D, H)`.
        pairs: what is scored.
        target_head: the target's, `(V, Ht)`.
        t2d: `(V,)` bool, which target tokens are in the draft vocabulary.
        d2t: `(D,)` int64, offsets: draft id j is target id `j + d2t[j]`.
        loss: as `find_loss` returns it.
    """
    wanted = torch.is_grad_enabled()
    out = _head_and_loss(_Inputs(draft, head, *pairs, target_head, t2d, d2t, loss, wanted))
    return Scores(out.loss, out.row_loss, out.correct, out.accept, out.known)


def _forward(inputs: _Inputs) -> _Outputs:
    draft = inputs.draft
    head = inputs.head
    kept = torch.arange(len(head), device=head.device) + inputs.d2t  # (D,): target ids
    loss_of = inputs.row_loss_of
    score_pairs = score_on(head.device, head.dtype, loss_of)
    max_bytes = _CHUNK_BYTES if head.device.type == "cpu" else _CUDA_CHUNK_BYTES

    # Gradients are summed over chunks: the head's in at least fp32.
    wanted = inputs.with_gradients
    grad_draft = torch.zeros_like(draft if wanted else draft[:0])
    grad_head = torch.zeros_like(head if wanted else head[:0], dtype=at_least_fp32(head.dtype))

    def score_chunk(begin: int, end: int) -> PairScores:
        """Scores of the labels `begin … end - 1`, whose gradients are added to the sums."""
        first = inputs.first[begin : end + 1]
        part = slice(int(first[0]), int(first[-1]))  # x pairs of p labels
        row = inputs.row[part]
        x = draft[row]  # (x, H)
        logits = F.linear(x, head)  # (x, D)
        z = F.linear(inputs.target[begin:end], inputs.target_head)  # (p, V)
        label = inputs.label[part] - begin
        scores = score_pairs(logits, z, label, first - first[0], inputs.t2d, kept)
        if wanted:
            # The logits are now ∂L / ∂l. The pair's factor multiplies rows of size H, not D.
            # Products have no name here, so that each is freed when it has been added.
            factor = (inputs.weight[part] * scores.known)[:, None]
            if loss_of.kernel is None:
                # Of a pair that does not count it may be infinite: zero times it is not zero. The
                # KL's, which has a kernel, is finite.
                logits.masked_fill_(factor == 0, 0.0)
            grad_draft[row] = ((logits @ head) * factor).to(draft.dtype)
            _add_product(grad_head, logits, (x * factor).to(x.dtype), max_bytes)
        return scores

    chunks = _chunks(inputs.first, head, inputs.target_head, max_bytes)
    scores = _joined([score_chunk(*chunk) for chunk in chunks])
    counts = scores.known & (inputs.weight != 0)
    loss = (inputs.weight * torch.where(counts, scores.row_loss, 0.0)).sum()
    return _Outputs(loss, *scores, grad_draft, grad_head.to(head.dtype))


def _chunks(
    first: np.ndarray, head: Tensor, target_head: Tensor, max_bytes: int
) -> list[tuple[int, int]]:
    """Labels `(begin, end)` of each chunk, whose logits take about `max_bytes` bytes.

    Chunks are about equal because a last one of few labels would cost as many passes over the heads
    as the others.
    """
    # Bytes of the logits of the first n labels, draft's and target's.
    labels = np.arange(len(first))
    so_far = head.itemsize * (first * len(head) + labels * len(target_head))
    count = max(1, -(-int(so_far[-1]) // max_bytes))
    cuts = np.searchsorted(so_far, so_far[-1] * np.arange(1, count) / count, side="right") - 1
    ends = np.unique([*np.maximum(cuts, 1), labels[-1]]).tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))


def _add_product(out: Tensor, a: Tensor, b: Tensor, max_bytes: int) -> None:
    """Add `aᵀ·b` to `out` `(D, H)`, in place; the product takes at most `max_bytes` bytes more.

    `a` is `(X, D)` and `b` `(X, H)`, of one dtype; `out` may be wider.
    """
    if out.dtype == a.dtype:
        out.addmm_(a.T, b)
        return
    size = max(1, max_bytes // (a.itemsize * b.shape[1]))
    for start in range(0, len(out), size):
        part = slice(start, start + size)
        out[part].add_(a[:, part].T @ b)


def _backward(inputs: _Inputs, outputs: _Outputs, grads: _Outputs) -> dict[str, Any]:
    """The gradients made in the forward, times the loss's own.

    Where they are read for the last time they are overwritten, which saves a copy of the head's
    gradient. Where the graph stays, it may be pulled back again after a caller has changed what the
    first pull-back returned: the gradients are new tensors then.
    """
    made = {"draft": outputs.grad_draft, "head": outputs.grad_head}
    if is_last_pull_back(grads.loss):
        return {name: x.mul_(grads.loss) for name, x in made.items()}
    return {name: (x * grads.loss).to(x.dtype) for name, x in made.items()}


_head_and_loss = differentiable_once(
    _forward,
    _backward,
    inputs=_Inputs,
    outputs=_Outputs,
    without_gradient=["row_loss", "correct", "accept", "known", "grad_draft", "grad_head"],
    # `draft` and `head` are not read either. They are kept because the gradients depend on them.
    unread_inputs=["target", "label", "row", "weight", "target_head", "t2d", "d2t"],
    unread_outputs=["loss", "row_loss", "correct", "accept", "known"],
)


def score_on(device: torch.device, dtype: torch.dtype, loss: RowLoss) -> Callable[..., PairScores]:
    """`score` of a loss, or on CUDA its kernel if it has one and Triton is installed.

    The two agree to rounding.
    """
    on_card = device.type == "cuda" and dtype != torch.float64
    if loss.kernel and on_card and importlib.util.find_spec("triton"):
        return importlib.import_module(f"eagle3fn.model.kernels.{loss.kernel}").score
    return partial(score, loss=loss)


def score(
    logits: Tensor,
    z: Tensor,
    label: Tensor,
    first: np.ndarray,
    t2d: Tensor,
    kept: Tensor,
    loss: RowLoss,
) -> PairScores:
    """Loss and metrics of pairs from their logits; writes the loss's gradient over `logits`.

    Works on groups of labels, so that on the CPU what is fp32 stays in the processor's cache.

    Args:
        logits: the draft's, `(X, D)`, by label.
        z: the target's, `(P, V)`.
        label: `(X,)` int64, index into `z`, ascending.
        first: `(P + 1,)` int64, number of each label's first pair, and `X`.
        t2d: `(V,)` bool.
        kept: `(D,)` int64, the target ids of the draft vocabulary.
        loss: as `find_loss` returns it.
    """
    wide = at_least_fp32(logits.dtype)
    max_bytes = _GROUP_BYTES if logits.device.type == "cpu" else _CUDA_GROUP_BYTES
    size = max(1, max_bytes // (wide.itemsize * logits.shape[-1]))  # pairs of a group, at most
    parts: list[PairScores] = []
    begin = 0
    while begin < len(z):
        # As many labels as have so many pairs, one at least.
        end = int(np.searchsorted(first, first[begin] + size, side="right")) - 1
        end = max(end, begin + 1)
        part = slice(int(first[begin]), int(first[end]))
        teacher = z[begin:end].to(wide), label[part] - begin
        parts.append(_score_group(logits[part], *teacher, t2d, kept, loss))
        begin = end
    return _joined(parts)


def _score_group(
    logits: Tensor, z: Tensor, label: Tensor, t2d: Tensor, kept: Tensor, loss: RowLoss
) -> PairScores:
    """`score` of one group, all of it at once; `z` is in at least fp32."""
    wide_logits = logits.to(z.dtype)  # (x, D)

    # The teacher: its token, and probabilities under the whole vocabulary and the draft's.
    _, target_token = first_max(z)
    p_full = torch.softmax(z, dim=-1)[:, kept][label]  # (x, D)
    p_draft = torch.softmax(z[:, kept], dim=-1)[label]

    # The draft, its loss, and the loss's gradient by the logits.
    _, draft_token = first_max(wide_logits)
    draft = torch.softmax(wide_logits, dim=-1)
    accept = torch.minimum(draft, p_full).sum(-1)
    if loss.closed is not None:
        row_loss, gradient = loss.closed(wide_logits, draft, p_draft, p_full)
    else:
        row_loss, gradient = _value_and_gradient(loss, wide_logits, p_draft, p_full)
    logits.copy_(gradient)

    correct = kept[draft_token] == target_token[label]
    return PairScores(row_loss, correct, accept, t2d[target_token][label])


def _value_and_gradient(loss: RowLoss, logits: Tensor, *teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's loss and its gradient by the logits, that of the rows' sum: they don't depend on
    each other.
    """

    def total(x: Tensor) -> tuple[Tensor, Tensor]:
        rows = loss.value(x, *teacher)
        return rows.sum(), rows

    (_, rows), gradient = value_and_grad(total, has_aux=True)(logits)
    return rows, gradient


def _joined(parts: list[PairScores]) -> PairScores:
    """Scores of consecutive pairs as one."""
    return PairScores(*map(torch.cat, zip(*parts, strict=True)))


def first_max(x: Tensor, width: int = 64) -> tuple[Tensor, Tensor]:
    """Largest value and its lowest index along the last axis, by maxima of `width` columns each.

    Several times as fast as `x.max(-1)` on the CPU, whose search for the index is not vectorised.
    """
    if x.shape[-1] % width:
        top, index = x.max(dim=-1)
        return top, index

    # The first part of `width` columns that has the largest value, then the first place in it.
    parts = x.unflatten(-1, (-1, width))
    top, part = parts.amax(-1).max(dim=-1)
    index = part[..., None, None].expand(*part.shape, 1, width)
    return top, part * width + parts.gather(-2, index).squeeze(-2).argmax(-1)

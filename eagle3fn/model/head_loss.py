"""Head and soft-label KL in one pass over chunks of labels, with the gradients made in the forward.

Nothing of size `(rows, D)` or `(rows, V)` outlives a chunk, and a label's teacher softmax is made once for the `K`
student rows that are scored against it.
"""

import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from eagle3fn.model.autograd import differentiable_once, is_last_pull_back
from eagle3fn.model.layers import at_least_fp32

_CHUNK_BYTES, _CUDA_CHUNK_BYTES, _GROUP_BYTES = 32 << 20, 256 << 20, 4 << 20


class Labels(NamedTuple):
    """What the student is scored against; `P` labels, each seen by one student row at each of `K` steps."""

    target: Tensor  # (P, Ht): the target's last hidden state at the label
    student: Tensor  # (K, P) int64: which student row is scored; any value where `weight` is 0
    weight: Tensor  # (K, P) fp32: the pair's factor in the loss, 0 if the pair does not count


class Scores(NamedTuple):
    """The loss and, without gradient, each pair's metrics."""

    loss: Tensor  # () fp32: Σ weight · KL over labels whose argmax is in the draft vocabulary
    kl: Tensor  # (K, P) fp32
    correct: Tensor  # (K, P) bool
    accept: Tensor  # (K, P) fp32
    known: Tensor  # (P,) bool: the target's argmax is in the draft vocabulary


def head_and_kl(
    student: Tensor, head: Tensor, labels: Labels, target_head: Tensor, t2d: Tensor, d2t: Tensor
) -> Scores:
    """Score normed student rows `(K, T, H)` with the draft head `(D, H)` against the labels' teacher.

    Differentiable once by `student` and `head`; a second derivative raises. Works under `vjp` and `vmap`.
    """
    out = _head_and_kl(student, head, *labels, target_head, t2d, d2t, torch.is_grad_enabled())
    return Scores(*out[:5])


def _forward(
    student, head, target, index, weight, target_head, t2d, d2t, wanted: bool
) -> tuple[Tensor, ...]:
    k, rows, _ = student.shape
    kept = torch.arange(len(head), device=head.device) + d2t
    grade, room = (
        score_on(head.device, head.dtype),
        _CHUNK_BYTES if head.device.type == "cpu" else _CUDA_CHUNK_BYTES,
    )
    most = max(1, room // (head.itemsize * (k * len(head) + len(target_head))))
    chunks = max(1, -(-len(target) // most))
    size = max(
        1, -(-len(target) // chunks)
    )  # equal ones: a last chunk of few labels would cost as many passes
    flat = student.flatten(0, 1)
    place = index + rows * torch.arange(k, device=index.device)[:, None]  # (K, P) into flat
    grad_flat = torch.zeros_like(flat if wanted else flat[:0])
    grad_head = torch.zeros_like(head if wanted else head[:0], dtype=at_least_fp32(head.dtype))

    def score_part(place: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        x = flat[place]
        logits = F.linear(x, head)
        scores = grade(logits, F.linear(target, target_head), t2d, kept)
        if wanted:
            factor = (weight * scores[3]).flatten()[:, None]
            grad_logits = logits.flatten(0, 1)
            grad_flat.index_add_(0, place.flatten(), ((grad_logits @ head) * factor).to(flat.dtype))
            _add_product(grad_head, grad_logits, (x.flatten(0, 1) * factor).to(x.dtype), room)
        return scores

    parts = map(score_part, place.split(size, 1), weight.split(size, 1), target.split(size))
    kl, correct, accept, known = (torch.cat(each, dim=-1) for each in zip(*parts, strict=True))
    loss = (weight * torch.where(known, kl, 0.0)).sum()
    return (
        loss,
        kl,
        correct,
        accept,
        known,
        grad_flat.view(-1, *student.shape[1:]),
        grad_head.to(head.dtype),
    )


def _add_product(out: Tensor, a: Tensor, b: Tensor, room: int) -> None:
    """Add `aᵀ·b` to `out` `(D, H)`, with at most `room` bytes beside it."""
    if out.dtype == a.dtype:
        out.addmm_(a.T, b)
        return
    size = max(1, room // (a.itemsize * b.shape[1]))
    for start in range(0, len(out), size):
        part = slice(start, start + size)
        out[part].add_(a[:, part].T @ b)


def _backward(inputs: tuple, outputs: tuple, grads: tuple) -> tuple[Tensor, ...]:
    """The gradients made in the forward, times the loss's own.

    They are written over where nobody reads them again: a copy of the head's gradient is saved. A graph that is kept
    may be pulled back again, by a caller who has changed what he was given: he gets tensors of his own.
    """
    (grad,), made = grads, outputs[5:]
    if is_last_pull_back(grad):
        return tuple(x.mul_(grad) for x in made)
    return tuple((x * grad).to(x.dtype) for x in made)


_head_and_kl: Any = differentiable_once(
    _forward, _backward, kept=6, unread=(tuple(range(2, 8)), tuple(range(5)))
)


def score_on(
    device: torch.device, dtype: torch.dtype
) -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]:
    """`score`, or on CUDA its kernel where Triton is installed; the two agree to rounding."""
    if device.type == "cuda" and dtype != torch.float64 and importlib.util.find_spec("triton"):
        from eagle3fn.model.kernels import score as kernel

        return kernel.score
    return score


def score(
    logits: Tensor, z: Tensor, t2d: Tensor, kept: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """KL, correctness and acceptance `(K, P)` of student `logits` `(K, P, D)`, and `known` `(P,)`, by teacher `z`.

    Overwrites `logits` with the KL's gradient by them. Groups of labels keep what is fp32 in the processor's cache.
    """
    wide = at_least_fp32(logits.dtype)
    size = max(1, _GROUP_BYTES // (wide.itemsize * len(logits) * logits.shape[-1]))
    parts = []
    for start in range(0, len(z), size):
        part = slice(start, start + size)
        full, wide_logits = z[part].to(wide), logits[:, part].to(wide)
        _, token = first_max(full)
        q, p = torch.softmax(full, dim=-1)[:, kept], torch.softmax(full[:, kept], dim=-1)
        top, said = first_max(wide_logits)
        student = torch.softmax(wide_logits, dim=-1)
        kl = top - student.amax(-1).log() - (wide_logits * p).sum(-1)
        accept = torch.minimum(student, q, out=wide_logits).sum(-1)
        torch.sub(student, p, out=wide_logits)
        logits[:, part] = wide_logits
        parts.append((kl, kept[said] == token, accept, t2d[token]))
    return tuple(torch.cat(each, dim=-1) for each in zip(*parts, strict=True))  # pyright: ignore


def first_max(x: Tensor, width: int = 64) -> tuple[Tensor, Tensor]:
    """Largest value and its lowest index along the last axis, by way of the maxima of `width` columns each.

    Several times as fast as `x.max(-1)` on the CPU, whose search for the index is not vectorised.
    """
    if x.shape[-1] % width:
        return tuple(x.max(dim=-1))  # pyright: ignore
    columns = x.unflatten(-1, (-1, width))
    top, place = columns.amax(-1).max(dim=-1)
    index = place[..., None, None].expand(*place.shape, 1, width)
    return top, place * width + columns.gather(-2, index).squeeze(-2).argmax(-1)

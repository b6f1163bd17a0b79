"""Head and soft-label KL in one pass over chunks of labels, with the gradients made in the forward.

Nothing of size `(rows, D)` outlives a chunk, and a label's teacher softmax is made once for the `K` student rows
that are scored against it.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from eagle3fn.model.layers import at_least_fp32

_CHUNK_BYTES = 16 << 20


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


def head_and_kl(student: Tensor, head: Tensor, labels: Labels, target_head: Tensor, t2d: Tensor, d2t: Tensor) -> Scores:
    """Score normed student rows `(K, R, H)` with the draft head `(D, H)` against the labels' teacher.

    Differentiable once by `student` and `head`; a second derivative raises. Works under `vjp` and `vmap`.
    """
    out = _HeadAndKL.apply(student, head, *labels, target_head, t2d, d2t, torch.is_grad_enabled())
    return Scores(*out[:5])


class _HeadAndKL(torch.autograd.Function):
    @staticmethod
    def forward(student, head, target, index, weight, target_head, t2d, d2t, wanted):  # pyright: ignore
        k, rows, _ = student.shape
        count = target.shape[0]
        size = max(1, _CHUNK_BYTES // (4 * k * head.shape[0]))
        flat = student.flatten(0, 1)
        place = index + rows * torch.arange(k, device=index.device)[:, None]  # (K, P) into flat
        draft_rows = target_head[t2d]
        parts, grad_head = [], torch.zeros(head.shape, dtype=at_least_fp32(head.dtype), device=head.device)
        for start in range(0, count, size):
            stop = min(start + size, count)
            x = flat[place[:, start:stop]]
            *scores, grad = _chunk(
                x, head, target[start:stop], weight[:, start:stop], draft_rows, target_head, t2d, d2t
            )
            if wanted:
                part = grad.flatten(0, 1).to(head.dtype)
                scores.append((part @ head).view(x.shape))
                grad_head += part.T @ x.flatten(0, 1)
            else:
                scores.append(torch.zeros_like(x))
            parts.append(scores)
        kl, correct, accept, known, grads = (
            torch.cat(each, dim=min(1, each[0].ndim - 1)) for each in zip(*parts, strict=True)
        )
        loss = (weight * torch.where(known, kl, 0.0)).sum()
        grad_student = torch.zeros_like(flat).index_add_(0, place.flatten(), grads.flatten(0, 1)).view(student.shape)
        return loss, kl, correct, accept, known, grad_student, grad_head.to(head.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*output[5:], *inputs[:2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any):  # pyright: ignore
        return (*_Scaled.apply(grad, *ctx.saved_tensors), *(None,) * 7)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any):
        """One call for each entry of the mapped axis."""
        pairs = list(zip(args, in_dims, strict=True))
        each = [
            _HeadAndKL.apply(*(x if dim is None else x.select(dim, i) for x, dim in pairs))
            for i in range(info.batch_size)
        ]
        return tuple(torch.stack(column) for column in zip(*each, strict=True)), (0,) * 7


class _Scaled(torch.autograd.Function):
    """The stored gradients times the incoming one.

    They depend on student rows and head, which are passed along, unused, so that a second derivative comes by here
    and is refused instead of being silently wrong.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(grad, grad_student, grad_head, student, head):  # pyright: ignore
        return (grad_student * grad).to(student.dtype), (grad_head * grad).to(head.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(ctx: Any, *_: Any):  # pyright: ignore
        raise RuntimeError(
            "the fused head and loss can be differentiated once; set objective.numerics = 'legacy' for higher orders"
        )


def _chunk(x, head, target, weight, draft_rows, target_head, t2d, d2t):
    """Scores of student rows `x` `(K, P, H)` and the gradient by their logits `(K, P, D)`, fp32."""
    wide = at_least_fp32(x.dtype)
    z = F.linear(target, draft_rows).to(wide)
    log_z, token = _normalizer(target, target_head)
    known = t2d[token]
    logits = F.linear(x, head).to(wide)
    top, said = logits.max(dim=-1)
    logits -= top[..., None]
    p = torch.softmax(z, dim=-1)
    dot = torch.einsum("kpd,pd->kp", logits, p)
    student = logits.exp_()
    total = student.sum(-1)
    student /= total[..., None]
    accept = torch.minimum(student, torch.exp(z - log_z[:, None])).sum(-1)
    factor = torch.where(known, weight, 0.0).to(wide)
    grad = student.sub_(p).mul_(factor[..., None])
    return total.log() - dot, said + d2t[said] == token, accept, known, grad


def _normalizer(target: Tensor, target_head: Tensor, chunk: int = 8192) -> tuple[Tensor, Tensor]:
    """Log-sum-exp and argmax of the target's logits, `(P,)` each, streamed over the vocabulary."""
    wide = at_least_fp32(target.dtype)
    top = torch.full(target.shape[:1], -torch.inf, dtype=wide, device=target.device)
    total, token = torch.zeros_like(top), torch.zeros_like(top, dtype=torch.int64)
    for start in range(0, target_head.shape[0], chunk):
        z = F.linear(target, target_head[start : start + chunk]).to(wide)
        best, index = z.max(dim=-1)
        new = torch.maximum(top, best)
        total = total * torch.exp(top - new) + z.sub_(new[:, None]).exp_().sum(-1)
        token = torch.where(best > top, index + start, token)
        top = new
    return top + total.log(), token

"""Attention of the fast profile by a flash kernel, for CUDA: nothing is read on the host, nothing of size S·S is made.

The contributing rows' queries are laid into whole sequences, so that the kernel's own causal rule holds; its result and
log-sum-exp are merged with the rows' own later keys. The backward gives the kernel the merged result and log-sum-exp:
it then makes the probabilities of the one softmax over both parts.
"""

from typing import Any

import torch
from torch import Tensor

from eagle3fn.model.autograd import differentiable_once
from eagle3fn.model.block_attention import StepTensors, dot, gather, split, spread

_KINDS = (torch.bfloat16, torch.float16)
_SIZES = (*range(8, 193, 8), *range(232, 257, 8))  # some cards have no backward between


def fits(device: torch.device, dtype: torch.dtype, size: int) -> bool:
    """Whether there is such a kernel for heads of this size, on this card."""
    return device.type == "cuda" and dtype in _KINDS and size in _SIZES and _has_flash(device)


def _has_flash(device: torch.device) -> bool:
    return torch.backends.cuda.is_flash_attention_available() and torch.cuda.get_device_capability(
        device
    ) >= (8, 0)


def flash_attention(
    q: Tensor,
    key: Tensor,
    value: Tensor,
    step_keys: StepTensors,
    step_values: StepTensors,
    rows: Tensor,
) -> Tensor:
    """`block_attention`. Rows that repeat must be equal in all inputs; the first query gets the gradient of all."""
    return _attention(q, key, value, *step_keys, *step_values, rows, key.shape[2])[0]


def _forward(q, key, value, *rest) -> tuple[Tensor, Tensor]:
    (step_keys, step_values, rows, j), scale = split(rest), q.shape[-1] ** -0.5
    block, block_sum = _flash(_whole(q, rows, key), _heads(key, q), _heads(value, q), scale)
    block, block_sum = (_rows(x, rows) for x in (block, block_sum))
    scores = _own_scores(q.unflatten(1, (j, -1)), step_keys, scale)
    total = torch.logsumexp(torch.cat([block_sum[..., None], scores], dim=-1), dim=-1)
    out = block.to(total.dtype) * torch.exp(block_sum - total)[..., None]
    weights = torch.exp(scores - total[..., None]).unflatten(1, (j, -1))
    return spread(out.unflatten(1, (j, -1)), weights, step_values).flatten(1, 2).to(q.dtype), total


def _backward(inputs: tuple, outputs: tuple, grads: tuple) -> tuple[Tensor, ...]:
    (q, key, value, *rest), (out, total), (grad,) = inputs, outputs, grads
    (step_keys, step_values, rows, j), scale = split(rest), q.shape[-1] ** -0.5
    whole_grad, whole_q = _whole(grad, rows, key, add=True), _whole(q, rows, key)
    merged = _whole(out, rows, key), _whole(total, rows, key)
    grad_q, *grad_block = _flash_backward(
        whole_grad, whole_q, *merged, _heads(key, q), _heads(value, q), scale
    )
    first = torch.cat([torch.ones_like(rows[:1], dtype=torch.bool), rows[1:] != rows[:-1]])
    grad_q = torch.where(first[:, None, None], _rows(grad_q, rows), 0)
    grad_key, grad_value = (x.unflatten(1, (j, -1)).sum(2).transpose(1, 2) for x in grad_block)

    weights = torch.exp(_own_scores(q.unflatten(1, (j, -1)), step_keys, scale) - total[..., None])
    delta = (grad.to(total.dtype) * out).sum(-1, keepdim=True)
    grad_weight = dot(grad.unflatten(1, (j, -1)), step_values).flatten(1, 2)
    grad_score = (weights * (grad_weight - delta) * scale).to(q.dtype).unflatten(1, (j, -1))
    grad_q = spread(grad_q.unflatten(1, (j, -1)), grad_score, step_keys).flatten(1, 2)
    grad_own = gather(q.unflatten(1, (j, -1)), grad_score)
    grad_own_value = gather(grad.unflatten(1, (j, -1)), weights.to(q.dtype).unflatten(1, (j, -1)))
    return grad_q, grad_key, grad_value, *grad_own, *grad_own_value


def _own_scores(q: Tensor, own: StepTensors, scale: float) -> Tensor:
    """Scaled products of queries `(T, J, G, E)` with each row's own keys: `(T, N, I)`, at least fp32."""
    scores = dot(q, own).flatten(1, 2)
    return scores.to(torch.promote_types(q.dtype, torch.float32)) * scale


def _whole(x: Tensor, rows: Tensor, key: Tensor, add: bool = False) -> Tensor:
    """Rows `(T, N, …)` laid into `(B, N, S, …)`, zero elsewhere; of rows that repeat, one, or with `add` their sum."""
    b, s = key.shape[:2]
    flat = x.new_zeros(b * s, *x.shape[1:])
    flat = flat.index_add_(0, rows, x) if add else flat.index_copy_(0, rows, x)
    return flat.unflatten(0, (b, s)).transpose(1, 2)


def _rows(x: Tensor, rows: Tensor) -> Tensor:
    """`(B, N, S, …)` at the rows: `(T, N, …)`."""
    return x.transpose(1, 2).flatten(0, 1)[rows]


def _heads(x: Tensor, q: Tensor) -> Tensor:
    """`(B, S, J, E)` once for each query head: `(B, N, S, E)`."""
    groups = q.shape[1] // x.shape[2]
    return x[:, :, :, None].expand(-1, -1, -1, groups, -1).flatten(2, 3).transpose(1, 2)


def _flash(q: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Causal attention of `(B, N, S, E)` and its log-sum-exp `(B, N, S)`."""
    ops: Any = torch.ops.aten
    if q.device.type == "cpu":
        return ops._scaled_dot_product_flash_attention_for_cpu(
            q, key, value, 0.0, True, scale=scale
        )
    return ops._scaled_dot_product_flash_attention(q, key, value, 0.0, True, scale=scale)[:2]


def _flash_backward(
    grad: Tensor, q: Tensor, out: Tensor, total: Tensor, key: Tensor, value: Tensor, scale: float
):
    ops: Any = torch.ops.aten
    if q.device.type == "cpu":
        return ops._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, key, value, out, total, 0.0, True, scale=scale
        )
    s, seed = (
        q.shape[2],
        torch.empty(2, dtype=torch.uint64, device=q.device),
    )  # no dropout: the seed is not read
    return ops._scaled_dot_product_flash_attention_backward(
        grad,
        q,
        key,
        value,
        out,
        total.contiguous(),
        None,
        None,
        s,
        s,
        0.0,
        True,
        seed,
        seed,
        scale=scale,
    )


_attention: Any = differentiable_once(_forward, _backward, kept=1)

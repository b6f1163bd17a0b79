"""Attention of the fast numerics by PyTorch's flash kernel, on CUDA, without a read on the host.

The kernel attends whole sequences under its own causal rule, so the rows' queries are laid into
zeros at their places. Nothing of size `S·S` is made. The kernel's result and its log-sum-exp a are
then merged with the rows' own keys of later steps, whose scores are c_i:

    Z   = log(exp(a) + Σ_i exp(c_i))
    out = causal · exp(a − Z) + Σ_i exp(c_i − Z) · step_value_i

The backward gives the kernel the merged `out` and `Z` in place of its own: from them it makes the
probabilities of the one softmax over both kinds of keys.

Packed rows (`Batch.starts`) go to the kernel for sequences of several lengths: it reads on the
device where conversations begin, and attends within each.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eagle3fn.base.dtypes import at_least_fp32
from eagle3fn.base.rows import RowPlan
from eagle3fn.model.autograd import differentiable_once
from eagle3fn.model.block_attention import StepTensors as Steps
from eagle3fn.model.block_attention import add_weighted_steps_, dot_steps, weighted_query_sums

_DROPOUT = 0.0
_CAUSAL = True
_DTYPES = (torch.bfloat16, torch.float16)
_HEAD_SIZES = (*range(8, 193, 8), *range(232, 257, 8))  # some cards have no backward in the gap


def has_flash_kernel(device: torch.device, dtype: torch.dtype, head_size: int) -> bool:
    """Whether PyTorch has a flash kernel, forward and backward, for such heads on this device."""
    fits = dtype in _DTYPES and head_size in _HEAD_SIZES
    return device.type == "cuda" and fits and _card_has_flash(device)


def _card_has_flash(device: torch.device) -> bool:
    available = torch.backends.cuda.is_flash_attention_available()
    return available and torch.cuda.get_device_capability(device) >= (8, 0)


class Packing(NamedTuple):
    """Where the conversations of packed rows begin."""

    bounds: Tensor  # (C + 1,) int32: each one's first place b·S + t, then B·S
    longest: int  # places of the longest, on the host


def packing_of(plan: RowPlan) -> Packing:
    """Of a plan of packed rows."""
    assert plan.bounds is not None and plan.lengths is not None, "the plan is not of packed rows"
    return Packing(plan.bounds, int(plan.lengths.max()))


class _Inputs(NamedTuple):
    q: Tensor  # (T, N, E)
    key: Tensor  # (B, S, J, E)
    value: Tensor  # (B, S, J, E)
    step_keys: tuple[Tensor, ...]  # I times (T, J, E)
    step_values: tuple[Tensor, ...]  # I times (T, J, E)
    rows: Tensor  # (T,) int64
    packing: Packing | None


class _Outputs(NamedTuple):
    attended: Tensor  # (T, N, E)
    log_sum: Tensor  # (T, N), at least fp32: Z above


def flash_attention(
    q: Tensor,
    key: Tensor,
    value: Tensor,
    step_keys: Steps,
    step_values: Steps,
    rows: Tensor,
    packing: Packing | None = None,
) -> Tensor:
    """`block_attention` by the flash kernel, to rounding; differentiable once.

    Args:
        q: `(T, N, E)`, rotated; the others as in `block_attention`.
        rows: `(T,)` int64, the queries' places `b·S + t`.
        packing: of packed rows; None: each row of the batch is one conversation.
    """
    inputs = _Inputs(q, key, value, tuple(step_keys), tuple(step_values), rows, packing)
    return _attention(inputs).attended


def _forward(inputs: _Inputs) -> _Outputs:
    q, key, value, step_keys, step_values, rows, packing = inputs
    scale = q.shape[-1] ** -0.5

    # The kernel on whole sequences, read at the rows.
    whole_q = _to_sequences(q, rows, key)
    block = _for_queries(key, q), _for_queries(value, q)
    if packing is None:
        whole = _flash(whole_q, *block, scale)
    else:
        whole = _flash_packed(whole_q, *block, packing, scale)
    causal, causal_log_sum = (_at_rows(x, rows) for x in whole)

    # One softmax with the rows' own keys of later steps.
    step_scores = _step_scores(_grouped(q, key), step_keys, scale)  # (T, N, I)
    log_sum = torch.logsumexp(torch.cat([causal_log_sum[..., None], step_scores], dim=-1), dim=-1)
    out = causal.to(log_sum.dtype) * torch.exp(causal_log_sum - log_sum)[..., None]
    step_weights = torch.exp(step_scores - log_sum[..., None])

    out = _grouped(out, key)  # (T, J, G, E)
    add_weighted_steps_(out, _grouped(step_weights, key), step_values)
    return _Outputs(out.flatten(1, 2).to(q.dtype), log_sum)


def _backward(inputs: _Inputs, outputs: _Outputs, grads: _Outputs) -> dict[str, Any]:
    q, key, value, step_keys, step_values, rows, packing = inputs
    out, log_sum = outputs
    grad = grads.attended
    scale = q.shape[-1] ** -0.5

    # The causal keys: the kernel with the merged result and log-sum-exp.
    whole = (_to_sequences(x, rows, key) for x in (grad, q, out, log_sum))
    whole_grad, whole_q, whole_out, whole_log_sum = whole
    block = _for_queries(key, q), _for_queries(value, q)
    tensors = whole_grad, whole_q, whole_out, whole_log_sum, *block
    if packing is None:
        grad_q, *grad_block = _flash_backward(*tensors, scale)
    else:
        grad_q, *grad_block = _flash_packed_backward(*tensors, packing, scale)
    grad_q = _at_rows(grad_q, rows)

    # The query heads of one key-value head add up.
    heads = key.shape[2]
    grad_key, grad_value = (x.unflatten(2, (heads, -1)).sum(3) for x in grad_block)

    # The rows' own keys, with p = exp(c − Z) and grad_p = grad · step_value:
    # grad_score = p · (grad_p − grad · out) · scale.
    grouped_q = _grouped(q, key)  # (T, J, G, E)
    grouped_grad = _grouped(grad, key)
    weights = torch.exp(_step_scores(grouped_q, step_keys, scale) - log_sum[..., None])
    delta = (grad.to(log_sum.dtype) * out).sum(-1, keepdim=True)
    grad_weight = dot_steps(grouped_grad, step_values).flatten(1, 2)
    grad_score = (weights * (grad_weight - delta) * scale).to(q.dtype)
    grad_score = _grouped(grad_score, key)  # (T, J, G, I)

    grad_q = _grouped(grad_q, key)
    add_weighted_steps_(grad_q, grad_score, step_keys)
    return {
        "q": grad_q.flatten(1, 2),
        "key": grad_key,
        "value": grad_value,
        "step_keys": weighted_query_sums(grouped_q, grad_score),
        "step_values": weighted_query_sums(grouped_grad, _grouped(weights.to(q.dtype), key)),
    }


_attention = differentiable_once(
    _forward, _backward, inputs=_Inputs, outputs=_Outputs, without_gradient=["log_sum"]
)


def _grouped(x: Tensor, key: Tensor) -> Tensor:
    """Query heads `(T, N, …)` by the key-value head that they read: `(T, J, G, …)`."""
    return x.unflatten(1, (key.shape[2], -1))


def _step_scores(q: Tensor, step_keys: Steps, scale: float) -> Tensor:
    """Scaled products of `q` `(T, J, G, E)` with the rows' own keys: `(T, N, I)`, fp32 or fp64."""
    scores = dot_steps(q, step_keys).flatten(1, 2)
    return scores.to(at_least_fp32(q.dtype)) * scale


def _to_sequences(x: Tensor, rows: Tensor, key: Tensor) -> Tensor:
    """Rows `(T, N, …)` laid into zeros `(B, S, N, …)`."""
    b, s = key.shape[:2]
    flat = x.new_zeros(b * s, *x.shape[1:])
    return flat.index_copy_(0, rows, x).unflatten(0, (b, s))


def _at_rows(x: Tensor, rows: Tensor) -> Tensor:
    """Whole sequences `(B, S, N, …)` at the rows: `(T, N, …)`."""
    return x.flatten(0, 1)[rows]


def _for_queries(x: Tensor, q: Tensor) -> Tensor:
    """Key-value heads `(B, S, J, E)` once for each query head that reads them: `(B, S, N, E)`."""
    groups = q.shape[1] // x.shape[2]
    return x[:, :, :, None].expand(-1, -1, -1, groups, -1).flatten(2, 3)


def _op(suffix: str, q: Tensor) -> Any:
    """PyTorch's flash attention, or with "_backward" its gradient, for the device of `q`."""
    name = "_scaled_dot_product_flash_attention"
    device = "_for_cpu" if q.device.type == "cpu" else ""
    return getattr(torch.ops.aten, name + device + suffix)


def _flash(q: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Causal attention of `(B, S, N, E)`, and its log-sum-exp `(B, S, N)`."""
    heads_first = (x.transpose(1, 2) for x in (q, key, value))
    attended, log_sum, *_ = _op("", q)(*heads_first, _DROPOUT, _CAUSAL, scale=scale)
    return attended.transpose(1, 2), log_sum.transpose(1, 2)


def _flash_backward(
    grad: Tensor, q: Tensor, out: Tensor, log_sum: Tensor, key: Tensor, value: Tensor, scale: float
) -> tuple[Tensor, ...]:
    """Gradients by `q`, `key` and `value`, all `(B, S, N, E)`."""
    lengths = ()
    seeds = ()
    if q.device.type != "cpu":
        s = q.shape[1]
        lengths = None, None, s, s  # all sequences have one length
        seeds = _no_seeds(q)
    heads_first = (x.transpose(1, 2) for x in (grad, q, key, value, out))
    made = *heads_first, log_sum.transpose(1, 2).contiguous()
    grads = _op("_backward", q)(*made, *lengths, _DROPOUT, _CAUSAL, *seeds, scale=scale)
    return tuple(x.transpose(1, 2) for x in grads)


def _no_seeds(q: Tensor) -> tuple[Tensor, Tensor]:
    """The state of random numbers that a backward takes: without dropout it is not read."""
    seed = torch.empty(2, dtype=torch.uint64, device=q.device)
    return seed, seed


class PackedKernel(NamedTuple):
    """PyTorch's flash kernel for sequences of several lengths, which CUDA alone has.

    It takes places in one list, `(B·S, N, E)`, and has the log-sum-exp of one head after the other,
    `(N, B·S)`.
    """

    forward: Callable[..., tuple[Tensor, ...]]
    backward: Callable[..., tuple[Tensor, ...]]


packed_kernel = PackedKernel(
    torch.ops.aten._flash_attention_forward, torch.ops.aten._flash_attention_backward
)


def _flash_packed(
    q: Tensor, key: Tensor, value: Tensor, packing: Packing, scale: float
) -> tuple[Tensor, Tensor]:
    """Causal attention within conversations of `(B, S, N, E)`, and its log-sum-exp `(B, S, N)`."""
    b, s, heads, _ = q.shape
    places = (x.flatten(0, 1) for x in (q, key, value))
    spans = packing.bounds, packing.bounds, packing.longest, packing.longest
    attended, log_sum, *_ = packed_kernel.forward(
        *places, *spans, _DROPOUT, _CAUSAL, return_debug_mask=False, scale=scale
    )
    assert log_sum.shape == (heads, b * s), log_sum.shape
    return attended.unflatten(0, (b, s)), log_sum.T.unflatten(0, (b, s))


def _flash_packed_backward(
    grad: Tensor,
    q: Tensor,
    out: Tensor,
    log_sum: Tensor,
    key: Tensor,
    value: Tensor,
    packing: Packing,
    scale: float,
) -> tuple[Tensor, ...]:
    """Gradients by `q`, `key` and `value`, all `(B, S, N, E)`."""
    places = (x.flatten(0, 1) for x in (grad, q, key, value, out))
    made = *places, log_sum.flatten(0, 1).T.contiguous()
    spans = packing.bounds, packing.bounds, packing.longest, packing.longest
    grads = packed_kernel.backward(*made, *spans, _DROPOUT, _CAUSAL, *_no_seeds(q), scale=scale)
    return tuple(x.unflatten(0, q.shape[:2]) for x in grads)

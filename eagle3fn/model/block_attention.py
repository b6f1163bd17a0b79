"""Attention of the fast numerics: draft rows against step 0's keys and their own later ones.

Row t has two kinds of keys: those of step 0 at places u ≤ t of its sample, and one of its own for
each later step. One softmax runs over both. Nothing of size `(K, N, T, S)` is kept: rows are cut
into blocks, and the backward makes the probabilities again, block by block.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eagle3fn.base.dtypes import at_least_fp32
from eagle3fn.model.autograd import differentiable_once

_BLOCK = 128  # rows of a block, at most
_STRIDE = 64  # a block's number of keys is a multiple of this

StepTensors = Sequence[Tensor] | Tensor
"""One tensor `(T, J, E)` for each of `I` later steps: what a row itself adds at that step."""


class Block(NamedTuple):
    """Rows `start … stop - 1` of the list, all of one sample.

    All see the keys `0 … first`; none sees key `end` or a later one.
    """

    start: int
    stop: int
    sample: int
    first: int  # the place of the first row in the sample
    end: int


def make_blocks(rows: Tensor, s: int) -> tuple[Block, ...]:
    """Cut ascending rows of `B·S` into blocks of one sample each.

    `end` is rounded up to a multiple of `_STRIDE`, so that few shapes occur. Reads `rows` on the
    host, which waits for a device.
    """
    places = rows.tolist()
    blocks: list[Block] = []
    start = 0
    while start < len(places):
        sample = places[start] // s

        # The block ends with the sample, or when it is full.
        stop = start + 1
        while stop < min(start + _BLOCK, len(places)) and places[stop] // s == sample:
            stop += 1

        seen = places[stop - 1] % s + 1
        end = -(-seen // _STRIDE) * _STRIDE
        blocks.append(Block(start, stop, sample, first=places[start] % s, end=min(s, end)))
        start = stop
    return tuple(blocks)


class _Inputs(NamedTuple):
    q: Tensor  # (T, N, E)
    key: Tensor  # (B, S, J, E)
    value: Tensor  # (B, S, J, E)
    step_keys: tuple[Tensor, ...]  # I times (T, J, E)
    step_values: tuple[Tensor, ...]  # I times (T, J, E)
    position: Tensor  # (T,) int64: the row's place in its sample
    blocks: tuple[Block, ...]


class _Outputs(NamedTuple):
    attended: Tensor  # (T, N, E)


def block_attention(
    q: Tensor,
    key: Tensor,
    value: Tensor,
    step_keys: StepTensors,
    step_values: StepTensors,
    rows: Tensor,
    blocks: tuple[Block, ...],
) -> Tensor:
    """Attention of queries of some rows; differentiable once. Padding is on the right.

    With i the later steps, and p_t one softmax of q_t · key / √E over both kinds of keys:

        out_t = Σ_{u ≤ t} p_tu · value_u + Σ_i p_ti · step_value_ti

    Args:
        q: `(T, N, E)`, rotated.
        key: step 0's `(B, S, J, E)`, rotated; a row sees its sample's up to its own place.
        value: step 0's, `(B, S, J, E)`.
        step_keys: of each later step so far `(T, J, E)`, rotated; a row sees its own alone.
        step_values: as many, `(T, J, E)`.
        rows: places `b·S + t` of the queries, `(T,)` int64, ascending.
        blocks: `make_blocks(rows, S)`.

    Returns:
        `(T, N, E)`.
    """
    inputs = _Inputs(
        q,
        key,
        value,
        tuple(step_keys),
        tuple(step_values),
        position=rows % key.shape[1],
        blocks=blocks,
    )
    return _attention(inputs).attended


def _forward(inputs: _Inputs) -> _Outputs:
    key = inputs.key
    q = _grouped(inputs.q, key) * inputs.q.shape[-1] ** -0.5  # (T, J, G, E)
    step_scores = dot_steps(q, inputs.step_keys)  # (T, J, G, I)
    out = torch.empty_like(q)
    step_weights = torch.empty_like(step_scores)

    # Each block's causal part, by batched products over the key-value heads.
    keys = _keys_last(key)
    values = _keys_first(inputs.value)
    for block in inputs.blocks:
        part = slice(block.start, block.stop)
        b = block.sample
        end = block.end
        p = _probabilities(
            _heads_first(q[part]),
            keys[b, :, :, :end],
            step_scores[part],
            inputs.position[part],
            block,
        )
        out[part] = _rows_first(torch.bmm(p[..., :end], values[b, :, :end]), block)
        step_weights[part] = _rows_first(p[..., end:], block)

    # The rows' own values of later steps.
    add_weighted_steps_(out, step_weights, inputs.step_values)
    return _Outputs(out.flatten(1, 2))


def _backward(inputs: _Inputs, outputs: _Outputs, grads: _Outputs) -> dict[str, Any]:
    """The gradients, through the softmax p of the scores s:

    grad_p     = grad · valueᵀ
    grad_s     = p · (grad_p − Σ p · grad_p)
    grad_q     = grad_s · key / √E
    grad_key   = grad_sᵀ · q / √E
    grad_value = pᵀ · grad
    """
    key = inputs.key
    value = inputs.value
    scale = inputs.q.shape[-1] ** -0.5
    q = _grouped(inputs.q, key)  # (T, J, G, E)
    grad = _grouped(grads.attended, key)  # (T, J, G, E)
    q = q * scale

    # For later steps: scores and the gradient by their probabilities, of all rows at once.
    step_scores = dot_steps(q, inputs.step_keys)  # (T, J, G, I)
    grad_step_weights = dot_steps(grad, inputs.step_values)
    grad_q = torch.empty_like(q)
    grad_step_scores = torch.empty_like(step_scores)
    step_weights = torch.empty_like(step_scores)

    # Both layouts of keys and values, each contiguous for its products.
    keys = _keys_first(key)
    keys_last = _keys_last(key)
    values = _keys_first(value)
    values_last = _keys_last(value)

    # Blocks of one sample add to the same keys: their sums are at least fp32.
    wide = at_least_fp32(key.dtype)
    grad_key = torch.zeros_like(keys, dtype=wide)  # (B, J, S, E)
    grad_value = torch.zeros_like(values, dtype=wide)
    for block in inputs.blocks:
        part = slice(block.start, block.stop)
        b = block.sample
        end = block.end
        block_q = _heads_first(q[part])  # (J, G·r, E)
        block_grad = _heads_first(grad[part])

        # The block's probabilities again.
        p = _probabilities(
            block_q, keys_last[b, :, :, :end], step_scores[part], inputs.position[part], block
        )

        # Through values and softmax to the scores.
        grad_p = torch.cat(
            [
                torch.bmm(block_grad, values_last[b, :, :, :end]),
                _heads_first(grad_step_weights[part]),
            ],
            dim=-1,
        )
        grad_s = torch.ops.aten._softmax_backward_data(grad_p, p, -1, p.dtype)

        # From the scores to queries, keys and values.
        grad_q[part] = _rows_first(torch.bmm(grad_s[..., :end], keys[b, :, :end]), block)
        grad_key[b, :, :end] += torch.bmm(grad_s[..., :end].transpose(1, 2), block_q)
        grad_value[b, :, :end] += torch.bmm(p[..., :end].transpose(1, 2), block_grad)
        grad_step_scores[part] = _rows_first(grad_s[..., end:], block)
        step_weights[part] = _rows_first(p[..., end:], block)

    # The scores are of scaled queries: `q` has the factor already, its gradient gets it here.
    add_weighted_steps_(grad_q, grad_step_scores, inputs.step_keys)
    grad_q = grad_q.mul_(scale).flatten(1, 2)
    grad_key, grad_value = (x.transpose(1, 2).to(key.dtype) for x in (grad_key, grad_value))
    return {
        "q": grad_q,
        "key": grad_key,
        "value": grad_value,
        "step_keys": weighted_query_sums(q, grad_step_scores),
        "step_values": weighted_query_sums(grad, step_weights),
    }


_attention = differentiable_once(
    _forward, _backward, inputs=_Inputs, outputs=_Outputs, unread_outputs=["attended"]
)


def _probabilities(
    q: Tensor, keys: Tensor, step_scores: Tensor, position: Tensor, block: Block
) -> Tensor:
    """Softmax of a block's `r` rows over its keys and their own of later steps.

    Args:
        q: `(J, G·r, E)`, scaled.
        keys: `(J, E, end)`.
        step_scores: `(r, J, G, I)`.
        position: of the rows in their sample, `(r,)`.
        block: the block.

    Returns:
        `(J, G·r, end + I)`.
    """
    step_scores = _heads_first(step_scores)
    scores = torch.bmm(q, keys)

    # Causal mask, in place. Keys up to the first row's place are seen by all rows of the block.
    after_first = block.first + 1
    hidden = torch.arange(after_first, block.end, device=q.device) > position[:, None]
    by_row = scores.unflatten(1, (-1, len(position)))  # (J, G, r, end)
    by_row[..., after_first:].masked_fill_(hidden, -torch.inf)

    return torch.softmax(torch.cat([scores, step_scores], dim=-1), dim=-1)


# A row and its own tensors of later steps. `G` query heads read one key-value head.


def dot_steps(x: Tensor, steps: StepTensors) -> Tensor:
    """Dot products of `x` `(T, J, G, E)` with each step's `(T, J, E)`: `(T, J, G, I)`."""
    products = [(x * step[:, :, None]).sum(-1) for step in steps]
    if not products:
        return x.new_empty(*x.shape[:3], 0)
    return torch.stack(products, dim=-1)


def add_weighted_steps_(x: Tensor, weights: Tensor, steps: StepTensors) -> None:
    """Add to `x` `(T, J, G, E)` each step's `(T, J, E)` times its `weights` `(T, J, G, I)`."""
    for i, step in enumerate(steps):
        x.addcmul_(weights[..., i, None], step[:, :, None])


def weighted_query_sums(x: Tensor, weights: Tensor) -> list[Tensor]:
    """For each step the sum over a key's queries of `x` times `weights`: `I` times `(T, J, E)`.

    `x` is `(T, J, G, E)`, `weights` `(T, J, G, I)`. The gradient of `dot_steps` and of
    `add_weighted_steps_` by the steps' tensors.
    """
    return [(x * weight[..., None]).sum(2) for weight in weights.unbind(-1)]


# Layouts.


def _grouped(x: Tensor, key: Tensor) -> Tensor:
    """Heads `(T, N, E)` by the key-value head that they read: `(T, J, G, E)`."""
    return x.unflatten(1, (key.shape[2], -1))


def _heads_first(x: Tensor) -> Tensor:
    """`(r, J, G, X)` to `(J, G·r, X)`."""
    return x.permute(1, 2, 0, 3).flatten(1, 2)


def _rows_first(x: Tensor, block: Block) -> Tensor:
    """`(J, G·r, X)` to `(r, J, G, X)`."""
    return x.unflatten(1, (-1, block.stop - block.start)).permute(2, 0, 1, 3)


def _keys_first(x: Tensor) -> Tensor:
    """`(B, S, J, E)` to `(B, J, S, E)`, contiguous."""
    return x.transpose(1, 2).contiguous()


def _keys_last(x: Tensor) -> Tensor:
    """`(B, S, J, E)` to `(B, J, E, S)`, contiguous."""
    return x.permute(0, 2, 3, 1).contiguous()

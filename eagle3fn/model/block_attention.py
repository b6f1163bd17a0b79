"""Attention of the fast profile: contributing rows against the causal block and their own later keys.

Nothing of size `(K, N, T, S)` is kept: the backward makes the probabilities again, block by block.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eagle3fn.model.autograd import differentiable_once

_BLOCK, _STRIDE = 128, 64

StepTensors = Sequence[Tensor] | Tensor


class Block(NamedTuple):
    """Rows `start … stop - 1` of the list, all of one sample: all see keys `0 … first`, none sees `end` or later."""

    start: int
    stop: int
    sample: int
    first: int
    end: int


def make_blocks(rows: Tensor, s: int) -> tuple[Block, ...]:
    """Cut ascending rows of `B·S` into blocks of one sample each; `end` is rounded up, so that few shapes occur."""
    places, blocks, start = rows.tolist(), [], 0
    while start < len(places):
        sample, stop = places[start] // s, start + 1
        while stop < min(start + _BLOCK, len(places)) and places[stop] // s == sample:
            stop += 1
        end = -(-(places[stop - 1] % s + 1) // _STRIDE) * _STRIDE
        blocks.append(Block(start, stop, sample, places[start] % s, min(s, end)))
        start = stop
    return tuple(blocks)


def block_attention(
    q: Tensor,
    key: Tensor,
    value: Tensor,
    step_keys: StepTensors,
    step_values: StepTensors,
    rows: Tensor,
    blocks: tuple[Block, ...],
) -> Tensor:
    """Attention of `q` `(T, N, E)`, which stand at `rows` `(T,)` of `B·S`; the result has the same shape.

    `key` and `value` `(B, S, J, E)` are step 0's, seen up to the row itself; `step_keys` and `step_values`,
    of `I` steps `(T, J, E)` each, are the rows' own of later steps, all seen. One softmax over both; padding is on
    the right. `blocks` are `make_blocks(rows, S)`.
    """
    return _attention(q, key, value, *step_keys, *step_values, rows % key.shape[1], blocks)[0]


def _forward(q, key, value, *rest) -> tuple[Tensor]:
    step_keys, step_values, position, blocks = split(rest)
    q = _grouped(q, key) * q.shape[-1] ** -0.5
    scores, out = dot(q, step_keys), torch.empty_like(q)
    weights = torch.empty_like(scores)
    keys, values = _keys_last(key), _keys_first(value)
    for block in blocks:
        part, b, end = slice(block.start, block.stop), block.sample, block.end
        p = _probabilities(
            _heads_first(q[part]), keys[b, :, :, :end], scores[part], position[part], block
        )
        out[part] = _rows_first(torch.bmm(p[..., :end], values[b, :, :end]), block)
        weights[part] = _rows_first(p[..., end:], block)
    return (spread(out, weights, step_values).flatten(1, 2),)


def _backward(inputs: tuple, outputs: tuple, grads: tuple) -> tuple[Tensor, ...]:
    q, key, value, *rest = inputs
    step_keys, step_values, position, blocks = split(rest)
    scale, q, grad = q.shape[-1] ** -0.5, _grouped(q, key), _grouped(grads[0], key)
    q = q * scale
    scores, grad_weight = dot(q, step_keys), dot(grad, step_values)
    grad_q, grad_score, weights = (
        torch.empty_like(q),
        torch.empty_like(scores),
        torch.empty_like(scores),
    )
    (keys, keys_last), (values, values_last) = (
        (_keys_first(x), _keys_last(x)) for x in (key, value)
    )
    wide = torch.promote_types(key.dtype, torch.float32)
    grad_key, grad_value = torch.zeros_like(keys, dtype=wide), torch.zeros_like(values, dtype=wide)
    for block in blocks:
        part, b, end = slice(block.start, block.stop), block.sample, block.end
        mine, back = _heads_first(q[part]), _heads_first(grad[part])
        p = _probabilities(mine, keys_last[b, :, :, :end], scores[part], position[part], block)
        grad_p = torch.cat(
            [torch.bmm(back, values_last[b, :, :, :end]), _heads_first(grad_weight[part])], dim=-1
        )
        grad_s = torch.ops.aten._softmax_backward_data(grad_p, p, -1, p.dtype)
        grad_q[part] = _rows_first(torch.bmm(grad_s[..., :end], keys[b, :, :end]), block)
        grad_key[b, :, :end] += torch.bmm(grad_s[..., :end].transpose(1, 2), mine)
        grad_value[b, :, :end] += torch.bmm(p[..., :end].transpose(1, 2), back)
        grad_score[part], weights[part] = (
            _rows_first(grad_s[..., end:], block),
            _rows_first(p[..., end:], block),
        )
    grad_q = spread(grad_q, grad_score, step_keys).mul_(scale).flatten(1, 2)
    grad_key, grad_value = (x.transpose(1, 2).to(key.dtype) for x in (grad_key, grad_value))
    return grad_q, grad_key, grad_value, *gather(q, grad_score), *gather(grad, weights)


def split(rest: Sequence[Any]) -> tuple[Any, ...]:
    """StepTensors keys and own values, as many, and the two inputs behind them."""
    count = (len(rest) - 2) // 2
    return rest[:count], rest[count:-2], *rest[-2:]


def _probabilities(
    q: Tensor, keys: Tensor, scores: Tensor, position: Tensor, block: Block
) -> Tensor:
    """Softmax of one block's rows `(J, G·r, E)` over keys `(J, E, end)` and own `scores` `(r, J, G, I)`."""
    own = _heads_first(scores)
    block_scores = torch.bmm(q, keys)
    hidden = torch.arange(block.first + 1, block.end, device=q.device) > position[:, None]
    block_scores.unflatten(1, (-1, len(position)))[..., block.first + 1 :].masked_fill_(
        hidden, -torch.inf
    )
    return torch.softmax(torch.cat([block_scores, own], dim=-1), dim=-1)


def dot(x: Tensor, own: StepTensors) -> Tensor:
    """Products of `x` `(T, J, G, E)` with each row's own, `I` times `(T, J, E)`: `(T, J, G, I)`."""
    each = [(x * mine[:, :, None]).sum(-1) for mine in own]
    return torch.stack(each, dim=-1) if each else x.new_empty(*x.shape[:3], 0)


def spread(x: Tensor, weights: Tensor, own: StepTensors) -> Tensor:
    """`x` `(T, J, G, E)` plus each row's own, `I` times `(T, J, E)`, times `weights` `(T, J, G, I)`, in place."""
    for i, mine in enumerate(own):
        x.addcmul_(weights[..., i, None], mine[:, :, None])
    return x


def gather(x: Tensor, weights: Tensor) -> list[Tensor]:
    """`x` `(T, J, G, E)` times `weights` `(T, J, G, I)`, summed over a key's queries: `I` times `(T, J, E)`."""
    return [(x * w[..., None]).sum(2) for w in weights.unbind(-1)]


def _grouped(x: Tensor, key: Tensor) -> Tensor:
    """Heads `(T, N, E)` by the key-value head they read: `(T, J, G, E)`."""
    return x.unflatten(1, (key.shape[2], -1))


def _heads_first(x: Tensor) -> Tensor:
    """`(r, J, G, X)` to `(J, G·r, X)`."""
    return x.permute(1, 2, 0, 3).flatten(1, 2)


def _keys_first(x: Tensor) -> Tensor:
    """`(B, S, J, E)` to `(B, J, S, E)`."""
    return x.transpose(1, 2).contiguous()


def _keys_last(x: Tensor) -> Tensor:
    """`(B, S, J, E)` to `(B, J, E, S)`."""
    return x.permute(0, 2, 3, 1).contiguous()


def _rows_first(x: Tensor, block: Block) -> Tensor:
    """`(J, G·r, X)` to `(r, J, G, X)`."""
    return x.unflatten(1, (-1, block.stop - block.start)).permute(2, 0, 1, 3)


_attention: Any = differentiable_once(_forward, _backward, unread=((), (0,)))

"""Attention of the fast numerics: draft rows against step 0's keys and their own later ones.

Row t has two kinds of keys: those of step 0 that it sees (`visibility`), and one of its own for
each later step. One softmax runs over both. Nothing of size `(K, N, T, S)` is kept: rows are cut
into blocks, and the backward makes the probabilities again, block by block.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eagle3fn.base.dtypes import at_least_fp32
from eagle3fn.model.autograd import differentiable_once
from eagle3fn.model.visibility import Visible

_BLOCK = 128  # rows of a block, at most
_STRIDE = 64  # a block's number of keys is a multiple of this

StepTensors = Sequence[Tensor] | Tensor
"""One tensor `(T, J, E)` for each of `I` later steps: what a row itself adds at that step."""


class Block(NamedTuple):
    """Rows `start … stop - 1` by place, all of one row of the batch. They see keys
    `begin … end - 1` only.

    Keys from `joined` on are hidden from none of them by its first key, and keys below `common`
    from none by its last.
    """

    start: int
    stop: int
    sample: int  # the row of the batch
    begin: int
    joined: int
    common: int
    end: int


class Blocks(NamedTuple):
    """A list of rows cut into blocks, and which of step 0's keys each row sees."""

    cut: tuple[Block, ...]
    order: Tensor  # (T,) int64: the rows by place
    first: Tensor | None  # (T,) int64: the first place that the row sees; None: from the beginning
    last: Tensor  # (T,) int64


def make_blocks(rows: Tensor, s: int, seen: Visible) -> Blocks:
    """Cut rows `b·S + t` into blocks of one row of the batch each, neighbours together.

    The number of keys is rounded up to a multiple of `_STRIDE`, so that few shapes occur. Reads
    rows and bounds on the host, which waits for a device once.
    """
    order = rows.argsort()
    last = torch.as_tensor(seen.last)
    first = torch.zeros_like(last) if seen.first is None else torch.as_tensor(seen.first)
    by_place = torch.stack([rows // s, first, last])[:, order]
    samples, firsts, lasts = by_place.tolist()

    blocks: list[Block] = []
    start = 0
    while start < len(samples):
        stop = _end_of_block(start, samples, firsts, lasts)
        part = slice(start, stop)

        # The keys of its rows, as many as a multiple of the stride.
        begin = max(min(firsts[part]), 0)
        common = max(min(lasts[part]) + 1, begin)
        end = max(lasts[part]) + 1
        end = begin - (begin - end) // _STRIDE * _STRIDE
        end = max(min(end, s), common)

        joined = max(*firsts[part], begin)
        blocks.append(Block(start, stop, samples[start], begin, joined, common, end))
        start = stop
    return Blocks(tuple(blocks), order, None if seen.first is None else first, last)


def _end_of_block(start: int, samples: list[int], firsts: list[int], lasts: list[int]) -> int:
    """One past the last row of a block.

    It ends when it is full, with its row of the batch, and before a row that sees no key of the row
    before it: where a conversation begins.
    """
    full = min(start + _BLOCK, len(samples))
    stop = start + 1
    while stop < full and samples[stop] == samples[start] and firsts[stop] <= lasts[stop - 1]:
        stop += 1
    return stop


class _Inputs(NamedTuple):
    q: Tensor  # (T, N, E)
    key: Tensor  # (B, S, J, E)
    value: Tensor  # (B, S, J, E)
    step_keys: tuple[Tensor, ...]  # I times (T, J, E)
    step_values: tuple[Tensor, ...]  # I times (T, J, E)
    order: Tensor  # (T,)
    first: Tensor | None  # (T,)
    last: Tensor  # (T,)
    blocks: tuple[Block, ...]


class _Outputs(NamedTuple):
    attended: Tensor  # (T, N, E)


def block_attention(
    q: Tensor,
    key: Tensor,
    value: Tensor,
    step_keys: StepTensors,
    step_values: StepTensors,
    blocks: Blocks,
) -> Tensor:
    """Attention of queries of some rows; differentiable once. Padding is on the right.

    With i the later steps, and p_t one softmax of q_t · key / √E over both kinds of keys:

        out_t = Σ_u p_tu · value_u + Σ_i p_ti · step_value_ti      over the places u that t sees

    Args:
        q: `(T, N, E)`, rotated.
        key: step 0's `(B, S, J, E)`, rotated.
        value: step 0's, `(B, S, J, E)`.
        step_keys: of each later step so far `(T, J, E)`, rotated; a row sees its own alone.
        step_values: as many, `(T, J, E)`.
        blocks: `make_blocks` of the queries' rows.

    Returns:
        `(T, N, E)`.
    """
    later = tuple(step_keys), tuple(step_values)
    seen = blocks.order, blocks.first, blocks.last, blocks.cut
    inputs = _Inputs(q, key, value, *later, *seen)
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
        part = inputs.order[block.start : block.stop]
        sees = slice(block.begin, block.end)
        width = block.end - block.begin
        b = block.sample
        p = _probabilities(inputs, _heads_first(q[part]), keys[b, :, :, sees], step_scores, block)
        out[part] = _rows_first(torch.bmm(p[..., :width], values[b, :, sees]), block)
        step_weights[part] = _rows_first(p[..., width:], block)

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

    # Blocks of one row of the batch add to the same keys: their sums are at least fp32.
    wide = at_least_fp32(key.dtype)
    grad_key = torch.zeros_like(keys, dtype=wide)  # (B, J, S, E)
    grad_value = torch.zeros_like(values, dtype=wide)
    for block in inputs.blocks:
        part = inputs.order[block.start : block.stop]
        sees = slice(block.begin, block.end)
        width = block.end - block.begin
        b = block.sample
        block_q = _heads_first(q[part])  # (J, G·r, E)
        block_grad = _heads_first(grad[part])

        # The block's probabilities again.
        p = _probabilities(inputs, block_q, keys_last[b, :, :, sees], step_scores, block)

        # Through values and softmax to the scores.
        grad_causal = torch.bmm(block_grad, values_last[b, :, :, sees])
        grad_p = torch.cat([grad_causal, _heads_first(grad_step_weights[part])], dim=-1)
        grad_s = torch.ops.aten._softmax_backward_data(grad_p, p, -1, p.dtype)

        # From the scores to queries, keys and values.
        grad_q[part] = _rows_first(torch.bmm(grad_s[..., :width], keys[b, :, sees]), block)
        grad_key[b, :, sees] += torch.bmm(grad_s[..., :width].transpose(1, 2), block_q)
        grad_value[b, :, sees] += torch.bmm(p[..., :width].transpose(1, 2), block_grad)
        grad_step_scores[part] = _rows_first(grad_s[..., width:], block)
        step_weights[part] = _rows_first(p[..., width:], block)

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
    inputs: _Inputs, q: Tensor, keys: Tensor, step_scores: Tensor, block: Block
) -> Tensor:
    """Softmax of a block's `r` rows over its `X` keys and their own of later steps.

    Args:
        inputs: which keys the rows see.
        q: `(J, G·r, E)`, scaled.
        keys: `(J, E, X)`.
        step_scores: of all rows, `(T, J, G, I)`.
        block: the block.

    Returns:
        `(J, G·r, X + I)`.
    """
    part = inputs.order[block.start : block.stop]
    scores = torch.bmm(q, keys)
    by_row = scores.unflatten(1, (-1, block.stop - block.start))  # (J, G, r, X), a view

    # Hide what a row does not see, in place. Keys below `common` are before every last one.
    key = torch.arange(block.common, block.end, device=q.device)
    after = key > inputs.last[part, None]
    by_row[..., block.common - block.begin :].masked_fill_(after, -torch.inf)
    if inputs.first is not None and block.joined > block.begin:
        key = torch.arange(block.begin, block.joined, device=q.device)
        before = key < inputs.first[part, None]
        by_row[..., : block.joined - block.begin].masked_fill_(before, -torch.inf)

    return torch.softmax(torch.cat([scores, _heads_first(step_scores[part])], dim=-1), dim=-1)


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

"""The EAGLE-3 unroll, written once: over rows, operations and visibility.

The draft runs `K` times on its own hidden states (training-time test). `unroll` says what is
computed; an `Ops` record says how: `plain.PLAIN` is readable and the reference of the others,
`fast.FAST` computes the same on the rows that reach a loss term.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from eagle3fn.base.config import Config
from eagle3fn.base.draft_config import DraftConfig
from eagle3fn.base.rows import RowPlan
from eagle3fn.base.types import Aux, Batch, Frozen, Params
from eagle3fn.model import table
from eagle3fn.model.rope import rope_table, rotate
from eagle3fn.model.visibility import visible


class Rows(NamedTuple):
    """Whose queries are made: at step `i` those of the first `sizes[i]` places."""

    places: Tensor  # (T,) int64: b·S + t, in any order; no place twice
    # of each step, falling, from T on; the unroll ends with them
    sizes: Sequence[int] | np.ndarray


Angles = tuple[Tensor, Tensor]
"""Cosines and sines."""


class Ops(NamedTuple):
    """How the parts of the unroll are computed. Hidden states are `(…, H)`: of every place `(B, S,
    H)`, or of a list of rows `(T, H)`.
    """

    # Once a batch. params → the same with what these operations stack of them
    weights: Callable[[Params], Params]
    # (weights, batch, draft, frozen) → what `qkv` reads of the tokens
    tokens: Callable[[Params, Batch, DraftConfig, Frozen], Any]
    # batch → the plan of its rows; None: every place, at every step
    plan: Callable[[Batch], RowPlan | None]

    # (x, weight, eps) → x
    norm: Callable[[Tensor, Tensor, float], Tensor]
    # (weights, draft, tokens, hidden, rows, step) → queries of `rows` (None: of all), keys and
    # values of all of `hidden`, as heads before the rotation
    qkv: Callable[..., tuple[Tensor, Tensor, Tensor]]
    head_axis: int  # of those heads' tensors
    # (key or value heads, N / J) → as `attend` reads them
    shared: Callable[[Tensor, int], Tensor]
    # (what rows see, their places b·S + t or None, step 0's keys, attention mask) → as `attend`
    # reads it
    sight: Callable[..., Any]
    # (queries, keys, values, sight) → heads; the first key is step 0's, the others the rows' own
    attend: Callable[[Tensor, list[Tensor], list[Tensor], Any], Tensor]
    # (weights, hidden, attended) → hidden + W_o · attended
    output: Callable[[Params, Tensor, Tensor], Tensor]
    # (weights, hidden, eps) → hidden + MLP(norm(hidden))
    mlp: Callable[[Params, Tensor, float], Tensor]

    # (params, the unroll's states, plan, batch, config, frozen, loss) → loss and metrics
    score: Callable[..., tuple[Tensor, Aux]]


def unroll(
    params: Params, batch: Batch, rows: Rows | None, config: Config, frozen: Frozen, ops: Ops
) -> Iterator[Tensor]:
    """Yield the rows' hidden states `(…, H)` after each of `K` steps, before the final norm.

    Of every place `(B, S, H)` if `rows` is None, else of the first `sizes[i]` places `(T_i, H)`.

    Row `t` at step `i` takes the embedding of token `t + i + 1` and its hidden state of step
    `i - 1` (at step 0 the projected taps), is rotated by position `t + i`, and attends to the
    step-0 keys that it sees and to its own keys of steps `1 … i`.

    A generator: a caller may take a step's loss before the next step is made. Autograd then adds a
    state's gradients in that order, on which SpecForge's bits depend.
    """
    draft = config.draft
    k = config.objective.ttt_length
    groups = draft.num_attention_heads // draft.num_key_value_heads

    # What every step reads: weights, tokens, cosines and sines.
    weights = ops.weights(params)
    hidden = project(weights, draft, batch.aux_hidden, ops)  # (B, S, H)
    b, s, _ = hidden.shape
    tokens = ops.tokens(weights, batch, draft, frozen)
    tables = rope_table(draft, s + k, hidden.dtype, hidden.device, beyond=k)

    # Places in their samples, positions for the rotation, and places b·S + t once rows are listed.
    place = torch.arange(s, device=hidden.device).expand(b, s)
    position = place if batch.position_ids is None else batch.position_ids.expand(b, s)
    listed: Tensor | None = None
    sight = None
    keys: list[Tensor] = []
    values: list[Tensor] = []
    for step in range(k if rows is None else len(rows.sizes)):
        # The rows of this step: chosen at step 0, later the first of those before.
        incoming = hidden
        key_angles = _angles(tables, position + step, ops)
        size = None if rows is None else int(rows.sizes[step])
        fewer = size is not None and (listed is None or size < len(listed))
        if rows is not None and listed is None:
            listed = rows.places
            place, position, hidden = (x.flatten(0, 1)[listed] for x in (place, position, hidden))
        elif listed is not None and fewer:
            listed, place, position, hidden = (x[:size] for x in (listed, place, position, hidden))
            keys[1:] = [x[:size] for x in keys[1:]]
            values[1:] = [x[:size] for x in values[1:]]

        # Step 0's keys and values are of every place, later ones of the step's rows.
        angles = key_angles
        if fewer:
            angles = _angles(tables, position + step, ops)
        if step > 0:
            incoming = hidden
            key_angles = angles

        # Queries, and one key and value more.
        query, key, value = ops.qkv(weights, draft, tokens, incoming, listed, step)
        query = rotated(weights, draft, table.Q, query, angles, ops)
        key = rotated(weights, draft, table.K, key, key_angles, ops)
        keys.append(ops.shared(key, groups))
        values.append(ops.shared(value, groups))

        # Attention, to what each row sees. Without a first key that is the same at every step.
        seen = visible(draft, place, step)
        if sight is None or fewer or seen.first is not None:
            sight = ops.sight(seen, listed, keys[0], batch.attention_mask)
        attended = ops.attend(query, keys, values, sight)

        # The rest of the layer.
        hidden = ops.mlp(weights, ops.output(weights, hidden, attended), draft.rms_norm_eps)
        yield hidden


def project(weights: Params, draft: DraftConfig, aux_hidden: Tensor, ops: Ops) -> Tensor:
    """The three taps `(B, S, 3·Ht)` to the draft's hidden state `(B, S, H)`."""
    matrix = weights[table.FC]
    return F.linear(aux_hidden.to(matrix.dtype), matrix)


def rotated(
    weights: Params, draft: DraftConfig, name: str, heads: Tensor, angles: Angles, ops: Ops
) -> Tensor:
    """Query or key heads, which the matrix `name` has made, rotated by their positions."""
    return rotate(heads, *angles)


def _angles(tables: Angles, position: Tensor, ops: Ops) -> Angles:
    """Cosines and sines of positions, with an axis for the heads."""
    cos, sin = (each[position].unsqueeze(ops.head_axis) for each in tables)
    return cos, sin

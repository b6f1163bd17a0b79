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

    # Once a batch. (params, draft) → the same with what these operations stack of them
    weights: Callable[[Params, DraftConfig], Params]
    # (weights, batch, draft, frozen) → what the first layer's `qkv` reads of the tokens
    tokens: Callable[[Params, Batch, DraftConfig, Frozen], Any]
    # batch → the plan of its rows; None: every place, at every step
    plan: Callable[[Batch], RowPlan | None]

    # (x, weight, eps) → x
    norm: Callable[[Tensor, Tensor, float], Tensor]
    # (weights, draft, layer, tokens, hidden, rows, step) → queries of `rows` (None: of all), keys
    # and values of all of `hidden`, as heads before the rotation
    qkv: Callable[..., tuple[Tensor, Tensor, Tensor]]
    head_axis: int  # of those heads' tensors
    # (key or value heads, N / J) → as `attend` reads them
    shared: Callable[[Tensor, int], Tensor]
    # (what rows see, their places b·S + t or None, batch, draft, dtype) → as `attend` reads it
    sight: Callable[..., Any]
    # (queries, keys, values, sight) → heads; the first key is step 0's, the others the rows' own
    attend: Callable[[Tensor, list[Tensor], list[Tensor], Any], Tensor]
    # (weights, layer, hidden, attended) → hidden + W_o · attended
    output: Callable[[Params, table.Layer, Tensor, Tensor], Tensor]
    # (weights, layer, hidden, eps) → hidden + MLP(norm(hidden))
    mlp: Callable[[Params, table.Layer, Tensor, float], Tensor]

    # (params, the unroll's states, plan, batch, config, frozen, loss) → loss and metrics
    score: Callable[..., tuple[Tensor, Aux]]


class _Listed(NamedTuple):
    """Rows of the batch: every place as `(B, S)`, or a list of them `(T,)`."""

    rows: Tensor | None  # (T,) int64: places b·S + t; None: every place, not listed
    place: Tensor  # of each in its row of the batch
    position: Tensor  # of each at step 0, for the rotation
    start: Tensor | None  # as `Batch.starts`

    def pick(self, rows: Tensor) -> "_Listed":
        """Of every place, those of the list."""
        place, position = (x.flatten(0, 1)[rows] for x in (self.place, self.position))
        start = None if self.start is None else self.start.flatten(0, 1)[rows]
        return _Listed(rows, place, position, start)

    def first(self, size: int) -> "_Listed":
        """The first of a list."""
        assert self.rows is not None
        start = None if self.start is None else self.start[:size]
        return _Listed(self.rows[:size], self.place[:size], self.position[:size], start)

    def listed(self) -> "_Listed":
        """Every place as a list."""
        return self.pick(torch.arange(self.place.numel(), device=self.place.device))

    def of(self, hidden: Tensor) -> Tensor:
        """These rows of every place's hidden states `(B, S, H)`."""
        return hidden if self.rows is None else hidden.flatten(0, 1)[self.rows]


class _Cache(NamedTuple):
    """One layer's keys and values of all steps so far: step 0's of every place, then the rows'."""

    keys: list[Tensor]
    values: list[Tensor]

    def cut(self, size: int) -> None:
        """Keep the first rows of the later steps."""
        self.keys[1:] = [x[:size] for x in self.keys[1:]]
        self.values[1:] = [x[:size] for x in self.values[1:]]


def unroll(
    params: Params, batch: Batch, rows: Rows | None, config: Config, frozen: Frozen, ops: Ops
) -> Iterator[Tensor]:
    """Yield the rows' hidden states `(…, H)` after each of `K` steps, before the final norm.

    Of every place `(B, S, H)` if `rows` is None, else of the first `sizes[i]` places `(T_i, H)`.

    Row `t` at step `i` takes the embedding of token `t + i + 1` and its hidden state of step
    `i - 1` (at step 0 the projected taps), is rotated by position `t + i`, and attends in each
    layer to the step-0 keys that it sees and to its own keys of steps `1 … i`.

    A generator: a caller may take a step's loss before the next step is made. Autograd then adds a
    state's gradients in that order, on which SpecForge's bits depend.
    """
    draft = config.draft
    k = config.objective.ttt_length
    layers = table.layers(draft)

    # What every step reads: weights, tokens, cosines and sines.
    weights = ops.weights(params, draft)
    hidden = project(weights, draft, batch.aux_hidden, ops)  # (B, S, H)
    b, s, _ = hidden.shape
    tokens = ops.tokens(weights, batch, draft, frozen)
    length = s if batch.starts is None else min(s, draft.max_position_embeddings)
    tables = rope_table(draft, length + k, hidden.dtype, hidden.device, beyond=k)
    once = _Once(weights, draft, tokens, tables, batch, hidden.dtype, ops)

    # Every place of the batch, and the rows whose queries are made.
    place = torch.arange(s, device=hidden.device).expand(b, s)
    position = place if batch.position_ids is None else batch.position_ids.expand(b, s)
    every = _Listed(None, place, position, batch.starts)
    chosen = every if rows is None else every.pick(rows.places)

    caches = [_Cache([], []) for _ in layers]
    sight = None
    for step in range(k if rows is None else len(rows.sizes)):
        # The rows of this step: later the first of those before.
        size = len(chosen.place) if rows is None else int(rows.sizes[step])
        fewer = size < len(chosen.place)
        if fewer:
            chosen = chosen.first(size)
            hidden = hidden[:size]
            for cache in caches:
                cache.cut(size)

        # Step 0's keys are of every place: layers before the last are then computed there.
        keyed = every if step == 0 else chosen
        for layer, cache in zip(layers[:-1], caches, strict=False):
            queried = every.listed() if step == 0 and rows is not None else keyed
            seen = _sight(once, queried, step)
            hidden = _layer(once, layer, cache, hidden, keyed, queried, seen, step)
            if step == 0:
                hidden = hidden.view(b, s, -1)

        # The last layer, of the rows. Without a window they see the same at every step.
        if sight is None or fewer or draft.draft_window is not None:
            sight = _sight(once, chosen, step)
        hidden = _layer(once, layers[-1], caches[-1], hidden, keyed, chosen, sight, step)
        yield hidden
        hidden = carried(weights, draft, hidden, ops)


class _Once(NamedTuple):
    """What every layer and step reads."""

    weights: Params
    draft: DraftConfig
    tokens: Any
    tables: Angles
    batch: Batch
    dtype: torch.dtype
    ops: Ops


def _sight(once: _Once, rows: _Listed, step: int) -> Any:
    """What rows see at a step."""
    seen = visible(once.draft, rows.place, step, rows.start)
    return once.ops.sight(seen, rows.rows, once.batch, once.draft, once.dtype)


def _layer(
    once: _Once,
    layer: table.Layer,
    cache: _Cache,
    hidden: Tensor,
    keyed: _Listed,
    queried: _Listed,
    sight: Any,
    step: int,
) -> Tensor:
    """One decoder layer at one step; its keys and values go into the cache.

    `hidden` are the states of the rows `keyed`, which give keys and values; states of the rows
    `queried` are returned.
    """
    weights, draft, ops = once.weights, once.draft, once.ops
    hidden = residual(weights, draft, layer, hidden, ops)

    # Queries, and one key and value more.
    query, key, value = ops.qkv(weights, draft, layer, once.tokens, hidden, queried.rows, step)
    angles = _angles(once.tables, queried.position + step, ops)
    query = rotated(weights, draft, layer.q_norm, query, angles, ops)
    if keyed is not queried:
        angles = _angles(once.tables, keyed.position + step, ops)
    key = rotated(weights, draft, layer.k_norm, key, angles, ops)
    groups = draft.num_attention_heads // draft.num_key_value_heads
    cache.keys.append(ops.shared(key, groups))
    cache.values.append(ops.shared(value, groups))

    # Attention, to what each row sees, and the rest of the layer.
    attended = ops.attend(query, cache.keys, cache.values, sight)
    if keyed is not queried:
        hidden = queried.of(hidden)
    hidden = ops.output(weights, layer, hidden, attended)
    return ops.mlp(weights, layer, hidden, draft.rms_norm_eps)


# Parts that the drafter shares


def project(weights: Params, draft: DraftConfig, aux_hidden: Tensor, ops: Ops) -> Tensor:
    """The taps `(B, S, A·Ht)` to the draft's hidden state `(B, S, H)`, normed by its switches."""
    matrix = weights[table.FC]
    taps = aux_hidden.to(matrix.dtype)
    if draft.norm_before_fc:
        taps = ops.norm(taps, weights[table.TAPS_NORM], draft.rms_norm_eps)
    if draft.fc_norm:
        each = taps.chunk(draft.taps, dim=-1)
        normed = [
            ops.norm(tap, weights[table.tap_norm(number)], draft.rms_norm_eps)
            for number, tap in enumerate(each)
        ]
        taps = torch.cat(normed, dim=-1)
    return F.linear(taps, matrix)


def residual(
    weights: Params, draft: DraftConfig, layer: table.Layer, hidden: Tensor, ops: Ops
) -> Tensor:
    """A layer's hidden state, to which attention and MLP are added."""
    if layer.number or not draft.norm_before_residual:
        return hidden
    return ops.norm(hidden, weights[layer.hidden_norm], draft.rms_norm_eps)


def rotated(
    weights: Params, draft: DraftConfig, norm: str, heads: Tensor, angles: Angles, ops: Ops
) -> Tensor:
    """Query or key heads rotated by their positions, first normed by the weight `norm` if the
    draft has such norms.
    """
    if draft.qk_norm:
        heads = ops.norm(heads, weights[norm], draft.rms_norm_eps)
    return rotate(heads, *angles)


def carried(weights: Params, draft: DraftConfig, hidden: Tensor, ops: Ops) -> Tensor:
    """The hidden state that goes on to the next step."""
    if not draft.norm_output:
        return hidden
    return ops.norm(hidden, weights[table.NORM], draft.rms_norm_eps)


def _angles(tables: Angles, position: Tensor, ops: Ops) -> Angles:
    """Cosines and sines of positions, with an axis for the heads."""
    cos, sin = (each[position].unsqueeze(ops.head_axis) for each in tables)
    return cos, sin

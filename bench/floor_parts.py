"""What our training step runs on CUDA under the fast numerics, kernel by kernel.

Counted are FLOPs of matrix products, bytes and launches. A kernel reads each input once and writes
each output once, in whole elements; a gather reads what it takes, `index_add_` also what it adds
to, and a product with an addend copies that first. A gradient of the first rows is copied into
zeros. What a kernel moves inside itself is left out:
the flash backward's fp32 sums, and sectors of 32 bytes of which a gather needs two.
`tests/bench/test_floors.py` compares the counts with the operations of a real step.
"""

from itertools import pairwise
from math import prod
from typing import NamedTuple

import numpy as np
import torch

from eagle3fn.base.draft_config import DraftConfig
from eagle3fn.base.rows import RowPlan
from eagle3fn.model import head_loss
from eagle3fn.model.table import shapes
from eagle3fn.train.optimizer import _BLOCK_BYTES

F = 4  # bytes of fp32
C = 2  # bytes of the compute dtype, bf16
PLACE = 8  # bytes of a place, int64
LOGSUMEXP = 7  # kernels that one call launches: its passes
INDEX_PUT = 8  # kernels that one call launches: a sort, and the sum


class Bytes(NamedTuple):
    """What a kernel moves."""

    read: float
    written: float


def copied(count: float) -> Bytes:
    """As many bytes read as written."""
    return Bytes(count, count)


def times(count: float, read: float, written: float) -> Bytes:
    """`count` bytes, read and written so many times."""
    return Bytes(count * read, count * written)


def first_rows(count: int, of: int, columns: int) -> Bytes:
    """The gradient of the first `count` rows of a tensor, copied into zeros of all rows."""
    return Bytes(count * columns * C, (of + count) * columns * C)


class Kernels(NamedTuple):
    """Kernels of one kind in one part of the step."""

    part: str
    what: str
    count: int
    flops: int  # of matrix products, of all together
    read: int  # bytes, of all together
    written: int


class Size(NamedTuple):
    """What the counts depend on."""

    draft: DraftConfig
    batch: int
    seq: int
    k: int
    sizes: tuple[int, ...]  # rows of each unroll step, as in a `RowPlan`
    first: np.ndarray  # (P + 1,): number of the first pair of each label; X at the end

    @property
    def places(self) -> int:
        """B·S."""
        return self.batch * self.seq

    @property
    def rows(self) -> int:
        """T, the rows of step 0."""
        return self.sizes[0]

    @property
    def states(self) -> int:
        """R, the rows of all steps."""
        return sum(self.sizes)

    @property
    def labels(self) -> int:
        """P."""
        return len(self.first) - 1

    @property
    def pairs(self) -> int:
        """X, of a row and its label."""
        return int(self.first[-1])

    @property
    def weights(self) -> int:
        """Trained values."""
        return sum(prod(shape) for shape in shapes(self.draft).values())


def planned(draft: DraftConfig, batch: int, seq: int, k: int, plan: RowPlan) -> Size:
    """The size of a step by its plan."""
    return Size(draft, batch, seq, k, tuple(plan.sizes.tolist()), plan.first)


def unmasked(draft: DraftConfig, batch: int, seq: int, k: int) -> Size:
    """The size of a step that computes and scores every row at every unroll step."""
    places = batch * seq
    return Size(draft, batch, seq, k, (places,) * k, k * np.arange(places + 1))


class Tally(list[Kernels]):
    """Kernels in the order in which they are added."""

    def product(
        self,
        part: str,
        what: str,
        rows: int,
        inner: int,
        columns: int,
        repeats: int = 1,
        addends: int = 0,
    ) -> None:
        """`(rows, inner)·(inner, columns)`, `repeats` times.

        `addends`: 0; 1: the product adds to its output in place; 2: to a copy of an addend.
        """
        out = rows * columns * C
        copies = addends // 2
        self.append(
            Kernels(
                part,
                what,
                count=repeats * (1 + copies),
                flops=repeats * 2 * rows * inner * columns,
                read=repeats * ((rows * inner + inner * columns) * C + addends * out),
                written=repeats * (1 + copies) * out,
            )
        )

    def linear(
        self,
        part: str,
        what: str,
        rows: int,
        inner: int,
        columns: int,
        repeats: int = 1,
        addends: int = 0,
    ) -> None:
        """A product and its two gradients."""
        self.product(part, what, rows, inner, columns, repeats, addends)
        self.product(part, what + ", gradients", rows, columns, inner, repeats)
        self.product(part, what + ", gradients", columns, rows, inner, repeats)

    def passes(self, part: str, what: str, moved: Bytes, count: int, repeats: int = 1) -> None:
        """`count` kernels that together move so many bytes, `repeats` times."""
        read = round(moved.read) * repeats
        written = round(moved.written) * repeats
        self.append(Kernels(part, what, count * repeats, 0, read, written))


class _Widths(NamedTuple):
    """Columns of the layer's tensors, and rows of those of every token that a row reads."""

    h: int  # hidden state
    q: int  # queries
    kv: int  # keys, and values
    qkv: int  # queries, keys and values
    places: int  # B·(S + K - 1)


def fast_step(size: Size) -> Tally:
    """Our step under the fast numerics.

    Counted from `model/fast.py`, `model/fused_layers.py`, `model/head_loss.py`,
    `model/flash_attention.py`, `model/kernels/score.py` and `train/step.py`.
    """
    tally = Tally()
    draft = size.draft
    q = draft.num_attention_heads * draft.head_dim
    kv = draft.num_key_value_heads * draft.head_dim
    places = size.batch * (size.seq + size.k - 1)
    widths = _Widths(draft.hidden_size, q, kv, q + 2 * kv, places)

    _once(tally, size, widths)
    _step0(tally, size, widths)
    _unroll_products(tally, size, widths)
    _rotary(tally, size, widths)
    _attention(tally, size, widths)
    _mlp(tally, size, widths)
    _norms(tally, size, widths)
    _weight_sums(tally, size, widths)
    _head(tally, size, widths)
    _optimizer(tally, size)
    return tally


def _once(tally: Tally, size: Size, widths: _Widths) -> None:
    """What depends on a place alone, once a batch."""
    h, _, kv, qkv, places = widths
    draft = size.draft
    i = draft.intermediate_size
    m = size.places
    steps = len(size.sizes)
    tally.passes("small", "factors, metrics, tokens", times(size.pairs * F, 60, 40), 105)
    rows = size.states * PLACE
    tally.passes("small", "places of the rows' tokens", times(rows, 6, 5), 5 * steps)

    part = "weights side by side"
    joined = copied((qkv * 2 * h + 2 * i * h) * C)
    tally.passes(part, "cat of q, k, v and of gate, up", joined, 2)
    tally.passes(part, "their gradients", copied(qkv * 2 * h * C), 1)

    tally.product("projection", "fc", m, 3 * draft.target_hidden_size, h)
    tally.product("projection", "fc, gradient", h, m, 3 * draft.target_hidden_size)
    tally.passes("embedding", "gather", copied(places * h * C), 3)
    tally.linear("embedding", "left half of q, k, v", places, h, qkv)
    part = "step-0 keys and values"
    tally.linear(part, "right half of k, v", m, h, 2 * kv, addends=2)


def _step0(tally: Tally, size: Size, widths: _Widths) -> None:
    h, q, kv, qkv, places = widths
    m = size.places
    t = size.rows
    part = "queries and output"
    gathered = copied(t * (2 * h + q) * C)
    tally.passes(part, "rows of hidden, norm, left half", gathered, 3)

    # Gradients of rows go back to all places: of hidden states and of their norm, then of the left
    # half's part of q, into its columns.
    moved = Bytes((m + 2 * t) * h * C, (2 * m + t) * h * C)
    tally.passes(part, "gradient of rows", moved, 2 + INDEX_PUT, 2)
    q_values = places * q
    read = 2 * q_values + 2 * t * q + 2 * places * qkv
    written = 3 * q_values + t * q + 2 * places * qkv
    tally.passes(part, "gradient of the left half", times(C, read, written), 6)

    part = "step-0 keys and values"
    read = m * (2 * kv + qkv) + 2 * places * qkv
    written = m * (2 * kv + 2 * qkv) + 2 * places * qkv
    tally.passes(part, "gradient of the left half", times(C, read, written), 5)
    tally.passes(part, "sums of hidden gradients", times(m * h * C, 4, 2), 2)
    what = "sums of key and value gradients"
    tally.passes(part, what, times(2 * m * kv * C, 2, 1), 2, len(size.sizes) - 1)


def _unroll_products(tally: Tally, size: Size, widths: _Widths) -> None:
    h, q, _, qkv, places = widths
    part = "queries and output"
    tally.linear(part, "q of step 0", size.rows, h, q, addends=2)
    for t in size.sizes:
        tally.linear(part, "o", t, q, h, addends=2)
    for t in size.sizes[1:]:
        tally.linear(part, "q, k, v of later steps", t, h, qkv, addends=1)
        tally.passes(part, "rows of the left half", copied(t * qkv * C), 1)
        moved = Bytes(2 * t * qkv * C, (places + t) * qkv * C)
        tally.passes("embedding", "gradient of the left half", moved, 2)
    sums = times(places * qkv * C, 2, 1)
    tally.passes("embedding", "its sums", sums, 1, max(0, len(size.sizes) - 2))


def _rotary(tally: Tally, size: Size, widths: _Widths) -> None:
    """Forward: two products, a rotated copy in two passes, a sum.

    Backward: the same, and slices copied into zeros.

    Then slices of queries, keys and values, whose gradients are copied into zeros and added.
    """
    _, q, kv, qkv, _ = widths
    part = "rotary"
    m = size.places
    e = size.draft.head_dim
    steps = len(size.sizes)
    later = size.states - size.rows
    tally.passes(part, "tables, made on the CPU", Bytes(0, 2 * (m + size.k) * e * C), 2)

    # Positions of every place, for step 0's keys, and of each step's rows.
    for t in (m, *size.sizes):
        tally.passes(part, "places of tables", copied(2 * t * e * C), 3)

    # Step-0 keys, the rows' queries, keys of the later steps.
    for values, count in ((m * kv, 1), (size.states * q, steps), (later * kv, steps - 1)):
        tally.passes(part, "forward", times(values * C, 5.5, 4.5), 5 * count)
        tally.passes(part, "backward", times(values * C, 7.5, 7.5), 9 * count)

    # Queries, keys and values of a later step have one tensor of gradients, with two sums.
    moved = times(later * qkv * C, 1 + 2 * 2, 3 + 1 + 2)
    tally.passes(part, "slices", moved, (3 * 2 + 2) * (steps - 1))
    tally.passes(part, "slices", times(m * kv * C, 6, 8), 5)
    tally.passes(part, "own values kept", copied(later * kv * C), steps - 1)


def _attention(tally: Tally, size: Size, widths: _Widths) -> None:
    """Flash over whole sequences with expanded heads, then the rows' own later keys."""
    _flash(tally, size, widths)
    _own_keys(tally, size, widths)


def _flash(tally: Tally, size: Size, widths: _Widths) -> None:
    part = "attention, flash"
    steps = len(size.sizes)
    m = size.places
    n = size.draft.num_attention_heads
    row = size.states * widths.q * C  # of all steps' queries
    sums = size.states * n * F  # log-sum-exp of the rows
    laid = m * widths.q * C  # of queries at all places
    grouped = 2 * m * widths.kv * C  # keys and values before heads are expanded
    all_sums = m * n * F
    pairs = (
        size.batch * size.seq * size.seq // 2
    )  # half of the square, as flash kernels are counted

    moved = Bytes(row + steps * grouped, row + steps * 3 * laid)
    tally.passes(part, "queries laid out, heads expanded", moved, 4 * steps)
    forward = steps * 4 * pairs * widths.q
    read = steps * 3 * laid
    tally.append(Kernels(part, "forward", steps, forward, read, steps * (laid + all_sums)))
    tally.passes(part, "rows taken", copied(row + sums), 2 * steps)

    read = 3 * row + sums + steps * (grouped + all_sums)
    written = 3 * row + sums + steps * (5 * laid + 2 * all_sums)
    tally.passes(part, "all laid out, heads expanded", Bytes(read, written), 11 * steps)
    backward = steps * 10 * pairs * widths.q
    read = steps * (5 * laid + all_sums)
    tally.append(Kernels(part, "backward", 3 * steps, backward, read, steps * 3 * laid))
    moved = Bytes(row + steps * 2 * laid, row + steps * grouped)
    tally.passes(part, "rows and groups", moved, 3 * steps)


def _own_keys(tally: Tally, size: Size, widths: _Widths) -> None:
    """Each row's keys and values of later steps, and the merge with flash by log-sum-exp."""
    part = "attention, own keys"
    wide = F // C
    for i, t in enumerate(size.sizes):
        row = t * widths.q * C
        own = t * widths.kv * C
        sums = t * size.draft.num_attention_heads * F
        moved = Bytes((1 + 2 * wide) * row + 8 * sums, (1 + 2 * wide) * row + 6 * sums)
        tally.passes(part, "merge", moved, 6 + LOGSUMEXP)
        moved = Bytes((2 + 2 * wide) * row, 2 * wide * row + sums)
        tally.passes(part, "gradient by own scores", moved, 3)
        if i == 0:
            continue

        # Step i has i own keys.
        scores = i * sums
        moved = Bytes(i * (2 * row + own) + 4 * scores, i * row + 4 * scores)
        tally.passes(part, "own scores", moved, 2 * i + 5)
        moved = Bytes(i * (wide * row + own) + scores, i * wide * row)
        tally.passes(part, "own values", moved, i)
        moved = Bytes(i * (4 * row + 2 * own) + 9 * scores, i * 2 * row + 8 * scores)
        tally.passes(part, "own scores, gradients", moved, 4 * i + 11)
        moved = Bytes(i * (5 * row + own) + 2 * scores, i * (3 * row + 2 * own))
        tally.passes(part, "own keys, gradients", moved, 5 * i)
        if i < len(size.sizes) - 1:
            tally.passes(part, "sums of own gradients", times(own, 2, 1), 1, 2 * i)

        # Those of earlier steps are cut to the rows that go on.
        before = size.sizes[i - 1]
        if t < before:
            moved = first_rows(t, before, widths.kv)
            tally.passes(part, "gradients of the first rows", moved, 2, 2 * (i - 1))


def _mlp(tally: Tally, size: Size, widths: _Widths) -> None:
    i = size.draft.intermediate_size
    for t in size.sizes:
        tally.linear("MLP", "gate and up", t, widths.h, 2 * i)
        tally.linear("MLP", "down", t, i, widths.h, addends=2)
        tally.passes("MLP activation", "SwiGLU", times(t * i * C, 3, 2), 2)
        tally.passes("MLP activation", "SwiGLU again, its gradient", times(t * i * C, 11, 7), 7)


class _Norm(NamedTuple):
    what: str
    rows: int  # of all calls together
    calls: int
    again: bool  # it is made again in the backward


def _norms(tally: Tally, size: Size, widths: _Widths) -> None:
    """Each norm in fp32, a pass an operation: eight forward, eleven backward.

    Then the gradients of the hidden states, which have several readers.
    """
    h = widths.h
    sizes = size.sizes
    steps = len(sizes)
    states = size.states
    later = states - size.rows
    norms = (
        _Norm("input", widths.places, 1, again=False),
        _Norm("hidden, step 0", size.places, 1, again=False),
        _Norm("hidden, later steps", later, steps - 1, again=True),
        _Norm("after attention", states, steps, again=True),
        _Norm("final", states, steps, again=False),
    )
    for norm in norms:
        forward = times(norm.rows * h, C + 5 * F, C + 4 * F)
        backward = times(norm.rows * h, 2 * C + 11 * F, C + 7 * F)
        tally.passes("norms", norm.what, forward, 8 * norm.calls, 1 + norm.again)
        tally.passes("norms", norm.what + ", gradient", backward, 11 * norm.calls)

    # Past the MLP, past a later step's layer, and from the head of every step but the last.
    summed = states + later + (states - sizes[-1])
    sums = times(summed * h * C, 2, 1)
    tally.passes("norms", "sums of hidden gradients", sums, steps + 2 * (steps - 1))
    for before, t in pairwise(sizes):
        if t < before:
            moved = first_rows(t, before, h)
            tally.passes("norms", "hidden gradients of the first rows", moved, 2)


def _weight_sums(tally: Tally, size: Size, widths: _Widths) -> None:
    """Autograd adds the steps' gradients of a weight in passes of their own."""
    part = "sums of weight gradients"
    steps = len(size.sizes)
    h = widths.h
    layer = 3 * size.draft.intermediate_size * h + h * widths.q
    right = widths.qkv * h
    tally.passes(part, "gate, up, down, o", times(layer * C, 2, 1), 3, steps - 1)
    tally.passes(part, "right half", times(right * C, 2, 1), 1, steps)
    tally.passes(part, "slices", Bytes(right * C, (2 * right + right) * C), 4)
    tally.passes(part, "norms", times(h * C, 2, 1), 1, 3 * (steps - 1) + 1)


class Chunk(NamedTuple):
    """Of the head's work."""

    labels: int
    pairs: int


def chunks(size: Size) -> list[Chunk]:
    """The head's chunks, as `head_loss.head_and_loss` cuts them on CUDA."""
    draft = size.draft
    head = torch.empty(draft.draft_vocab_size, 0, dtype=torch.bfloat16, device="meta")
    target_head = torch.empty(draft.vocab_size, 0, dtype=torch.bfloat16, device="meta")
    cuts = head_loss._chunks(size.first, head, target_head, head_loss._CUDA_CHUNK_BYTES)
    found = []
    for begin, end in cuts:
        found.append(Chunk(end - begin, int(size.first[end] - size.first[begin])))
    return found


def _head(tally: Tally, size: Size, widths: _Widths) -> None:
    """Head, teacher and loss in chunks of labels, each with the rows that are scored against it."""
    h = widths.h
    draft = size.draft
    states = size.states * h * C
    ht = draft.target_hidden_size
    v = draft.vocab_size
    c = draft.draft_vocab_size
    pieces = -(-c // max(1, head_loss._CUDA_CHUNK_BYTES // (C * h)))  # of the head's gradient

    head = "head and loss"
    tally.passes(head, "rows of all steps joined", copied(states), 1)
    tally.passes(head, "zeros", Bytes(0, states + c * h * F), 2)
    tally.passes("teacher", "hidden states of labels", copied(size.labels * ht * C), 1)
    for labels, rows in chunks(size):
        tally.passes(head, "rows of labels", copied(rows * h * C), 1)
        tally.passes(head, "their labels and factors", times(rows * F, 4, 3), 2)
        tally.product(head, "logits", rows, h, c)
        tally.product("teacher", "logits", labels, ht, v)
        moved = Bytes(labels * (v + c) * C, labels * 4 * F)
        tally.passes("teacher", "maximum and sums", moved, 1)

        # Twice the draft's row and the draft's columns of the teacher's row; the gradient replaces
        # the logits.
        moved = Bytes(4 * rows * c * C, rows * c * C + rows * 4 * F)
        tally.passes(head, "scores", moved, 6)

        tally.product(head, "gradient by rows", rows, c, h)
        tally.passes(head, "rows times factors", times(rows * h, 2 * (C + F), 2 * (C + F)), 4)
        tally.passes(head, "rows written", copied(rows * h * C), 1)
        tally.product(head, "gradient by head", c, rows, h)
        moved = Bytes(c * h * (F + C), c * h * F)
        tally.passes(head, "head gradient summed in fp32", moved, pieces)
    tally.passes(head, "head gradient rounded", Bytes(c * h * F, c * h * C), 1)
    moved = copied(states + c * h * C)
    tally.passes(head, "gradients times the loss's own", moved, 2)


def _optimizer(tally: Tally, size: Size) -> None:
    """A pass an operation over all weights; AdamW's in blocks of 16 MiB of a leaf."""
    n = size.weights
    leaves = shapes(size.draft).values()
    count = len(leaves)
    part = "gradients to fp32, norm, clip"
    tally.passes(part, "to fp32", Bytes(n * C, n * F), count)
    tally.passes(part, "norm", Bytes(n * F, 0), count + 2)
    tally.passes(part, "clip", copied(n * F), count + 4)

    blocks = 0
    for rows, *columns in leaves:
        block_rows = max(1, _BLOCK_BYTES // (F * prod(columns)))
        blocks += -(-rows // block_rows)
    tally.passes("AdamW", "seven passes", times(n * F, 11, 7), 7 * blocks)
    tally.passes("AdamW", "bf16 weights", Bytes(n * F, n * C), count)

    # Of weights and both moments, the smallest and the largest value; six kernels for each of the
    # two dtypes look at these, and two join the flags.
    tally.passes("AdamW", "whether finite", Bytes(n * (C + 2 * F), 0), 3 * count + 14)

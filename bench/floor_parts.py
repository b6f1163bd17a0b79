"""What our training step runs on CUDA under the fast numerics, kernel by kernel: FLOPs, bytes, launches.

A kernel reads each input once and writes each output once, in whole elements; a gather reads what it
takes, `index_add_` also what it adds to, and a product with an addend copies that first. What a kernel
moves inside itself is left out: the flash backward's fp32 sums, sectors of 32 bytes of which a gather
needs two. `tests/bench/test_floors.py` holds the counts against the operations that PyTorch is asked for.
"""

from typing import NamedTuple

from eagle3fn.base.draft_config import DraftConfig
from eagle3fn.model import head_loss as fused
from eagle3fn.model.table import shapes
from eagle3fn.train.optimizer import _BLOCK_BYTES

F = 4  # bytes of fp32
C = 2  # bytes of the compute dtype, bf16
LOGSUMEXP = 7  # kernels that one call launches: its passes
INDEX_PUT = 8  # kernels that one call launches: a sort, and the sum


class Kernels(NamedTuple):
    """Kernels of one kind in one part of the step; FLOPs of matrix products and bytes of all `count` together."""

    part: str
    what: str
    count: int
    flops: int
    read: int
    written: int


class Size(NamedTuple):
    """What the counts depend on."""

    draft: DraftConfig
    batch: int
    seq: int
    k: int
    rows: int  # contributing rows T of the batch, filled up to buckets
    labels: int  # trained labels P, likewise

    @property
    def places(self) -> int:
        """B·S."""
        return self.batch * self.seq

    @property
    def weights(self) -> int:
        """Trained values."""
        return sum(
            size[0] * (size[1] if len(size) > 1 else 1) for size in shapes(self.draft).values()
        )


class Tally(list[Kernels]):
    """Kernels in the order in which they are added."""

    def product(
        self,
        part: str,
        what: str,
        rows: int,
        inner: int,
        columns: int,
        times: int = 1,
        plus: int = 0,
    ) -> None:
        """`(rows, inner)·(inner, columns)`; `plus`: 1 adds to the output in place, 2 to a copy of an addend."""
        out = rows * columns * C
        flops, read = 2 * rows * inner * columns, (rows * inner + inner * columns) * C + plus * out
        written = out + (out if plus == 2 else 0)
        self.append(
            Kernels(
                part, what, times * (1 + plus // 2), times * flops, times * read, times * written
            )
        )

    def linear(
        self,
        part: str,
        what: str,
        rows: int,
        inner: int,
        columns: int,
        times: int = 1,
        plus: int = 0,
    ) -> None:
        """A product and its two gradients."""
        self.product(part, what, rows, inner, columns, times, plus)
        self.product(part, what + ", gradients", rows, columns, inner, times)
        self.product(part, what + ", gradients", columns, rows, inner, times)

    def passes(
        self, part: str, what: str, read: float, written: float, count: int, times: int = 1
    ) -> None:
        """`count` kernels that together read and write so many bytes."""
        self.append(
            Kernels(part, what, count * times, 0, round(read) * times, round(written) * times)
        )


def fast_step(size: Size) -> Tally:
    """Our step under the fast numerics: `model/fast.py`, `fused*.py`, `flash_attention.py`, `train/step.py`."""
    tally, d, k = Tally(), size.draft, size.k
    h, i, m, t = d.hidden_size, d.intermediate_size, size.places, size.rows
    q, kv = d.num_attention_heads * d.head_dim, d.num_key_value_heads * d.head_dim
    w, places = q + 2 * kv, size.batch * (size.seq + k)

    # What depends on a place alone, once a batch.
    tally.passes("small", "plan, factors, metrics, tokens", k * t * C * 100, k * t * C * 70, 110)
    tally.passes(
        "weights side by side",
        "cat of q, k, v and of gate, up",
        *_both((w * 2 * h + 2 * i * h) * C),
        2,
    )
    tally.passes("weights side by side", "their gradients", *_both(w * 2 * h * C), 1)
    tally.product("projection", "fc", m, 3 * d.target_hidden_size, h)
    tally.product("projection", "fc, gradient", h, m, 3 * d.target_hidden_size)
    tally.passes("embedding", "gather", *_both(places * h * C), 3)
    tally.linear("embedding", "left half of q, k, v", places, h, w)
    tally.linear("step-0 keys and values", "right half of k, v", m, h, 2 * kv, plus=2)
    _step0(tally, size, h, q, kv, w, places)

    # Unroll.
    tally.linear("queries and output", "q of step 0", t, h, q, plus=2)
    tally.linear("queries and output", "q, k, v of later steps", t, h, w, k - 1, plus=1)
    tally.passes("queries and output", "rows of the left half", *_both(t * w * C), 1, k - 1)
    tally.linear("queries and output", "o", t, q, h, k, plus=2)
    part = "embedding"
    tally.passes(part, "gradient of the left half", 2 * t * w * C, (places + t) * w * C, 2, k - 1)
    tally.passes(part, "its sums", *_times(places * w * C, 2, 1), 1, k - 2)
    _rotary(tally, size, q, kv, w)
    _attention(tally, size, q, kv)
    tally.linear("MLP", "gate and up", t, h, 2 * i, k)
    tally.linear("MLP", "down", t, i, h, k, plus=2)
    tally.passes("MLP activation", "SwiGLU", *_times(t * i * C, 3, 2), 2, k)
    tally.passes("MLP activation", "SwiGLU again, its gradient", *_times(t * i * C, 11, 7), 7, k)
    _norms(tally, size, h, places)
    tally.passes("norms", "sums of hidden gradients", *_times(t * h * C, 2, 1), 1, k + 2 * (k - 1))
    each, right = 3 * i * h + h * q, w * h
    tally.passes("sums of weight gradients", "gate, up, down, o", *_times(each * C, 2, 1), 3, k - 1)
    tally.passes("sums of weight gradients", "right half", *_times(right * C, 2, 1), 1, k)
    tally.passes("sums of weight gradients", "slices", right * C, (2 * right + right) * C, 4)
    tally.passes("sums of weight gradients", "norms", 2 * h * C, h * C, 1, 3 * (k - 1) + 1)
    _head(tally, size, h)
    _optimizer(tally, size)
    return tally


def _both(count: float) -> tuple[float, float]:
    return count, count


def _times(count: float, read: float, written: float) -> tuple[float, float]:
    return count * read, count * written


def _step0(tally: Tally, size: Size, h: int, q: int, kv: int, w: int, places: int) -> None:
    part, m, t = "step-0 keys and values", size.places, size.rows
    tally.passes(
        "queries and output", "rows of hidden, norm, left half", *_both(t * (2 * h + q) * C), 3
    )
    # Gradients of rows laid back: of hidden and its norm, then of q's part of the left half, into its columns.
    rows, part_q = "queries and output", places * q
    laid = (m + 2 * t) * h * C, (2 * m + t) * h * C
    tally.passes(rows, "gradient of rows", *laid, 2 + INDEX_PUT, 2)
    read, written = 2 * part_q + 2 * t * q + 2 * places * w, 3 * part_q + t * q + 2 * places * w
    tally.passes(rows, "gradient of the left half", read * C, written * C, 6)
    read, written = m * (2 * kv + w) + 2 * places * w, m * (2 * kv + 2 * w) + 2 * places * w
    tally.passes(part, "gradient of the left half", read * C, written * C, 5)
    tally.passes(part, "sums of hidden gradients", *_times(m * h * C, 4, 2), 2)
    tally.passes(
        part, "sums of key and value gradients", *_times(2 * m * kv * C, 2, 1), 2, size.k - 1
    )


def _rotary(tally: Tally, size: Size, q: int, kv: int, w: int) -> None:
    """Forward: two products, a turned copy in two passes, a sum. Backward: the same, and slices laid into zeros."""
    part, t, k, e = "rotary", size.rows, size.k, size.draft.head_dim
    table = size.batch * size.seq + k
    tally.passes(part, "tables, made on the CPU", 0, 2 * table * e * C, 2)
    tally.passes(part, "places of tables", *_both(2 * t * e * C), 4, k)
    tally.passes(part, "places of tables", *_both(2 * size.places * e * C), 2)
    for x, times in ((size.places * kv, 1), (t * q, 1), (t * (q + kv), k - 1)):
        tally.passes(part, "forward", *_times(x * C, 5.5, 4.5), 5, times)
        tally.passes(part, "backward", *_times(x * C, 7.5, 7.5), 9, times)
    x = t * (q + kv)
    read, written = t * (q + 2 * kv) + 3 * x + 2 * t * w, t * (q + 2 * kv) + 4 * x + 3 * t * w
    tally.passes(part, "slices", read * C, written * C, 10, k - 1)
    tally.passes(part, "slices", *_times(size.places * kv * C, 6, 8), 5)
    tally.passes(part, "own values kept", *_both(t * kv * C), 1, k - 1)


def _attention(tally: Tally, size: Size, q: int, kv: int) -> None:
    """Flash over whole sequences, each query head with a key of its own, and the rows' own later keys beside it."""
    flash, merge, d, k = "attention, flash", "attention, own keys", size.draft, size.k
    m, t, n, wide = size.places, size.rows, d.num_attention_heads, F // C
    pairs = (
        size.batch * size.seq * size.seq // 2
    )  # half of the square, as flash kernels are counted
    laid, row, own, sums = m * q * C, t * q * C, t * kv * C, t * n * F
    tally.passes(
        flash, "queries laid out, heads expanded", row + 2 * m * kv * C, laid + row + 2 * laid, 4, k
    )
    tally.append(
        Kernels(flash, "forward", k, k * 4 * pairs * q, k * 3 * laid, k * (laid + m * n * F))
    )
    tally.passes(flash, "rows taken", *_both(row + sums), 2, k)
    read, written = 4 * row + sums + 2 * m * kv * C + m * n * F, 5 * laid + 3 * row + 2 * m * n * F
    tally.passes(flash, "all laid out, heads expanded", read, written + sums, 11, k)
    read = 5 * laid + m * n * F
    tally.append(Kernels(flash, "backward", 3 * k, k * 10 * pairs * q, k * read, k * 3 * laid))
    tally.passes(flash, "rows and groups", 2 * row + 2 * laid, 2 * row + 2 * m * kv * C, 8, k)
    tally.passes(
        merge,
        "merge",
        (1 + 2 * wide) * row + 8 * sums,
        (1 + 2 * wide) * row + 6 * sums,
        6 + LOGSUMEXP,
        k,
    )
    tally.passes(merge, "gradient by own scores", (2 + 2 * wide) * row, 2 * wide * row + sums, 3, k)
    for i in range(1, k):
        small = i * sums
        tally.passes(
            merge, "own scores", i * (2 * row + own) + 4 * small, i * row + 4 * small, 2 * i + 5
        )
        tally.passes(merge, "own values", i * (wide * row + own) + small, i * wide * row, i)
        read, written = i * (4 * row + 2 * own) + 9 * small, i * 2 * row + 8 * small
        tally.passes(merge, "own scores, gradients", read, written, 4 * i + 11)
        read, written = i * (5 * row + own) + 2 * small, i * (3 * row + 2 * own)
        tally.passes(merge, "own keys, gradients", read, written, 5 * i)
    tally.passes(merge, "sums of own gradients", *_times(own, 2, 1), 1, (k - 1) * (k - 2))


def _norms(tally: Tally, size: Size, h: int, places: int) -> None:
    """Each norm in fp32, a pass an operation: eight forward, eleven backward; two kinds are made again."""
    k, t = size.k, size.rows
    for what, rows, forward, backward in (
        ("input", places, 1, 1),
        ("hidden, step 0", size.places, 1, 1),
        ("hidden, later steps", t, 2 * (k - 1), k - 1),
        ("after attention", t, 2 * k, k),
        ("final", t, k, k),
    ):
        tally.passes("norms", what, *_times(rows * h, C + 5 * F, C + 4 * F), 8, forward)
        tally.passes(
            "norms", what + ", gradient", *_times(rows * h, 2 * C + 11 * F, C + 7 * F), 11, backward
        )


def chunks(size: Size) -> list[int]:
    """Labels of each chunk of the head, as `fused.head_and_kl` cuts them on CUDA."""
    d = size.draft
    most = max(1, fused._CUDA_CHUNK_BYTES // (C * (size.k * d.draft_vocab_size + d.vocab_size)))
    equal = -(-size.labels // -(-size.labels // most))
    return [min(equal, size.labels - start) for start in range(0, size.labels, equal)]


def _head(tally: Tally, size: Size, h: int) -> None:
    part, d, k = "head and loss", size.draft, size.k
    ht, v, c = d.target_hidden_size, d.vocab_size, d.draft_vocab_size
    pieces = -(-c // max(1, fused._CUDA_CHUNK_BYTES // (C * h)))
    tally.passes(part, "rows of all steps stacked", *_both(k * size.rows * h * C), 1)
    tally.passes(part, "zeros", 0, k * size.rows * h * C + c * h * F, 2)
    tally.passes("teacher", "hidden states of labels", *_times(size.labels * ht * C, 2, 2), 3)
    for labels in chunks(size):
        rows = k * labels
        tally.passes(part, "rows of labels", *_both(rows * h * C), 2)
        tally.product(part, "logits", rows, h, c)
        tally.product("teacher", "logits", labels, ht, v)
        tally.passes("teacher", "maximum and sums", labels * (v + c) * C, labels * 4 * F, 1)
        # Twice the student's row and the draft's columns of the teacher's; the gradient over the logits.
        tally.passes(part, "scores", 4 * rows * c * C, rows * c * C + rows * 4 * F, 3)
        tally.product(part, "gradient by rows", rows, c, h)
        tally.passes(part, "rows times factors", *_times(rows * h, 2 * (C + F), 2 * (C + F)), 4)
        tally.passes(part, "rows added", *_times(rows * h * C, 2, 1), 1)
        tally.product(part, "gradient by head", c, rows, h)
        tally.passes(part, "head gradient summed in fp32", c * h * (F + C), c * h * F, pieces)
    tally.passes(part, "head gradient rounded", c * h * F, c * h * C, 1)
    tally.passes(part, "gradients times the loss's own", *_both((k * size.rows + c) * h * C), 2)


def _optimizer(tally: Tally, size: Size) -> None:
    """A pass an operation over all weights; AdamW's in blocks of 16 MiB of a leaf."""
    n, leaves = size.weights, shapes(size.draft).values()
    tally.passes("gradients to fp32, norm, clip", "to fp32", n * C, n * F, len(leaves))
    tally.passes("gradients to fp32, norm, clip", "norm", n * F, 0, len(leaves) + 2)
    tally.passes("gradients to fp32, norm, clip", "clip", n * F, n * F, len(leaves) + 4)
    blocks = sum(
        -(-leaf[0] // max(1, _BLOCK_BYTES // (F * (leaf[1] if len(leaf) > 1 else 1))))
        for leaf in leaves
    )
    tally.passes("AdamW", "seven passes", *_times(n * F, 11, 7), 7 * blocks)
    tally.passes("AdamW", "bf16 weights", n * F, n * C, len(leaves))

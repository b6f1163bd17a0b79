"""What SpecForge's step runs on CUDA, coarsely: all rows at every unroll step, at the commit of its pull request 600.

Read from its source, not traced: `flex_attention` in blocks of 128 keys, its Triton loss, norms and
rotary compiled to one kernel each, what is not compiled a pass an operation. How many kernels the
compiled parts are is a guess.
"""

from bench.floor_parts import C, F, Size, Tally
from eagle3fn.model.table import shapes

BLOCK = 128  # of flex_attention's mask


def dense_step(size: Size) -> Tally:
    """All kernels of one update of a batch of `size`; `size.rows` and `size.labels` count for nothing but the mask."""
    tally, d, k, m = Tally(), size.draft, size.k, size.places
    h, i, q = d.hidden_size, d.intermediate_size, d.num_attention_heads * d.head_dim
    kv = d.num_key_value_heads * d.head_dim
    tally.product("projection", "fc", m, 3 * d.target_hidden_size, h)
    tally.product("projection", "fc, gradient", h, m, 3 * d.target_hidden_size)
    tally.linear("queries, keys, values, output", "q", m, 2 * h, q, k)
    tally.linear("queries, keys, values, output", "k and v", m, 2 * h, kv, 2 * k)
    tally.linear("queries, keys, values, output", "o", m, q, h, k)
    tally.passes(
        "queries, keys, values, output",
        "sums of input gradients",
        4 * 2 * m * h * C,
        2 * 2 * m * h * C,
        2,
        k,
    )
    _attention(tally, size, q, kv)
    tally.linear("MLP", "gate and up", m, h, i, 2 * k)
    tally.linear("MLP", "down", m, i, h, k)
    inner = m * i * C
    tally.passes("MLP activation", "silu, product", 3 * inner, 2 * inner, 2, k)
    tally.passes("MLP activation", "gradients", 6 * inner, 3 * inner, 3, k)
    row = m * h * C
    tally.passes("norms", "norms, embeddings, cat, residuals", 13 * row, 9 * row, 8, k)
    tally.passes("norms", "gradients", 18 * row, 11 * row, 12, k)
    _loss(tally, size, h)
    n = size.weights
    tally.passes(
        "sums of weight gradients", "over the steps", 2 * n * C, n * C, len(shapes(d)) - 1, k - 1
    )
    _optimizer(tally, n, len(shapes(d)))
    return tally


def _attention(tally: Tally, size: Size, q: int, kv: int) -> None:
    m, k = size.places, size.k
    blocks = -(-size.seq // BLOCK)
    causal = size.batch * blocks * (blocks + 1) // 2 * BLOCK * BLOCK
    for i in range(k):
        pairs, keys = causal + i * m * BLOCK, (i + 1) * 2 * m * kv * C
        laid = m * q * C
        tally.product("attention", "forward", pairs, 2, q)
        tally[-1] = tally[-1]._replace(read=laid + keys, written=laid)
        tally.product("attention", "backward", pairs, 5, q)
        tally[-1] = tally[-1]._replace(read=4 * laid + keys, written=laid + keys, count=3)
        tally.passes(
            "attention", "keys so far copied, their gradients summed", 3 * keys, 2 * keys, 6
        )
        tally.passes("attention", "rotary, block mask, layouts", 8 * laid, 8 * laid, 20)


def _loss(tally: Tally, size: Size, h: int) -> None:
    d, k, m = size.draft, size.k, size.places
    v, c = d.vocab_size, d.draft_vocab_size
    taught = size.labels / m  # the rows that the Triton kernels do not skip
    tally.product("teacher", "logits", m, d.target_hidden_size, v)
    tally.passes("teacher", "to fp32, argmax, log-sum-exp", m * v * (C + 3 * F), m * v * F, 4)
    tally.passes(
        "teacher", "draft columns, two softmaxes, padding", 8 * m * c * F, 6 * m * c * F, 8
    )
    tally.linear("head and loss", "logits", m, h, c, k)
    if size.batch > 1:  # else the slice of a step is a view
        copied = 2 * m * c * F
        tally.passes("head and loss", "p and q of a step copied", copied, copied, 2, k)
    tally.passes(
        "head and loss",
        "argmax, softmax, acceptance",
        m * c * (2 * C + 4 * F),
        3 * m * c * F,
        12,
        k,
    )
    loss, gradient = taught * m * c * (2 * C + F), taught * m * c * (C + 2 * F)
    tally.passes("head and loss", "Triton loss", loss, 0, 4, k)
    tally.passes("head and loss", "Triton gradient", gradient, m * c * C, 2, k)


def _optimizer(tally: Tally, n: int, leaves: int) -> None:
    """`BF16Optimizer`: foreach AdamW on fp32 copies."""
    lists = -(-n // (320 * 65536))  # blocks of a foreach launch
    tally.passes("gradients to fp32, norm, clip", "to fp32", n * C, n * F, leaves)
    tally.passes("gradients to fp32, norm, clip", "norm, clip", 2 * n * F, n * F, 2 * lists + 10)
    tally.passes("AdamW", "seven passes", 11 * n * F, 7 * n * F, 7 * lists)
    tally.passes("AdamW", "bf16 weights", n * (F + C), 2 * n * C, 2 * leaves)

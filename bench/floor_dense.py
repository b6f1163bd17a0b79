"""What SpecForge's step runs on CUDA, coarsely: all rows at every unroll step.

Read from the source of its pull request 600, not traced: `flex_attention` in blocks of 128 keys,
its Triton loss, norms and rotary compiled to one kernel each, and a pass an operation for what is
not compiled. How many kernels the compiled parts are is a guess.
"""

from bench.floor_parts import Bytes, C, F, Kernels, Size, Tally
from eagle3fn.model.table import shapes

BLOCK = 128  # of flex_attention's mask
FOREACH_VALUES = 320 * 65536  # of the blocks of one foreach launch


def dense_step(size: Size) -> Tally:
    """All kernels of one update. Of `size.rows` nothing depends, of `labels` the loss alone."""
    tally = Tally()
    draft = size.draft
    k = size.k
    m = size.places
    h = draft.hidden_size
    i = draft.intermediate_size
    q = draft.num_attention_heads * draft.head_dim
    kv = draft.num_key_value_heads * draft.head_dim

    # Layer.
    tally.product("projection", "fc", m, 3 * draft.target_hidden_size, h)
    tally.product("projection", "fc, gradient", h, m, 3 * draft.target_hidden_size)
    part = "queries, keys, values, output"
    tally.linear(part, "q", m, 2 * h, q, k)
    tally.linear(part, "k and v", m, 2 * h, kv, 2 * k)
    tally.linear(part, "o", m, q, h, k)
    pair = 2 * m * h * C  # of rows of both halves
    tally.passes(part, "sums of input gradients", Bytes(4 * pair, 2 * pair), 2, k)
    _attention(tally, size, q, kv)
    tally.linear("MLP", "gate and up", m, h, i, 2 * k)
    tally.linear("MLP", "down", m, i, h, k)
    inner = m * i * C
    tally.passes("MLP activation", "silu, product", Bytes(3 * inner, 2 * inner), 2, k)
    tally.passes("MLP activation", "gradients", Bytes(6 * inner, 3 * inner), 3, k)
    row = m * h * C
    tally.passes("norms", "norms, embeddings, cat, residuals", Bytes(13 * row, 9 * row), 8, k)
    tally.passes("norms", "gradients", Bytes(18 * row, 11 * row), 12, k)

    # Loss, sums over steps, update.
    _loss(tally, size, h)
    n = size.weights
    leaves = len(shapes(draft))
    part = "sums of weight gradients"
    tally.passes(part, "over the steps", Bytes(2 * n * C, n * C), leaves - 1, k - 1)
    _optimizer(tally, n, leaves)
    return tally


def _attention(tally: Tally, size: Size, q: int, kv: int) -> None:
    """Blocks that the causal mask leaves, and each row's own later keys in blocks of their own."""
    part = "attention"
    m = size.places
    blocks = -(-size.seq // BLOCK)
    causal = size.batch * blocks * (blocks + 1) // 2 * BLOCK * BLOCK
    queries = m * q * C
    for i in range(size.k):
        pairs = causal + i * m * BLOCK
        keys = (i + 1) * 2 * m * kv * C
        forward = 2 * pairs * 2 * q
        backward = 2 * pairs * 5 * q
        tally.append(Kernels(part, "forward", 1, forward, queries + keys, queries))
        tally.append(Kernels(part, "backward", 3, backward, 4 * queries + keys, queries + keys))
        copied = "keys so far copied, their gradients summed"
        tally.passes(part, copied, Bytes(3 * keys, 2 * keys), 6)
        tally.passes(part, "rotary, block mask, layouts", Bytes(8 * queries, 8 * queries), 20)


def _loss(tally: Tally, size: Size, h: int) -> None:
    draft = size.draft
    k = size.k
    m = size.places
    v = draft.vocab_size
    c = draft.draft_vocab_size
    taught = size.labels / m  # share of the rows that the Triton kernels do not skip

    part = "teacher"
    tally.product(part, "logits", m, draft.target_hidden_size, v)
    tally.passes(part, "to fp32, argmax, log-sum-exp", Bytes(m * v * (C + 3 * F), m * v * F), 4)
    what = "draft columns, two softmaxes, padding"
    tally.passes(part, what, Bytes(8 * m * c * F, 6 * m * c * F), 8)

    part = "head and loss"
    tally.linear(part, "logits", m, h, c, k)
    if size.batch > 1:
        # In a batch of one the slice of a step is a view.
        copied = 2 * m * c * F
        tally.passes(part, "p_draft and p_full of a step copied", Bytes(copied, copied), 2, k)
    read = m * c * (2 * C + 4 * F)
    tally.passes(part, "argmax, softmax, acceptance", Bytes(read, 3 * m * c * F), 12, k)
    tally.passes(part, "Triton loss", Bytes(taught * m * c * (2 * C + F), 0), 4, k)
    tally.passes(part, "Triton gradient", Bytes(taught * m * c * (C + 2 * F), m * c * C), 2, k)


def _optimizer(tally: Tally, n: int, leaves: int) -> None:
    """`BF16Optimizer`: foreach AdamW on fp32 copies, `n` values in `leaves` tensors."""
    part = "gradients to fp32, norm, clip"
    lists = -(-n // FOREACH_VALUES)
    tally.passes(part, "to fp32", Bytes(n * C, n * F), leaves)
    tally.passes(part, "norm, clip", Bytes(2 * n * F, n * F), 2 * lists + 10)
    tally.passes("AdamW", "seven passes", Bytes(11 * n * F, 7 * n * F), 7 * lists)
    tally.passes("AdamW", "bf16 weights", Bytes(n * (F + C), 2 * n * C), 2 * leaves)

"""The scores of the fast profile's head and loss as Triton kernels: one program a label, then one a student row.

Rows are read in blocks, the teacher's twice and a student's twice, and nothing as wide as a row is written but the
gradient, over the logits. The same quantities as `fused.score`, to rounding. Triton is imported at the first call.
"""

import functools
from typing import Any

import torch
from torch import Tensor

_BLOCK, _WARPS = 4096, 8
tl: Any = None  # triton.language, once `_kernels` has run: the kernels' names are looked up in this module


def score(
    logits: Tensor, z: Tensor, t2d: Tensor, kept: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`fused.score` of bf16, fp16 or fp32 logits; on CUDA, or interpreted on the CPU. Overwrites `logits`.

    Args:
        logits: the student's, `(K, P, D)`, contiguous.
        z: the teacher's, `(P, V)`, contiguous.
        t2d: `(V,)` bool.
        kept: `(D,)` int64, the target ids of the draft vocabulary.

    Returns:
        KL, correctness and acceptance `(K, P)`, and `known` `(P,)`.
    """
    (k, labels, columns), size = logits.shape, z.shape[1]
    teach, grade = _kernels()
    every, ours, kl, accept = (
        logits.new_empty(n, dtype=torch.float32) for n in (labels, labels, *(k * labels,) * 2)
    )
    token, said = (logits.new_empty(n, dtype=torch.int64) for n in (labels, k * labels))
    width = {"BLOCK": min(_BLOCK, 1 << (size - 1).bit_length()), "num_warps": _WARPS}
    with torch.cuda.device_of(logits):  # Triton launches on the current device
        teach[(labels,)](z, kept, every, ours, token, size, columns, **width)
        grade[(labels * k,)](
            logits, z, kept, every, ours, kl, said, accept, k, labels, size, columns, **width
        )
    kl, said, accept = (x.view(k, labels) for x in (kl, said, accept))
    return kl, kept[said] == token, accept, t2d[token]


@functools.cache
def _kernels() -> tuple[Any, Any]:  # noqa: PLR0915
    global tl  # noqa: PLW0603
    import triton
    import triton.language as tl

    @triton.jit
    def teach(z, kept, every, ours, token, size, columns, BLOCK: tl.constexpr):  # pyright: ignore
        """A label's log-sum-exp over all logits and over the draft's, and the place of the largest."""
        label = tl.program_id(0).to(tl.int64)
        z += label * size
        top = float("-inf")
        total = 0.0
        place = 0
        for start in range(0, size, BLOCK):
            column = start + tl.arange(0, BLOCK)
            x = tl.load(z + column, mask=column < size, other=float("-inf")).to(tl.float32)
            best = tl.max(x, axis=0)
            place = tl.where(
                best > top, tl.min(tl.where(x == best, column, size - 1), axis=0), place
            )
            higher = tl.maximum(top, best)
            total = total * tl.exp(top - higher) + tl.sum(tl.exp(x - higher), axis=0)
            top = higher
        tl.store(every + label, top + tl.log(total))
        tl.store(token + label, place)
        top = float("-inf")  # the draft's own: its logits may lie far below the largest
        total = 0.0
        for start in range(0, columns, BLOCK):
            column = start + tl.arange(0, BLOCK)
            real = column < columns
            at = tl.load(kept + column, mask=real, other=0)
            x = tl.load(z + at, mask=real, other=float("-inf")).to(tl.float32)
            higher = tl.maximum(top, tl.max(x, axis=0))
            total = total * tl.exp(top - higher) + tl.sum(tl.exp(x - higher), axis=0)
            top = higher
        tl.store(ours + label, top + tl.log(total))

    @triton.jit
    def grade(
        logits,
        z,
        kept,
        every,
        ours,
        kl,
        said,
        accept,
        steps,
        labels,
        size,
        columns,
        BLOCK: tl.constexpr,
    ):  # pyright: ignore
        """A student row against its label: KL, largest logit's place, acceptance; the gradient over the logits.

        Steps run fastest: the rows of one label read the same teacher's row one after another, out of the cache.
        """
        pair = tl.program_id(0).to(tl.int64)
        label = pair // steps
        row = pair % steps * labels + label
        logits += row * columns
        z += label * size
        all_sum = tl.load(every + label)
        our_sum = tl.load(ours + label)
        top = float("-inf")
        total = 0.0
        dot = 0.0
        place = 0
        for start in range(0, columns, BLOCK):
            column = start + tl.arange(0, BLOCK)
            real = column < columns
            x = tl.load(logits + column, mask=real, other=float("-inf")).to(tl.float32)
            at = tl.load(kept + column, mask=real, other=0)
            p = tl.exp(tl.load(z + at, mask=real, other=float("-inf")).to(tl.float32) - our_sum)
            dot += tl.sum(p * tl.where(real, x, 0.0), axis=0)
            best = tl.max(x, axis=0)
            place = tl.where(
                best > top, tl.min(tl.where(x == best, column, columns - 1), axis=0), place
            )
            higher = tl.maximum(top, best)
            total = total * tl.exp(top - higher) + tl.sum(tl.exp(x - higher), axis=0)
            top = higher
        log_sum = top + tl.log(total)
        shared = 0.0
        for start in range(0, columns, BLOCK):
            column = start + tl.arange(0, BLOCK)
            real = column < columns
            x = tl.load(logits + column, mask=real, other=float("-inf")).to(tl.float32)
            at = tl.load(kept + column, mask=real, other=0)
            target = tl.load(z + at, mask=real, other=float("-inf")).to(tl.float32)
            student = tl.exp(x - log_sum)
            shared += tl.sum(tl.minimum(student, tl.exp(target - all_sum)), axis=0)
            tl.store(logits + column, student - tl.exp(target - our_sum), mask=real)
        tl.store(kl + row, log_sum - dot)
        tl.store(said + row, place)
        tl.store(accept + row, shared)

    return teach, grade

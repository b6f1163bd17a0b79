"""`head_loss.score` of the KL as two Triton kernels: a program a label, then one a pair.

The label's kernel reduces the teacher's logits to two log-sum-exps and an argmax. The draft row's
kernel reads its logits twice in blocks of columns: first for log-sum-exp and argmax, then for KL,
acceptance and the gradient, which it writes over the logits. Nothing else as wide as a row is
written.

Triton is imported at the first call.
"""

# pyright: reportInvalidTypeForm=false
# `tl.constexpr` is a type that pyright cannot see.

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eagle3fn.model.head_loss import PairScores

_BLOCK = 4096  # columns that a program reads at once
_WARPS = 8
# triton.language. `_kernels` sets it, and `reduce_row`: Triton looks a kernel's names up in this
# module.
tl: Any = None


def score(
    logits: Tensor, z: Tensor, label: Tensor, first: np.ndarray, t2d: Tensor, kept: Tensor
) -> PairScores:
    """`head_loss.score` of the KL, to rounding: on CUDA, or interpreted on the CPU.

    Overwrites `logits` with the KL's gradient by them.

    Args:
        logits: the draft's, `(X, D)`, contiguous, by label; bf16, fp16 or fp32.
        z: the target's, `(P, V)`, contiguous.
        label: `(X,)` int64, index into `z`, ascending.
        first: not read.
        t2d: `(V,)` bool.
        kept: `(D,)` int64, the target ids of the draft vocabulary.
    """
    x, d = logits.shape
    p, v = z.shape
    score_teacher, score_draft = _kernels()

    # The teacher's sums and token of each label; then what each draft row adds.
    full_sum, draft_sum = logits.new_empty(2, p, dtype=torch.float32)
    target_token = logits.new_empty(p, dtype=torch.int64)
    kl, accept = logits.new_empty(2, x, dtype=torch.float32)
    token = logits.new_empty(x, dtype=torch.int64)

    launch = {"BLOCK": min(_BLOCK, 1 << (v - 1).bit_length()), "num_warps": _WARPS}
    teacher = z, kept, full_sum, draft_sum
    with torch.cuda.device_of(logits):  # Triton launches on the current device
        score_teacher[(p,)](*teacher, target_token, v, d, **launch)
        score_draft[(x,)](logits, label, *teacher, kl, token, accept, v, d, **launch)
    correct = kept[token] == target_token[label]
    return PairScores(kl, correct, accept, t2d[target_token][label])


@functools.cache
def _kernels() -> tuple[Any, Any]:  # noqa: PLR0915
    """The kernels, with the sizes `V` and `D`."""
    global tl, reduce_row  # noqa: PLW0603
    import triton
    import triton.language as tl

    @triton.jit
    def reduce_row(logits, kept, size, GATHERS: tl.constexpr, BLOCK: tl.constexpr):
        """Log-sum-exp of `size` logits, and the lowest index of the largest, block by block.

        The logits are those at `kept` if `GATHERS`, else the first ones.
        """
        top = float("-inf")
        total = 0.0
        token = 0
        for start in range(0, size, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < size
            place = column
            if GATHERS:
                place = tl.load(kept + column, mask=inside, other=0)
            x = tl.load(logits + place, mask=inside, other=float("-inf")).to(tl.float32)

            # A block wins only with a higher maximum: of equal ones the first is kept.
            best = tl.max(x, axis=0)
            lowest = tl.min(tl.where(x == best, column, size - 1), axis=0)
            token = tl.where(best > top, lowest, token)

            # The sum of exponentials so far, by the maximum so far.
            higher = tl.maximum(top, best)
            total = total * tl.exp(top - higher) + tl.sum(tl.exp(x - higher), axis=0)
            top = higher
        return top + tl.log(total), token

    @triton.jit
    def score_teacher(z, kept, full_sum, draft_sum, target_token, V, D, BLOCK: tl.constexpr):
        """A label's log-sum-exp over all its logits and over the draft's, and its argmax.

        The draft vocabulary's logits have a maximum of their own: it may be far below the other.
        """
        label = tl.program_id(0).to(tl.int64)
        z += label * V
        log_sum, token = reduce_row(z, kept, V, False, BLOCK)
        draft_log_sum, _ = reduce_row(z, kept, D, True, BLOCK)
        tl.store(full_sum + label, log_sum)
        tl.store(draft_sum + label, draft_log_sum)
        tl.store(target_token + label, token)

    @triton.jit
    def score_draft(
        logits, label, z, kept, full_sum, draft_sum, kl, token, accept, V, D, BLOCK: tl.constexpr
    ):
        """A draft row against its label: KL, argmax, acceptance; the gradient over the logits.

        Pairs are ordered by label: its rows read the same teacher one after another, from the
        cache.
        """
        pair = tl.program_id(0).to(tl.int64)
        own = tl.load(label + pair)
        logits += pair * D
        z += own * V
        label_full_sum = tl.load(full_sum + own)
        label_draft_sum = tl.load(draft_sum + own)
        log_sum, draft_token = reduce_row(logits, kept, D, False, BLOCK)

        # Once more: Σ p_draft · l, the acceptance, and the gradient written over the logits.
        dot = 0.0
        accepted = 0.0
        for start in range(0, D, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < D
            x = tl.load(logits + column, mask=inside, other=float("-inf")).to(tl.float32)
            token_id = tl.load(kept + column, mask=inside, other=0)
            target = tl.load(z + token_id, mask=inside, other=float("-inf")).to(tl.float32)
            draft = tl.exp(x - log_sum)
            p_draft = tl.exp(target - label_draft_sum)
            dot += tl.sum(p_draft * tl.where(inside, x, 0.0), axis=0)
            accepted += tl.sum(tl.minimum(draft, tl.exp(target - label_full_sum)), axis=0)
            tl.store(logits + column, draft - p_draft, mask=inside)

        tl.store(kl + pair, log_sum - dot)
        tl.store(token + pair, draft_token)
        tl.store(accept + pair, accepted)

    return score_teacher, score_draft

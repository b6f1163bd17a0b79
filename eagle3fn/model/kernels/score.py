"""`head_loss.score` of the KL as two Triton kernels: a program for each label, then for each pair.

The label's kernel reduces the teacher's logits to two log-sum-exps and an argmax. The draft row's
kernel then reads its logits twice in blocks of columns, with a running maximum and sum: first for
log-sum-exp, KL and argmax, then for the acceptance and the gradient, which it writes over the
logits. Nothing else as wide as a row is written.

Triton is imported at the first call.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from eagle3fn.model.head_loss import PairScores

_BLOCK = 4096  # columns that a program reads at once
_WARPS = 8
tl: Any = (
    None  # triton.language, set by `_kernels`: Triton looks a kernel's names up in this module
)


def score(logits: Tensor, z: Tensor, t2d: Tensor, kept: Tensor) -> PairScores:
    """`head_loss.score` of the KL, to rounding; on CUDA, or interpreted on the CPU.

    Takes bf16, fp16 or fp32. Overwrites `logits` with the KL's gradient by them.

    Args:
        logits: the draft's, `(K, P, D)`, contiguous.
        z: the target's, `(P, V)`, contiguous.
        t2d: `(V,)` bool.
        kept: `(D,)` int64, the target ids of the draft vocabulary.
    """
    k, labels, draft_size = logits.shape
    target_size = z.shape[1]
    score_teacher, score_draft = _kernels()

    # The teacher's sums and token of each label; then what each draft row adds.
    full_sum = logits.new_empty(labels, dtype=torch.float32)
    draft_sum = logits.new_empty(labels, dtype=torch.float32)
    kl = logits.new_empty(k * labels, dtype=torch.float32)
    accept = logits.new_empty(k * labels, dtype=torch.float32)
    target_token = logits.new_empty(labels, dtype=torch.int64)
    draft_token = logits.new_empty(k * labels, dtype=torch.int64)

    block = min(_BLOCK, 1 << (target_size - 1).bit_length())
    launch = {"BLOCK": block, "num_warps": _WARPS}
    with torch.cuda.device_of(logits):  # Triton launches on the current device
        score_teacher[(labels,)](
            z, kept, full_sum, draft_sum, target_token, target_size, draft_size, **launch
        )
        score_draft[(labels * k,)](
            logits,
            z,
            kept,
            full_sum,
            draft_sum,
            kl,
            draft_token,
            accept,
            k,
            labels,
            target_size,
            draft_size,
            **launch,
        )

    kl, draft_token, accept = (x.view(k, labels) for x in (kl, draft_token, accept))
    correct = kept[draft_token] == target_token
    return PairScores(kl, correct, accept, t2d[target_token])


@functools.cache
def _kernels() -> tuple[Any, Any]:  # noqa: PLR0915
    global tl  # noqa: PLW0603
    import triton
    import triton.language as tl

    @triton.jit
    def score_teacher(  # pyright: ignore
        z,
        kept,
        full_sum,
        draft_sum,
        target_token,
        target_size,
        draft_size,
        BLOCK: tl.constexpr,  # pyright: ignore
    ):
        """A label's log-sum-exp over all its logits and over the draft's, and its argmax."""
        label = tl.program_id(0).to(tl.int64)
        z += label * target_size

        # All logits: log-sum-exp and the lowest index of the largest, block by block.
        top = float("-inf")
        total = 0.0
        token = 0
        for start in range(0, target_size, BLOCK):
            column = start + tl.arange(0, BLOCK)
            x = tl.load(z + column, mask=column < target_size, other=float("-inf")).to(tl.float32)
            best = tl.max(x, axis=0)
            is_higher = best > top
            lowest = tl.min(tl.where(x == best, column, target_size - 1), axis=0)
            token = tl.where(is_higher, lowest, token)
            higher = tl.maximum(top, best)
            total = total * tl.exp(top - higher) + tl.sum(tl.exp(x - higher), axis=0)
            top = higher
        tl.store(full_sum + label, top + tl.log(total))
        tl.store(target_token + label, token)

        # The draft vocabulary's logits have a maximum of their own: it may be far below the other.
        top = float("-inf")
        total = 0.0
        for start in range(0, draft_size, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < draft_size
            token_id = tl.load(kept + column, mask=inside, other=0)
            x = tl.load(z + token_id, mask=inside, other=float("-inf")).to(tl.float32)
            higher = tl.maximum(top, tl.max(x, axis=0))
            total = total * tl.exp(top - higher) + tl.sum(tl.exp(x - higher), axis=0)
            top = higher
        tl.store(draft_sum + label, top + tl.log(total))

    @triton.jit
    def score_draft(  # pyright: ignore
        logits,
        z,
        kept,
        full_sum,
        draft_sum,
        kl,
        draft_token,
        accept,
        steps,
        labels,
        target_size,
        draft_size,
        BLOCK: tl.constexpr,  # pyright: ignore
    ):
        """A draft row against its label: KL, argmax, acceptance; the gradient over the logits.

        Steps run fastest: the rows of one label read the same teacher one after another, from
        the cache.
        """
        pair = tl.program_id(0).to(tl.int64)
        label = pair // steps
        row = pair % steps * labels + label
        logits += row * draft_size
        z += label * target_size
        label_full_sum = tl.load(full_sum + label)
        label_draft_sum = tl.load(draft_sum + label)

        # First pass: log-sum-exp, argmax, and the dot product of teacher and logits.
        top = float("-inf")
        total = 0.0
        dot = 0.0
        token = 0
        for start in range(0, draft_size, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < draft_size
            x = tl.load(logits + column, mask=inside, other=float("-inf")).to(tl.float32)
            token_id = tl.load(kept + column, mask=inside, other=0)
            target = tl.load(z + token_id, mask=inside, other=float("-inf")).to(tl.float32)
            p_draft = tl.exp(target - label_draft_sum)
            dot += tl.sum(p_draft * tl.where(inside, x, 0.0), axis=0)
            best = tl.max(x, axis=0)
            is_higher = best > top
            lowest = tl.min(tl.where(x == best, column, draft_size - 1), axis=0)
            token = tl.where(is_higher, lowest, token)
            higher = tl.maximum(top, best)
            total = total * tl.exp(top - higher) + tl.sum(tl.exp(x - higher), axis=0)
            top = higher
        log_sum = top + tl.log(total)

        # Second pass: acceptance, and the gradient written over the logits.
        accepted = 0.0
        for start in range(0, draft_size, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < draft_size
            x = tl.load(logits + column, mask=inside, other=float("-inf")).to(tl.float32)
            token_id = tl.load(kept + column, mask=inside, other=0)
            target = tl.load(z + token_id, mask=inside, other=float("-inf")).to(tl.float32)
            draft = tl.exp(x - log_sum)
            accepted += tl.sum(tl.minimum(draft, tl.exp(target - label_full_sum)), axis=0)
            tl.store(logits + column, draft - tl.exp(target - label_draft_sum), mask=inside)

        tl.store(kl + row, log_sum - dot)
        tl.store(draft_token + row, token)
        tl.store(accept + row, accepted)

    return score_teacher, score_draft

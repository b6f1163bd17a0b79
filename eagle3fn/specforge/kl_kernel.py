"""The legacy loss as a Triton kernel: what the old tool runs on CUDA, with its shape of reduction.

One program a row, the row in one block of `next_power_of_2(D)` columns, maximum and sum in fp32. A sum's bits depend
on that shape and on the order of operations, so both are kept. Triton is imported when the kernel is first called.
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eagle3fn.base.errors import UserError
from eagle3fn.model.autograd import differentiable_once

LARGEST = 131_072
_WARPS = ((32_768, 32), (8_192, 16), (2_048, 8), (1, 4))  # from this block size on
tl: Any = None  # triton.language, once `_kernels` has run: the kernels' names are looked up in this module


def mean_kl(logits: Tensor, p: Tensor, mask: Tensor, n: Tensor | None = None) -> Tensor:
    """`losses.kl_loss` of `(B, S, D)` logits in bf16, fp16 or fp32, to rounding; on CUDA, or interpreted on the CPU.

    Differentiable once, by `logits`; a second derivative raises. Works under `vjp` and `vmap`.

    Raises:
        UserError: Triton is not installed, or `D` is beyond a block.
    """
    loss = _mean_kl(_Inputs(logits, p, mask[..., 0] != 0)).loss
    return loss if n is None else loss * (mask.numel() / n)


def launch_shape(columns: int) -> tuple[int, int]:
    """Block size and warps for a row of `columns`.

    Raises:
        UserError: the row is longer than a block may be.
    """
    if columns > LARGEST:
        raise UserError(
            f"draft_vocab_size = {columns}: the legacy loss on CUDA takes at most {LARGEST}; "
            "set objective.numerics='fast'"
        )
    block = 1 << (columns - 1).bit_length()
    return block, next(warps for least, warps in _WARPS if block >= least)


class _Inputs(NamedTuple):
    logits: Tensor  # (B, S, D)
    p: Tensor  # (B, S, D)
    mask: Tensor  # (B, S) bool


class _Outputs(NamedTuple):
    loss: Tensor  # ()
    top: Tensor  # (B·S,): each row's maximum
    total: Tensor  # (B·S,): each row's sum of exponentials


def _forward(inputs: _Inputs) -> _Outputs:
    """Mean over all rows, and each row's maximum and sum of exponentials for the backward."""
    logits, p, mask = (x.contiguous() for x in inputs)
    columns = logits.shape[-1]
    block, warps = launch_shape(columns)
    row, top, total = (torch.zeros(mask.numel(), device=logits.device) for _ in range(3))
    with torch.cuda.device_of(logits):  # Triton launches on the current device
        _kernels()[0][(mask.numel(),)](
            logits, p, mask, row, top, total, columns, BLOCK=block, num_warps=warps
        )
    return _Outputs(row.mean(), top, total)


def _backward(inputs: _Inputs, outputs: _Outputs, grads: _Outputs) -> dict[str, Tensor]:
    """The gradient by the logits, in their dtype; zero in rows that are masked."""
    logits, p, mask = inputs
    _, top, total = outputs
    out = logits.clone(memory_format=torch.contiguous_format)  # overwritten by the kernel
    columns = logits.shape[-1]
    block, warps = launch_shape(columns)
    with torch.cuda.device_of(logits):
        _kernels()[1][(mask.numel(),)](
            out, p.contiguous(), mask.contiguous(), grads.loss, 1 / mask.numel(), top, total, columns, BLOCK=block,
            num_warps=warps,
        )  # fmt: skip
    return {"logits": out}


_mean_kl = differentiable_once(
    _forward,
    _backward,
    inputs=_Inputs,
    outputs=_Outputs,
    without_gradient=["top", "total"],
    alternative="the CPU, or fp64",
)


@functools.cache
def _kernels() -> tuple[Any, Any]:  # noqa: C901, PLR0915
    """The forward and the backward kernel.

    Every pass over a row is a loop of one turn: written without the loop, the compiler would share loads and products
    between passes and round in other places.
    """
    global tl  # noqa: PLW0603
    try:
        import triton
        import triton.language as tl
    except ImportError:
        raise UserError(
            "objective.numerics = 'legacy' on CUDA computes its loss with Triton, which is not installed: "
            "pip install triton, or set objective.numerics='fast'"
        ) from None

    @triton.jit
    def forward(logits, p, mask, row_loss, row_top, row_total, columns, BLOCK: tl.constexpr):  # pyright: ignore
        row = tl.program_id(0).to(tl.int64)
        if tl.load(mask + row) == 0:
            return
        logits += row * columns
        p += row * columns
        top = float("-inf")
        total = 0.0
        for start in range(0, columns, BLOCK):
            column = start + tl.arange(0, BLOCK)
            real = column < columns
            z = tl.load(logits + column, mask=real, other=float("-inf")).to(tl.float32)
            higher = tl.maximum(top, tl.max(tl.where(real, z, float("-inf"))))
            total = total * tl.exp(top - higher) + tl.sum(tl.where(real, tl.exp(z - higher), 0.0))
            top = higher
        dot = 0.0
        for start in range(0, columns, BLOCK):
            column = start + tl.arange(0, BLOCK)
            real = column < columns
            z = tl.load(logits + column, mask=real, other=0.0).to(tl.float32)
            weight = tl.load(p + column, mask=real, other=0.0).to(tl.float32)
            dot += tl.sum(tl.where(real, weight * (z - top - tl.log(total)), 0.0))
        tl.store(row_loss + row, -dot)
        tl.store(row_top + row, top)
        tl.store(row_total + row, total)

    @triton.jit
    def backward(logits, p, mask, grad, share, row_top, row_total, columns, BLOCK: tl.constexpr):  # pyright: ignore
        row = tl.program_id(0).to(tl.int64)
        logits += row * columns
        p += row * columns
        if tl.load(mask + row) == 0:
            for start in range(0, columns, BLOCK):
                column = start + tl.arange(0, BLOCK)
                tl.store(logits + column, 0.0, mask=column < columns)
            return
        top = tl.load(row_top + row)
        total = tl.load(row_total + row)
        g = tl.load(grad).to(tl.float32) * share
        pull = 0.0
        for start in range(0, columns, BLOCK):
            column = start + tl.arange(0, BLOCK)
            real = column < columns
            weight = tl.load(p + column, mask=real, other=0.0).to(tl.float32)
            pull += tl.sum(tl.where(real, weight * g, 0.0))
        for start in range(0, columns, BLOCK):
            column = start + tl.arange(0, BLOCK)
            real = column < columns
            z = tl.load(logits + column, mask=real, other=0.0).to(tl.float32)
            weight = tl.load(p + column, mask=real, other=0.0).to(tl.float32)
            pulled = (
                tl.exp(z - top) / total * pull
            )  # before the other product: Triton 3.6 keeps the order written
            grad_logit = -(weight * g - pulled)  # a fused product rounds once: this order
            tl.store(logits + column, grad_logit, mask=real)

    return forward, backward

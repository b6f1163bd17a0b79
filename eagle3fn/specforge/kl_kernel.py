"""SpecForge's loss as a Triton kernel: what it runs on CUDA, with its shape of reduction.

One program a row, the row in one block of `next_power_of_2(D)` columns, maximum and sum in fp32. A
sum's bits depend on that shape and on the order of operations, so both are kept. Triton is imported
when the kernel is first called.
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eagle3fn.base.errors import UserError
from eagle3fn.model.autograd import differentiable_once

LARGEST = 131_072
"""The most columns, `D`, that a block may have."""

_WARPS = ((32_768, 32), (8_192, 16), (2_048, 8), (1, 4))  # (from this block size on, warps)
tl: Any = None  # triton.language, once `_kernels` has run: kernels look up names in this module


def mean_kl(logits: Tensor, p: Tensor, mask: Tensor, count: Tensor | None = None) -> Tensor:
    """`losses.kl_loss` to rounding; on CUDA, or interpreted on the CPU.

    Differentiable once, by `logits`; a second derivative raises. Works under `vjp` and `vmap`.

    Args:
        logits: `(B, S, D)`, bf16, fp16 or fp32.
        p: the teacher's distribution, `(B, S, D)` fp32.
        mask: `(B, S, 1)`; rows where it is 0 are left out.
        count: divides the sum over rows; None: the number of all rows, `B·S`.

    Returns:
        fp32 scalar.

    Raises:
        UserError: Triton is not installed, or `D` exceeds `LARGEST`.
    """
    loss = _mean_kl(_Inputs(logits, p, mask[..., 0] != 0)).loss
    if count is None:
        return loss
    return loss * (mask.numel() / count)


def launch_shape(columns: int) -> tuple[int, int]:
    """Block size and warps for a row of `columns`.

    Raises:
        UserError: the row is longer than a block may be.
    """
    if columns > LARGEST:
        raise UserError(
            f"draft_vocab_size = {columns}: SpecForge's loss on CUDA takes at most {LARGEST}; "
            "lower it, or train without --recipe specforge"
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
    """The mean over all rows, and for the backward each row's maximum and sum of exponentials."""
    logits, p, mask = (x.contiguous() for x in inputs)
    columns = logits.shape[-1]
    block, warps = launch_shape(columns)
    zeros = functools.partial(torch.zeros, mask.numel(), dtype=torch.float32, device=logits.device)
    row, top, total = zeros(), zeros(), zeros()
    kernel, _ = _kernels()
    with torch.cuda.device_of(logits):  # Triton launches on the current device
        kernel[(mask.numel(),)](
            logits, p, mask, row, top, total, columns, BLOCK=block, num_warps=warps
        )
    return _Outputs(row.mean(), top, total)


def _backward(inputs: _Inputs, outputs: _Outputs, grads: _Outputs) -> dict[str, Tensor]:
    """The gradient by the logits, in their dtype; zero in rows that are masked."""
    logits, p, mask = inputs
    out = logits.clone(memory_format=torch.contiguous_format)  # overwritten by the kernel
    columns = logits.shape[-1]
    block, warps = launch_shape(columns)
    rows = mask.numel()
    _, kernel = _kernels()
    with torch.cuda.device_of(logits):
        kernel[(rows,)](
            out,
            p.contiguous(),
            mask.contiguous(),
            grads.loss,
            1 / rows,
            outputs.top,
            outputs.total,
            columns,
            BLOCK=block,
            num_warps=warps,
        )
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

    Every pass over a row is a loop of one iteration: without the loop, the compiler would share
    loads and products between passes and round in other places.

    Of a row, with `top = max z` and `total = Σ_v exp(z[v] - top)`:

        loss = -Σ_v p[v] · (z[v] - top - log(total))
        gradient[v] = -(p[v] · g - exp(z[v] - top) / total · Σ_u p[u] · g)

    `g` is the gradient of the mean times `share`, one divided by the number of rows.
    """
    global tl  # noqa: PLW0603
    try:
        import triton
        import triton.language as tl
    except ImportError:
        raise UserError(
            "SpecForge's loss on CUDA is a Triton kernel, and Triton is not installed: "
            "pip install triton, or train without --recipe specforge"
        ) from None

    @triton.jit
    def forward(logits, p, mask, row_loss, row_top, row_total, columns, BLOCK: tl.constexpr):  # pyright: ignore
        row = tl.program_id(0).to(tl.int64)
        if tl.load(mask + row) == 0:
            return
        logits += row * columns
        p += row * columns

        # Maximum and sum of exponentials.
        top = float("-inf")
        total = 0.0
        for start in range(0, columns, BLOCK):
            column = start + tl.arange(0, BLOCK)
            real = column < columns
            z = tl.load(logits + column, mask=real, other=float("-inf")).to(tl.float32)
            higher = tl.maximum(top, tl.max(tl.where(real, z, float("-inf"))))
            total = total * tl.exp(top - higher) + tl.sum(tl.where(real, tl.exp(z - higher), 0.0))
            top = higher

        # The teacher's mean of the draft's log-probabilities.
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

        # Σ_u p[u] · g
        top = tl.load(row_top + row)
        total = tl.load(row_total + row)
        g = tl.load(grad).to(tl.float32) * share
        pull = 0.0
        for start in range(0, columns, BLOCK):
            column = start + tl.arange(0, BLOCK)
            real = column < columns
            weight = tl.load(p + column, mask=real, other=0.0).to(tl.float32)
            pull += tl.sum(tl.where(real, weight * g, 0.0))

        # The gradient, in the logits' place.
        for start in range(0, columns, BLOCK):
            column = start + tl.arange(0, BLOCK)
            real = column < columns
            z = tl.load(logits + column, mask=real, other=0.0).to(tl.float32)
            weight = tl.load(p + column, mask=real, other=0.0).to(tl.float32)
            # Both products have this order: Triton 3.6 keeps it, and one of them is fused with the
            # difference, which rounds once.
            pulled = tl.exp(z - top) / total * pull
            grad_logit = -(weight * g - pulled)
            tl.store(logits + column, grad_logit, mask=real)

    return forward, backward

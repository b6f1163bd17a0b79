"""Operations that torch.func refuses, put into our unroll: the old tool's loss Function, and flex_attention."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from eagle3fn.model.forward import Operations
from eagle3fn.model.losses import KL
from eagle3fn.specforge.oracle import Oracle


def on_private_tape(operation: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """`operation(*tensors)`, differentiable once under `torch.func.vjp` with the bits of its own `.backward()`.

    The operation runs on ordinary tensors, in the pull-back once more, on an autograd graph of its own, so that a
    backward that writes over what it saved may be called twice. A second derivative raises: the graph knows of none,
    and would give zero. Every tensor must be an argument: one that is closed over belongs to the transform.
    """
    return _Tape.apply(operation, *tensors)  # pyright: ignore


class _Tape(torch.autograd.Function):
    @staticmethod
    def forward(operation, *tensors):  # pyright: ignore
        return operation(*(x.detach() for x in tensors)).detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.operation = inputs[0]
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # pyright: ignore
        found = iter(_TapeGradient.apply(ctx.operation, grad, *ctx.saved_tensors))
        return None, *(next(found) if x.is_floating_point() else None for x in ctx.saved_tensors)


class _TapeGradient(torch.autograd.Function):
    @staticmethod
    def forward(operation, grad, *tensors):  # pyright: ignore
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_(x.is_floating_point()) for x in tensors]
            output = operation(*inputs)
        leaves = [x for x in inputs if x.requires_grad]
        found = torch.autograd.grad(output, leaves, grad, allow_unused=True)
        return tuple(
            torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(ctx: Any, *_: Any):  # pyright: ignore
        raise RuntimeError("an operation on a private tape can be differentiated once")


def old_kl(oracle: Oracle) -> KL:
    """The old tool's loss Function for the legacy unroll; it divides by all rows. Its backward overwrites a copy."""

    def kl(logits: Tensor, p: Tensor, mask: Tensor, n: Tensor | None) -> Tensor:
        assert n is None, "the old kernel divides by all rows"
        kernel = oracle.eagle3.LogSoftmaxLoss
        return on_private_tape(lambda z, p, mask: kernel.apply(z.clone(), p, mask), logits, p, mask)

    return kl


def with_flex(operations: Operations) -> Operations:
    """The same with the attention of the old tool's `flex_attention` backend."""
    return operations._replace(
        mask=lambda mask, _: mask, heads=lambda x, _: x, attention=flex_over_unroll
    )


def flex_over_unroll(q: Tensor, keys: list[Tensor], values: list[Tensor], mask: Tensor) -> Tensor:
    """`model.attention.unrolled_attention` by flex_attention: `keys` `(B, J, S, E)` unrepeated, `mask` `(B, S)`.

    Unlike there, padding is not seen and sees nothing, in the later keys too, and at unroll step `i` the last `i` real
    rows of a sample count as padding.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    b, _, s, _ = q.shape
    steps = len(keys)

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        real = mask.sum(-1) - (steps - 1)

        def seen(sample: Tensor, _: Tensor, row: Tensor, key: Tensor) -> Tensor:
            block = (key <= row) & (key < real[sample]) & (row < real[sample])
            return block | ((key >= s) & (key % s < real[sample]) & (key % s == row))

        blocks = create_block_mask(seen, b, 1, s, s * steps, device=str(q.device))
        out = flex_attention(q, k, v, block_mask=blocks, enable_gqa=True)
        assert isinstance(out, Tensor)
        return out

    return on_private_tape(attend, q, torch.cat(keys, 2), torch.cat(values, 2), mask)

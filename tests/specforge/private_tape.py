"""Operations that torch.func refuses, for our unroll: SpecForge's loss Function, flex_attention."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from eagle3fn.model.forward import Operations
from eagle3fn.model.losses import KL
from eagle3fn.specforge.oracle import Oracle


def on_private_tape(operation: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """`operation(*tensors)`, differentiable once under `torch.func.vjp`.

    The gradient has the bits of the operation's own `.backward()`. The operation runs on ordinary
    tensors, and in the pull-back once more on a graph of its own: a backward that overwrites what
    it saved may then be called twice. Every tensor must be an argument, since one that is closed
    over belongs to the transform.

    Raises:
        RuntimeError: at a second derivative, which that graph would give as zero.
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
        gradients = iter(_TapeGradient.apply(ctx.operation, grad, *ctx.saved_tensors))

        # One place an input: none for the operation and for integers.
        places: list[Tensor | None] = [None]
        for x in ctx.saved_tensors:
            places.append(next(gradients) if x.is_floating_point() else None)
        return tuple(places)


class _TapeGradient(torch.autograd.Function):
    @staticmethod
    def forward(operation, grad, *tensors):  # pyright: ignore
        # A graph of these operations alone.
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_(x.is_floating_point()) for x in tensors]
            output = operation(*inputs)
        leaves = [x for x in inputs if x.requires_grad]
        found = torch.autograd.grad(output, leaves, grad, allow_unused=True)

        # An input that the output does not depend on has gradient zero.
        gradients = []
        for leaf, gradient in zip(leaves, found, strict=True):
            gradients.append(torch.zeros_like(leaf) if gradient is None else gradient)
        return tuple(gradients)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing is saved."""

    @staticmethod
    def backward(ctx: Any, *_: Any):  # pyright: ignore
        raise RuntimeError("an operation on a private tape can be differentiated once")


def specforge_kl(oracle: Oracle) -> KL:
    """SpecForge's loss Function for our unroll: a mean over all rows of logits `(B, S, D)`."""

    def loss(z: Tensor, p: Tensor, mask: Tensor) -> Tensor:
        # Its backward overwrites the logits that it is given.
        return oracle.eagle3.LogSoftmaxLoss.apply(z.clone(), p, mask)

    def kl(logits: Tensor, p: Tensor, mask: Tensor, n: Tensor | None) -> Tensor:
        assert n is None, "SpecForge's kernel divides by all rows"
        return on_private_tape(loss, logits, p, mask)

    return kl


def with_flex(operations: Operations) -> Operations:
    """The same operations with the attention of SpecForge's `flex_attention` backend."""
    return operations._replace(
        mask=lambda mask, _: mask, heads=lambda x, _: x, attention=flex_over_unroll
    )


def flex_over_unroll(q: Tensor, keys: list[Tensor], values: list[Tensor], mask: Tensor) -> Tensor:
    """`model.attention.unrolled_attention` by flex_attention.

    Unlike there, padded rows attend to nothing and no row attends to them, in the later keys too;
    and at unroll step `i` the last `i` real rows of a sample count as padding.

    Args:
        q: queries `(B, N, S, E)`.
        keys: one tensor `(B, J, S, E)` an unroll step so far, heads not repeated.
        values: the same.
        mask: attention mask `(B, S)`, 1 for a real row.

    Returns:
        `(B, N, S, E)`.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    b, _, s, _ = q.shape
    steps = len(keys)

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        real = mask.sum(-1) - (steps - 1)  # (B,)

        def seen(sample: Tensor, _: Tensor, row: Tensor, key: Tensor) -> Tensor:
            # Of the first step's keys those up to the row; of each later step's the row's own.
            first = (key <= row) & (key < real[sample]) & (row < real[sample])
            later = (key >= s) & (key % s < real[sample]) & (key % s == row)
            return first | later

        blocks = create_block_mask(seen, b, 1, s, s * steps, device=str(q.device))
        out = flex_attention(q, k, v, block_mask=blocks, enable_gqa=True)
        assert isinstance(out, Tensor)
        return out

    return on_private_tape(attend, q, torch.cat(keys, 2), torch.cat(values, 2), mask)

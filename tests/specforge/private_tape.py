"""Operations that torch.func refuses, put into our unroll: SpecForge's loss, and flex_attention."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from eagle3fn.model.unroll import Ops
from eagle3fn.specforge.arithmetic import KL
from eagle3fn.specforge.oracle import Oracle


def on_private_tape(operation: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """`operation(*tensors)`, differentiable once under `torch.func.vjp`, as by `.backward()`.

    The operation runs on ordinary tensors. The pull-back runs it once more, on an autograd graph of
    its own, so that a backward that overwrites what it saved can be called twice. A second
    derivative raises: that graph does not reach it, so that it would be zero.

    Every tensor must be an argument: one from an enclosing scope belongs to the transform.
    """
    return _Tape.apply(operation, *tensors)  # pyright: ignore


class _Tape(torch.autograd.Function):
    @staticmethod
    def forward(operation, *tensors):  # pyright: ignore
        return operation(*(x.detach() for x in tensors)).detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        operation, *tensors = inputs
        ctx.operation = operation
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # pyright: ignore
        # One gradient for each floating-point argument, in order; none for the operation.
        found = iter(_TapeGradient.apply(ctx.operation, grad, *ctx.saved_tensors))
        gradients = [next(found) if x.is_floating_point() else None for x in ctx.saved_tensors]
        return None, *gradients


class _TapeGradient(torch.autograd.Function):
    @staticmethod
    def forward(operation, grad, *tensors):  # pyright: ignore
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_(x.is_floating_point()) for x in tensors]
            output = operation(*inputs)

        leaves = [x for x in inputs if x.requires_grad]
        gradients = torch.autograd.grad(output, leaves, grad, allow_unused=True)
        filled = []
        for leaf, gradient in zip(leaves, gradients, strict=True):
            filled.append(torch.zeros_like(leaf) if gradient is None else gradient)
        return tuple(filled)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(ctx: Any, *_: Any):  # pyright: ignore
        raise RuntimeError("an operation on a private tape can be differentiated once")


def specforge_kl(oracle: Oracle) -> KL:
    """SpecForge's loss kernel as the KL of our unroll; it divides by all rows."""

    def kl(logits: Tensor, p: Tensor, mask: Tensor, count: Tensor | None) -> Tensor:
        assert count is None, "SpecForge's kernel divides by all rows"

        # Its backward overwrites the logits that it saved: it gets a copy.
        kernel = oracle.eagle3.LogSoftmaxLoss
        return on_private_tape(lambda z, p, mask: kernel.apply(z.clone(), p, mask), logits, p, mask)

    return kl


def with_flex(ops: Ops) -> Ops:
    """The same operations with the attention of SpecForge's `flex_attention` backend.

    It reads the attention mask `(B, S)` itself, and heads that are not repeated.
    """
    return ops._replace(
        sight=lambda seen, rows, batch, draft, dtype: batch.attention_mask,
        shared=lambda heads, groups: heads,
        attend=flex_over_unroll,
    )


def flex_over_unroll(q: Tensor, keys: list[Tensor], values: list[Tensor], mask: Tensor) -> Tensor:
    """`model.plain.attend` by flex_attention.

    Unlike there, padded rows neither see nor are seen, in the later steps' keys too; and at unroll
    step `i` the last `i` real rows of a sample count as padding.

    Args:
        q: queries `(B, N, S, E)`.
        keys: those of each step so far, `(B, J, S, E)`, not repeated.
        values: as `keys`.
        mask: the attention mask, `(B, S)`.

    Returns:
        `(B, N, S, E)`.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    b, _, s, _ = q.shape
    steps = len(keys)

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        real = mask.sum(-1) - (steps - 1)  # (B,)

        # Step 0's keys are a causal block; of each later step a row sees its own key alone.
        def seen(sample: Tensor, _: Tensor, row: Tensor, key: Tensor) -> Tensor:
            in_block = (key <= row) & (key < real[sample]) & (row < real[sample])
            own_later = (key >= s) & (key % s < real[sample]) & (key % s == row)
            return in_block | own_later

        blocks = create_block_mask(seen, b, 1, s, s * steps, device=str(q.device))
        out = flex_attention(q, k, v, block_mask=blocks, enable_gqa=True)
        assert isinstance(out, Tensor)
        return out

    return on_private_tape(attend, q, torch.cat(keys, 2), torch.cat(values, 2), mask)

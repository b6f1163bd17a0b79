"""Layers of the fast profile whose backward is written out, so that little is kept: norm and SwiGLU."""

import torch
import torch.nn.functional as F
from torch import Tensor

from eagle3fn.model.layers import at_least_fp32
from eagle3fn.model.once import differentiable_once


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`layers.rms_norm` of `(…, H)` with one rounding at the end; keeps the input and one number a row."""
    return _rms_norm(x, weight, eps)[0]


def swiglu(x: Tensor) -> Tensor:
    """`silu(gate) · up` of both side by side, `(…, 2·I)` to `(…, I)`; keeps the input alone."""
    return _swiglu(x)[0]


def _norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = x.to(at_least_fp32(x.dtype))
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale).mul_(weight).to(x.dtype), scale


def _norm_backward(inputs: tuple, outputs: tuple, grads: tuple) -> tuple[Tensor, Tensor]:
    (x, weight, _), (_, scale), (grad,) = inputs, outputs, grads
    normed, grad = x * scale, grad.to(scale.dtype)
    by_weight = (grad * normed).flatten(0, -2).sum(0)
    grad = grad * weight
    inner = (grad * normed).mean(-1, keepdim=True)
    return grad.addcmul_(normed, inner, value=-1).mul_(scale).to(x.dtype), by_weight.to(weight.dtype)


def _swiglu_forward(x: Tensor) -> tuple[Tensor]:
    gate, up = x.chunk(2, dim=-1)
    return (F.silu(gate).mul_(up),)


def _swiglu_backward(inputs: tuple, outputs: tuple, grads: tuple) -> tuple[Tensor]:
    (x,), (grad,) = inputs, grads
    gate, up = x.chunk(2, dim=-1)
    out = torch.empty_like(x)
    by_gate, by_up = out.chunk(2, dim=-1)
    by_gate.copy_(torch.ops.aten.silu_backward(grad * up, gate))
    torch.mul(grad, F.silu(gate), out=by_up)
    return (out,)


_rms_norm = differentiable_once(_norm_forward, _norm_backward, by=2, kept=1)
_swiglu = differentiable_once(_swiglu_forward, _swiglu_backward, by=1)

"""Layers of the fast profile whose backward is written out, so that little is kept: norm, projection, and MLP."""

import torch
import torch.nn.functional as F
from torch import Tensor

from eagle3fn.model.autograd import differentiable_once
from eagle3fn.model.layers import at_least_fp32


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`layers.rms_norm` of `(…, H)` with one rounding at the end; keeps the input and one number a row."""
    return _rms_norm(x, weight, eps)[0]


def norm_linear(
    x: Tensor, weight: Tensor, matrix: Tensor, plus: Tensor, place: Tensor, eps: float
) -> Tensor:
    """`plus[place]` and `matrix` `(O, H)` times the normed `x` `(T, H)`: `(T, O)`; keeps `x`, norms it again."""
    return _norm_linear(x, weight, matrix, plus, place, eps)[0]


def mlp(x: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor, eps: float) -> Tensor:
    """`x` `(T, H)` and the SwiGLU MLP of the normed `x`; keeps `x` and what `gate_up` `(2·I, H)` makes of it."""
    return _mlp(x, weight, gate_up, down, eps)[0]


def _norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = x.to(at_least_fp32(x.dtype))
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale).mul_(weight).to(x.dtype), scale


def _norm_backward(inputs: tuple, outputs: tuple, grads: tuple) -> tuple[Tensor, Tensor]:
    (x, weight, _), (_, scale), (grad,) = inputs, outputs, grads
    normed, grad = x * scale, grad.to(scale.dtype)
    grad_weight = (grad * normed).flatten(0, -2).sum(0)
    grad = grad * weight
    inner = (grad * normed).mean(-1, keepdim=True)
    return grad.addcmul_(normed, inner, value=-1).mul_(scale).to(x.dtype), grad_weight.to(
        weight.dtype
    )


def _norm_linear_forward(x, weight, matrix, plus, place, eps) -> tuple[Tensor]:
    return (plus[place].addmm_(_norm_forward(x, weight, eps)[0], matrix.T),)


def _norm_linear_backward(inputs: tuple, outputs: tuple, grads: tuple) -> tuple[Tensor, ...]:
    (x, weight, matrix, plus, place, eps), (grad,) = inputs, grads
    normed, scale = _norm_forward(x, weight, eps)
    grad_x, grad_weight = _norm_backward((x, weight, eps), (normed, scale), (grad @ matrix,))
    return grad_x, grad_weight, grad.T @ normed, torch.zeros_like(plus).index_add_(0, place, grad)


def _mlp_forward(
    x: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    inner = F.linear(_norm_forward(x, weight, eps)[0], gate_up)
    return torch.addmm(x, _swiglu(inner), down.T), inner


def _mlp_backward(inputs: tuple, outputs: tuple, grads: tuple) -> tuple[Tensor, ...]:
    (x, weight, gate_up, down, eps), (_, inner), (grad,) = inputs, outputs, grads
    grad_down = grad.T @ _swiglu(inner)
    grad_inner = _swiglu_backward(grad @ down, inner)
    normed, scale = _norm_forward(x, weight, eps)
    grad_gate_up = grad_inner.T @ normed
    grad_x, grad_weight = _norm_backward((x, weight, eps), (normed, scale), (grad_inner @ gate_up,))
    return grad_x + grad, grad_weight, grad_gate_up, grad_down


def _swiglu(x: Tensor) -> Tensor:
    """`silu(gate) · up` of both side by side, `(…, 2·I)` to `(…, I)`."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def _swiglu_backward(grad: Tensor, x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    out = torch.empty_like(x)
    grad_gate, grad_up = out.chunk(2, dim=-1)
    grad_gate.copy_(torch.ops.aten.silu_backward(grad * up, gate))
    torch.mul(grad, F.silu(gate), out=grad_up)
    return out


_result = ((), (0,))
_rms_norm = differentiable_once(_norm_forward, _norm_backward, kept=1, unread=_result)
_norm_linear = differentiable_once(_norm_linear_forward, _norm_linear_backward, unread=_result)
_mlp = differentiable_once(_mlp_forward, _mlp_backward, kept=1, unread=_result)

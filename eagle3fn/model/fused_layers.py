"""Parts of the fast operations whose written backwards keep few tensors: norm, projection, MLP."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from eagle3fn.base.dtypes import wide
from eagle3fn.model.autograd import differentiable_once

# Root-mean-square norm: y = x · r · weight, with r = 1 / √(mean(x²) + eps) for each row.


class _NormInputs(NamedTuple):
    x: Tensor  # (…, H)
    weight: Tensor  # (H,)
    eps: float


class _Normed(NamedTuple):
    normed: Tensor  # (…, H)
    scale: Tensor  # (…, 1), at least fp32: r above


def fused_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`plain.rms_norm` of `x` `(…, H)` with one rounding, at the end.

    It keeps `x` and one number for each row.
    """
    return _fused_rms_norm(_NormInputs(x, weight, eps)).normed


def _norm(x: Tensor, weight: Tensor, eps: float) -> _Normed:
    wide_x = wide(x)
    scale = torch.rsqrt(wide_x.square().mean(-1, keepdim=True) + eps)
    return _Normed((wide_x * scale).mul_(weight).to(x.dtype), scale)


def _norm_gradients(
    x: Tensor, weight: Tensor, scale: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients by `x` and by `weight`, for the gradient `grad` `(…, H)` of the normed rows.

    With x̂ = x · r and g = grad · weight:

        grad_weight = Σ grad · x̂                    over rows
        grad_x      = r · (g − x̂ · mean(g · x̂))
    """
    unweighted = x * scale
    wide_grad = grad.to(scale.dtype)
    grad_weight = (wide_grad * unweighted).flatten(0, -2).sum(0)

    wide_grad = wide_grad * weight
    inner = (wide_grad * unweighted).mean(-1, keepdim=True)
    grad_x = wide_grad.addcmul_(unweighted, inner, value=-1).mul_(scale)
    return grad_x.to(x.dtype), grad_weight.to(weight.dtype)


def _norm_forward(inputs: _NormInputs) -> _Normed:
    return _norm(inputs.x, inputs.weight, inputs.eps)


def _norm_backward(inputs: _NormInputs, outputs: _Normed, grads: _Normed) -> dict[str, Any]:
    grad_x, grad_weight = _norm_gradients(inputs.x, inputs.weight, outputs.scale, grads.normed)
    return {"x": grad_x, "weight": grad_weight}


_fused_rms_norm = differentiable_once(
    _norm_forward,
    _norm_backward,
    inputs=_NormInputs,
    outputs=_Normed,
    without_gradient=["scale"],
    unread_outputs=["normed"],
)


# A projection of normed rows, added to rows of a table: y = added[place] + norm(x) · matrixᵀ.


class _NormLinearInputs(NamedTuple):
    x: Tensor  # (T, H)
    weight: Tensor  # (H,): the norm's
    matrix: Tensor  # (O, H)
    added: Tensor  # (A, O)
    place: Tensor  # (T,) int64: a row of `added`
    eps: float


class _Projected(NamedTuple):
    projected: Tensor  # (T, O)


def norm_linear(
    x: Tensor, weight: Tensor, matrix: Tensor, added: Tensor, place: Tensor, eps: float
) -> Tensor:
    """`added[place]` plus the projection by `matrix` `(O, H)` of the normed `x` `(T, H)`: `(T, O)`.

    Of the rows it keeps `x` alone; the backward norms it again.
    """
    return _norm_linear(_NormLinearInputs(x, weight, matrix, added, place, eps)).projected


def _norm_linear_forward(inputs: _NormLinearInputs) -> _Projected:
    out = inputs.added[inputs.place]
    normed = _norm(inputs.x, inputs.weight, inputs.eps).normed
    return _Projected(out.addmm_(normed, inputs.matrix.T))


def _norm_linear_backward(
    inputs: _NormLinearInputs, outputs: _Projected, grads: _Projected
) -> dict[str, Any]:
    grad = grads.projected
    normed, scale = _norm(inputs.x, inputs.weight, inputs.eps)
    grad_x, grad_weight = _norm_gradients(inputs.x, inputs.weight, scale, grad @ inputs.matrix)
    return {
        "x": grad_x,
        "weight": grad_weight,
        "matrix": grad.T @ normed,
        "added": torch.zeros_like(inputs.added).index_add_(0, inputs.place, grad),
    }


_norm_linear = differentiable_once(
    _norm_linear_forward,
    _norm_linear_backward,
    inputs=_NormLinearInputs,
    outputs=_Projected,
    unread_outputs=["projected"],
)


# The MLP with its residual: (gate, up) = norm(x) · gate_upᵀ, y = x + (silu(gate) · up) · downᵀ.


class _MlpInputs(NamedTuple):
    x: Tensor  # (T, H)
    weight: Tensor  # (H,): the norm's
    gate_up: Tensor  # (2·I, H): the gate's rows, then up's
    down: Tensor  # (H, I)
    eps: float


class _MlpOutputs(NamedTuple):
    added: Tensor  # (T, H)
    gate_and_up: Tensor  # (T, 2·I)


def mlp(x: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor, eps: float) -> Tensor:
    """`x` `(T, H)` plus the SwiGLU MLP of the normed `x`: `(T, H)`.

    It keeps `x`, and the product of the normed `x` with `gate_up` `(2·I, H)`.
    """
    return _mlp(_MlpInputs(x, weight, gate_up, down, eps)).added


def _mlp_forward(inputs: _MlpInputs) -> _MlpOutputs:
    # The normed rows have no name: they are freed before the activation is made.
    x = inputs.x
    gate_and_up = F.linear(_norm(x, inputs.weight, inputs.eps).normed, inputs.gate_up)
    return _MlpOutputs(torch.addmm(x, _swiglu(gate_and_up), inputs.down.T), gate_and_up)


def _mlp_backward(inputs: _MlpInputs, outputs: _MlpOutputs, grads: _MlpOutputs) -> dict[str, Any]:
    grad = grads.added
    grad_down = grad.T @ _swiglu(outputs.gate_and_up)
    grad_gate_and_up = _swiglu_backward(grad @ inputs.down, outputs.gate_and_up)

    normed, scale = _norm(inputs.x, inputs.weight, inputs.eps)
    grad_gate_up = grad_gate_and_up.T @ normed
    grad_x, grad_weight = _norm_gradients(
        inputs.x, inputs.weight, scale, grad_gate_and_up @ inputs.gate_up
    )
    return {
        "x": grad_x + grad,  # through the norm, and past the MLP
        "weight": grad_weight,
        "gate_up": grad_gate_up,
        "down": grad_down,
    }


def _swiglu(gate_and_up: Tensor) -> Tensor:
    """`silu(gate) · up`: `(…, 2·I)` to `(…, I)`."""
    gate, up = gate_and_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def _swiglu_backward(grad: Tensor, gate_and_up: Tensor) -> Tensor:
    """The gradient by `gate_and_up`, both halves written into one tensor."""
    gate, up = gate_and_up.chunk(2, dim=-1)
    out = torch.empty_like(gate_and_up)
    grad_gate, grad_up = out.chunk(2, dim=-1)
    grad_gate.copy_(torch.ops.aten.silu_backward(grad * up, gate))
    torch.mul(grad, F.silu(gate), out=grad_up)
    return out


_mlp = differentiable_once(
    _mlp_forward,
    _mlp_backward,
    inputs=_MlpInputs,
    outputs=_MlpOutputs,
    without_gradient=["gate_and_up"],
    unread_outputs=["added"],
)

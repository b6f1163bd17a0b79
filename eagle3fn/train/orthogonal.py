"""Matrices `U S Vᵀ` to about `U Vᵀ`, for Muon's update.

FLOPs of `(A, B)`, with `m = min(A, B)` and `n = max(A, B)`; what becomes of singular values:

| | products | FLOPs | range |
|---|---|---|---|
| `rational` | half of `X Xᵀ`, two inverses of `(m, m)`, `Q X` | `3 m² n + 2 m³` | 0.85 to 1.15 |
| `newton_schulz` | 5 times `X Xᵀ`, its square, and `X` by it | `20 m² n + 10 m³` | 0.7 to 1.2 |

Both bring singular values from 0.002 of the matrix's norm on into that range, and multiply smaller
ones by about 500. A gradient has many of those: its first singular value is most of its norm.
"""

import torch
from torch import Tensor

FLOOR = 2e-3
"""The smallest singular value, as a share of the matrix's norm, that `rational` takes near 1."""

# Zolotarev's approximation of the sign of x on FLOOR ≤ |x| ≤ 1 with two poles:
# f(x) = scale · x · (1 + Σ weight / (x² + shift)). `bench.orthogonal.zolotarev` computes these.
_SCALE = 0.96193990925
_POLES = ((0.0095835804086, 1.8960818006e-05), (0.19260820402, 0.0091860596284))  # weight, shift

_BLOCK_ROWS = 128  # of a product's lower half, computed at once


def orthogonal(matrix: Tensor) -> Tensor:
    """About `U Vᵀ` of a matrix `U S Vᵀ` `(A, B)`, in its dtype: by what the device is fast at.

    A GPU multiplies bf16 much faster than it solves: `newton_schulz`. Elsewhere `rational`, a fifth
    of the FLOPs.
    """
    return newton_schulz(matrix) if matrix.is_cuda else rational(matrix)


def rational(matrix: Tensor) -> Tensor:
    """About `U Vᵀ` of a matrix `U S Vᵀ` `(A, B)`, in its dtype, fp32 or fp64.

    By one rational function of the singular values `x`, as shares of the matrix's norm:

        f(x) = s · x · (1 + w₁ / (x² + t₁) + w₂ / (x² + t₂))

    The best of this form on [0.002, 1], where it is within 0.155 of 1; below, about `507 x`. Its
    matrix form is `s · (I + Σ wᵢ (X Xᵀ + tᵢ I)⁻¹) X`, on the smaller side of `X`.
    """
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if is_tall else matrix  # (m, n), m ≤ n
    x = x / x.norm().clamp(min=1e-30)
    gram = _lower_gram(x)

    # Σ wᵢ (X Xᵀ + tᵢ I)⁻¹. Not a number in the matrix stops nothing here: it spreads to the result.
    total = torch.zeros_like(gram)
    for weight, shift in _POLES:
        shifted = gram.clone()
        shifted.diagonal().add_(shift)
        factor, _ = torch.linalg.cholesky_ex(shifted)
        total.add_(torch.cholesky_inverse(factor), alpha=weight)

    x = torch.addmm(x, total, x, beta=_SCALE, alpha=_SCALE)
    return x.T if is_tall else x


def _lower_gram(x: Tensor) -> Tensor:
    """`X Xᵀ` of `(m, n)`, of which the part above the diagonal's blocks is left 0: `(m, m)`."""
    gram = x.new_zeros(len(x), len(x))
    for start in range(0, len(x), _BLOCK_ROWS):
        stop = min(start + _BLOCK_ROWS, len(x))
        gram[start:stop, :stop] = x[start:stop] @ x[:stop].T
    return gram


def newton_schulz(
    matrix: Tensor, iterations: int = 5, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """About `U Vᵀ` of a matrix `U S Vᵀ` `(A, B)`, computed in `dtype`, returned in its own.

    By the quintic Newton-Schulz iteration `X ← a X + (b X Xᵀ + c (X Xᵀ)²) X` with the coefficients
    of `torch.optim.Muon`, whose bits it has.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if is_tall else matrix).to(dtype)  # (m, n), m ≤ n

    # Singular values of at most 1.
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(iterations):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if is_tall else x).to(matrix.dtype)

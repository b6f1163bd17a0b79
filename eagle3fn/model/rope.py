"""Rotary position embedding: inverse frequencies of the public variants, tables computed in fp32.

Position t rotates the pair of dimensions (d, d + E/2) by the angle t · f_d. The inverse frequencies
are f_d = theta^(−2d / E) for d = 0 … E/2 − 1. The variants change them; yarn scales cosines and
sines too.
"""

import math

import torch
from torch import Tensor

from eagle3fn.base.device import send
from eagle3fn.base.draft_config import DraftConfig


def rope_table(
    config: DraftConfig, length: int, dtype: torch.dtype, device: torch.device, beyond: int = 0
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions `0 … length - 1`, each `(length, E)`.

    They are computed in fp32 and then cast to `dtype`.
    The last `beyond` positions are the unroll's, after the end of the sequence; they do not stretch
    the dynamic variant.
    """
    inverse, scale = _frequencies(config, length - beyond)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), inverse)  # (length, E/2)

    def table(half: Tensor) -> Tensor:
        half = send(half * scale, device).to(dtype)
        return torch.cat([half, half], dim=-1)

    return table(angles.cos()), table(angles.sin())


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate `x` `(…, E)` by tables that broadcast to it: `x · cos + (−x₂, x₁) · sin`.

    The halves x₁ and x₂ of the last axis are the pairs' two dimensions; pairs are not interleaved.
    """
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin


def _frequencies(config: DraftConfig, length: int) -> tuple[Tensor, float]:
    """Inverse frequencies `(E/2,)` fp32, and the factor on cosines and sines."""
    if config.rope_type == "yarn":
        return _yarn(config, config.rope_scaling or {})
    base = config.rope_theta
    size = config.head_dim
    scaling = config.rope_scaling or {}
    factor = float(scaling.get("factor") or 1.0)

    # A sequence past the trained length raises the dynamic variant's base.
    limit = config.max_position_embeddings
    if config.rope_type == "dynamic" and length > limit:
        base *= (factor * length / limit - (factor - 1)) ** (size / (size - 2))

    inverse = _inverse(base, size)
    if config.rope_type == "linear":
        inverse = inverse / factor
    if config.rope_type == "llama3":
        inverse = _llama3(inverse, factor, scaling)
    return inverse, 1.0


def _inverse(base: float, size: int) -> Tensor:
    """`base^(−2d / E)`, `(E/2,)` fp32."""
    return 1.0 / (base ** (torch.arange(0, size, 2).float() / size))


def _llama3(inverse: Tensor, factor: float, scaling: dict) -> Tensor:
    """Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, with a ramp between.

    With L the original length: long is above L / low_freq_factor, short below L / high_freq_factor.
    """
    low = float(scaling["low_freq_factor"])
    high = float(scaling["high_freq_factor"])
    wavelength = 2 * math.pi / inverse
    rotations = float(scaling["original_max_position_embeddings"]) / wavelength

    # The ramp is 0 at the long end, 1 at the short end; steep if there is one boundary.
    ramp = ((rotations - low) / max(high - low, 1e-9)).clamp(0, 1)
    return (1 - ramp) * inverse / factor + ramp * inverse


def _yarn(config: DraftConfig, scaling: dict) -> tuple[Tensor, float]:
    """YaRN (arXiv 2309.00071): slow dimensions are interpolated, fast ones kept, all scaled.

    A dimension is slow if it makes fewer than `beta_slow` rotations within the original length,
    fast if more than `beta_fast`. The ramp between begins and ends at whole dimensions unless
    `truncate` is false, as in GPT-OSS.
    """
    size = config.head_dim
    base = config.rope_theta
    factor = float(scaling.get("factor") or 1.0)
    original = scaling.get("original_max_position_embeddings") or config.max_position_embeddings

    def dimension(rotations: float) -> float:
        """Which dimension makes so many rotations within the original length."""
        return size * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

    def stretched(mscale: float) -> float:
        """`0.1 · mscale · ln(factor) + 1`, for a factor above 1."""
        return 0.1 * mscale * math.log(max(factor, 1.0)) + 1.0

    # The ramp: 0 up to the dimension `low`, 1 from `high` on.
    low = dimension(float(scaling.get("beta_fast") or 32))
    high = dimension(float(scaling.get("beta_slow") or 1))
    if scaling.get("truncate", True):
        low = math.floor(low)
        high = math.ceil(high)
    low = max(low, 0)
    high = min(high, size - 1)
    ramp = ((torch.arange(size // 2).float() - low) / max(high - low, 0.001)).clamp(0, 1)

    # The factor on cosines and sines, unless the configuration has one. One of the two mscales
    # alone changes nothing: so transformers and vLLM read it.
    scale = scaling.get("attention_factor")
    if scale is None:
        above = float(scaling.get("mscale") or 0.0)
        below = float(scaling.get("mscale_all_dim") or 0.0)
        scale = stretched(above) / stretched(below) if above and below else stretched(1.0)

    inverse = _inverse(base, size)
    return inverse / factor * ramp + inverse * (1 - ramp), float(scale)

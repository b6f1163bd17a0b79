"""Rotary position embedding: inverse frequencies of the public variants, tables in fp32."""

import math

import torch
from torch import Tensor

from eagle3fn.base.device import send
from eagle3fn.base.draft_config import DraftConfig


def rope_table(
    config: DraftConfig, length: int, dtype: torch.dtype, device: torch.device, beyond: int = 0
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions 0 … length-1, each `(length, E)`: computed in fp32, cast to `dtype`.

    The last `beyond` positions are the unroll's, behind the sequence's end; they do not stretch the dynamic variant.
    """
    inverse, scale = _frequencies(config, length - beyond)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), inverse)

    def table(half: Tensor) -> Tensor:
        half = send(half * scale if scale != 1.0 else half, device).to(dtype)
        return torch.cat([half, half], dim=-1)

    return table(angles.cos()), table(angles.sin())


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn `x` `(B, heads, S, E)` by tables that broadcast to it, in `x`'s dtype (halves, not interleaved)."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin


def _frequencies(config: DraftConfig, length: int) -> tuple[Tensor, float]:
    """Inverse frequencies `(E/2,)` fp32 and the factor on cosines and sines."""
    scaling = config.rope_scaling or {}
    factor = float(scaling.get("factor") or 1.0)
    base = config.rope_theta
    match config.rope_type:
        case "linear":
            return _inverse(base, config.head_dim) / factor, 1.0
        case "dynamic":
            limit = config.max_position_embeddings
            if length > limit:
                size = config.head_dim
                base *= (factor * length / limit - (factor - 1)) ** (size / (size - 2))
            return _inverse(base, config.head_dim), 1.0
        case "llama3":
            return _llama3(_inverse(base, config.head_dim), factor, scaling), 1.0
        case "yarn":
            return _yarn(config, factor, scaling)
        case _:
            return _inverse(base, config.head_dim), 1.0


def _inverse(base: float, size: int) -> Tensor:
    return 1.0 / (base ** (torch.arange(0, size, 2).float() / size))


def _llama3(inverse: Tensor, factor: float, scaling: dict) -> Tensor:
    """Llama 3.1's scaling: long wavelengths divided by `factor`, short ones kept, a ramp between."""
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    original = float(scaling["original_max_position_embeddings"])
    wavelength = 2 * math.pi / inverse
    ramp = (
        (original / wavelength - low) / (high - low) if high != low else torch.zeros_like(inverse)
    )
    middle = (1 - ramp) * inverse / factor + ramp * inverse
    scaled = torch.where(wavelength > original / low, inverse / factor, middle)
    return torch.where(wavelength < original / high, inverse, scaled)


def _yarn(config: DraftConfig, factor: float, scaling: dict) -> tuple[Tensor, float]:
    """YaRN (arXiv 2309.00071): interpolated below `beta_slow` turns, kept above `beta_fast`, cosines scaled.

    The ramp between begins and ends at whole dimensions unless `truncate` is false, as in GPT-OSS.
    """
    size, base = config.head_dim, config.rope_theta
    original = scaling.get("original_max_position_embeddings") or config.max_position_embeddings

    def dimension(turns: float) -> float:
        return size * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = dimension(float(scaling.get("beta_fast") or 32))
    high = dimension(float(scaling.get("beta_slow") or 1))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    ramp = ((torch.arange(size // 2).float() - low) / max(high - low, 0.001)).clamp(0, 1)
    inverse = _inverse(base, size)
    scale = scaling.get("attention_factor")
    if scale is None:
        scale = _yarn_scale(factor, float(scaling.get("mscale") or 1.0))
        if scaling.get("mscale_all_dim"):
            scale /= _yarn_scale(factor, float(scaling["mscale_all_dim"]))
    return inverse / factor * ramp + inverse * (1 - ramp), float(scale)


def _yarn_scale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

"""RoPE tables of every variant against transformers' own frequencies, an independent source."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from eagle3fn.base.draft_config import DraftConfig
from eagle3fn.base.draft_keys import draft_config_from_target
from eagle3fn.model.rope import rope_table

LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
VARIANTS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {"rope_type": "llama3", **LLAMA3},
    "llama3, one boundary": {
        "rope_type": "llama3",
        **LLAMA3,
        "low_freq_factor": 3.9,
        "high_freq_factor": 4.0,
    },
    "yarn": YARN,
    "yarn, betas": {**YARN, "beta_fast": 16.0, "beta_slow": 2.0},
    "yarn, mscale": {**YARN, "mscale": 1.3, "mscale_all_dim": 0.7},
    "yarn, mscale alone": {**YARN, "mscale": 0.5},
    "yarn, mscale_all_dim alone": {**YARN, "mscale_all_dim": 0.5},
    "yarn, factor": {**YARN, "attention_factor": 1.25},
    "yarn, ramp inside": {**YARN, "original_max_position_embeddings": 2048},
    "yarn, GPT-OSS": {**YARN, "factor": 32.0, "truncate": False},
}
LENGTH = 256
CPU = torch.device("cpu")


def configs(name: str, theta: float, size: int) -> tuple[Any, DraftConfig]:
    """The variant in transformers' configuration, and the draft derived from that."""
    from transformers import LlamaConfig

    target = LlamaConfig(
        hidden_size=2 * size,
        num_attention_heads=2,
        head_dim=size,
        intermediate_size=8,
        vocab_size=32,
        max_position_embeddings=LENGTH,
        rope_parameters={"rope_theta": theta, **VARIANTS[name]},
    )
    return target, draft_config_from_target(target.to_dict(), name)


def expected(target: Any, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tables from transformers' frequencies and factor, in its order of operations."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    kind = target.rope_parameters["rope_type"]
    if kind == "default":
        inverse = LlamaRotaryEmbedding(target).inv_freq
        scale = 1.0
    else:
        inverse, scale = ROPE_INIT_FUNCTIONS[kind](target, CPU, seq_len=length)
    angles = torch.arange(length).float()[:, None] * inverse.float()
    angles = torch.cat([angles, angles], -1)
    return angles.cos() * scale, angles.sin() * scale


@pytest.mark.parametrize("size", [8, 64, 128])
@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
@pytest.mark.parametrize("name", VARIANTS)
def test_tables_are_those_of_transformers(name: str, theta: float, size: int) -> None:
    """Equal in fp32; yarn to one unit of an angle of 256, as it divides in another order."""
    target, draft = configs(name, theta, size)
    assert draft.rope_theta == theta
    assert draft.rope_type == VARIANTS[name]["rope_type"]

    ours = rope_table(draft, LENGTH, torch.float32, CPU)
    bound = 2 * LENGTH * torch.finfo(torch.float32).eps if "yarn" in name else 0.0
    for found, wanted in zip(ours, expected(target, LENGTH), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=bound)

    # The variant differs from plain RoPE at this length.
    if name not in ("default", "dynamic"):
        plain = rope_table(replace(draft, rope_scaling=None), LENGTH, torch.float32, CPU)
        assert float((ours[0] - plain[0]).abs().max()) > 0.1


@pytest.mark.parametrize("size", [8, 128])
def test_dynamic_stretches_with_the_sequence_without_the_unroll(size: int) -> None:
    """The unroll's positions after the end don't count as its length."""
    target, draft = configs("dynamic", 10_000.0, size)
    for length in (200, 300, 1000):
        ours = rope_table(draft, length + 7, torch.float32, CPU, beyond=7)
        for found, wanted in zip(ours, expected(target, length), strict=True):
            torch.testing.assert_close(found[:length], wanted, rtol=0, atol=0.0)


def test_tables_are_computed_in_fp32_then_cast() -> None:
    _, draft = configs("llama3", 500_000.0, 64)
    exact = rope_table(draft, LENGTH, torch.float32, CPU)
    cast = rope_table(draft, LENGTH, torch.bfloat16, CPU)
    for wide, narrow in zip(exact, cast, strict=True):
        assert torch.equal(wide.bfloat16(), narrow)

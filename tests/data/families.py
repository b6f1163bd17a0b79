"""Tiny random targets of the families that transformers has causal language models of."""

import copy
from pathlib import Path
from typing import Any

import torch

from tests.factories import tiny_tokenizer

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 260,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "sliding_window": 8,
    "shared_expert_intermediate_size": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "dim_model_base": 8,
    "attn_implementation": "eager",
}
"""Taken where a family's configuration has a number of that name, or none."""

_LATENT = (
    "axk1",
    "axk2",
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v32",
    "glm4_moe_lite",
    "glm_moe_dsa",
    "minicpm3",
    "sarvam_mla",
    "youtu",
)
_BY_LAYER = ("gemma4_text", "gemma4_unified_text", "dots3_note_text")  # a head size for each layer
_MAMBA = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "mamba_chunk_size": 16,
}
_CHANGES: dict[str, dict[str, Any]] = {
    "granitemoehybrid": {**_MAMBA, "layer_types": ["mamba", "attention"] * 2},
    "bamba": {**_MAMBA, "attn_layer_indices": [1, 3]},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "recurrent_gemma": {"attention_window_size": 8, "lru_width": 32},
    "qwen3_5_text": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"] * 2},
}
_MOST_PARAMETERS = 3_000_000


def kinds() -> list[str]:
    """The model types that transformers has causal language models of."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def make_family(kind: str, folder: Path) -> Any:
    """Write a target of a model type, all its weights random, and a tokenizer; return the model.

    Raises:
        Exception: whatever its own code raises at these sizes; ValueError if it stays large.
    """
    from transformers import AutoModelForCausalLM

    config = tiny_config(kind)
    with torch.device("meta"):
        blank = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    size = sum(value.numel() for value in blank.parameters())
    if size > _MOST_PARAMETERS:
        raise ValueError(f"{size} parameters")

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval().requires_grad_(False)
    for value in model.parameters():
        value.add_((0.3 if value.ndim == 1 else 0.1) * torch.randn_like(value))
    model.generation_config.eos_token_id = 1
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model


def tiny_config(kind: str) -> Any:
    """The configuration of a model type at `SIZES`."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    made = CONFIG_MAPPING[kind]
    if getattr(made, "sub_configs", None):
        raise ValueError("a configuration of several models")
    default = made()
    skipped = ("head_dim", "num_attention_heads") if kind in _BY_LAYER else ()
    changes = {}
    for name, value in SIZES.items():
        if name in skipped:
            continue
        found = getattr(default, name, "absent")
        if found is None or isinstance(found, (int, float)):
            changes[name] = value
    if kind in _LATENT:
        changes.pop("head_dim", None)
        changes["num_key_value_heads"] = SIZES["num_attention_heads"]
    return made(**changes | _CHANGES.get(kind, {}))

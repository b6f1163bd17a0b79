"""A tiny target as a GGUF file."""

from pathlib import Path
from typing import Any

import pytest

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.layers": "blk",
}


def write_gguf(path: Path, model: Any, tokenizer: Any) -> None:
    """Write a Llama in fp32 and a byte-level tokenizer; token 1 ends an answer."""
    gguf = pytest.importorskip("gguf", reason="gguf writes the file")
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)

    # Tokens without a name of their own, and two merges that are never used.
    rest = range(len(tokenizer), config.vocab_size - 2)
    tokens = [*tokenizer.convert_ids_to_tokens(range(len(tokenizer))), *map(str, rest), "ab", "cd"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([f"<{text}>" if text.isdigit() else text for text in tokens])
    writer.add_token_merges(["a b", "c d"])
    writer.add_token_types([1] * config.vocab_size)
    writer.add_eos_token_id(1)
    writer.add_bos_token_id(0)

    for name, value in model.state_dict().items():
        written = name
        for theirs, ours in _NAMES.items():
            written = written.replace(theirs, ours)
        writer.add_tensor(written, value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

"""A tiny random target with a tokenizer, and conversations for it: made here, none downloaded.

transformers and tokenizers are imported inside functions, never when the file is loaded.
"""

import json
from pathlib import Path
from typing import Any

import torch

CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""A chat template without marks of what the assistant says."""

SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 5,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
"""The configuration of `tiny_model`."""


def tiny_tokenizer(template: str | None = CHATML) -> Any:
    """A tokenizer of single bytes and two special tokens; 258 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<|im_start|>", "<|im_end|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: number for number, text in enumerate(specials + letters)}

    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore
    inner.decoder = decoders.ByteLevel()  # type: ignore

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": specials})
    tokenizer.chat_template = template
    return tokenizer


def tiny_model(name: str = "Llama", **changes: Any) -> Any:
    """A random target of five layers, of a family by its name in transformers.

    `changes` are made to `SIZES`.
    """
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**(SIZES | changes))
    model = getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")(config)
    return model.eval().requires_grad_(False)


def save_target(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a target's folder, without transformers' bar."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    finally:
        if shown:
            logging.enable_progress_bar()


def talk(*texts: str) -> list[dict[str, str]]:
    """A conversation: the user's and the assistant's texts by turns."""
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def write_talks(path: Path, count: int) -> Path:
    """Write `count` conversations of different lengths as JSONL."""
    lines = []
    for i in range(count):
        question = "q" * (1 + i % 3)
        answer = "answer " * (1 + i % 4)
        row = {"id": f"row{i}", "conversations": talk(question, answer)}
        lines.append(json.dumps(row) + "\n")
    path.write_text("".join(lines))
    return path

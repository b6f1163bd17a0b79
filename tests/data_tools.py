"""Small targets, tokenizers, conversations and feature folders for the tests of the data room."""

import json
from pathlib import Path
from typing import Any

import torch

from eagle3fn.base.types import Sample
from eagle3fn.data.features import write_index, write_shard

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}"
    "{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
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


def tiny_tokenizer(template: str | None = CHATML) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<|im_start|>", "<|im_end|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(
        models.BPE(vocab={text: i for i, text in enumerate(specials + letters)}, merges=[])
    )
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    inner.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": specials})
    tokenizer.chat_template = template
    return tokenizer


def tiny_model(name: str = "Llama", **changes: Any) -> Any:
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **changes})
    model = getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")(config)
    return model.eval().requires_grad_(False)


def talk(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def write_talks(path: Path, count: int) -> Path:
    rows = [
        {"id": f"row{i}", "conversations": talk("q" * (1 + i % 3), "answer " * (1 + i % 4))}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def random_sample(length: int, seed: int, vocab: int = 50, hidden: int = 4) -> Sample:
    generator = torch.Generator().manual_seed(seed)
    return Sample(
        torch.randint(vocab, (length,), generator=generator),
        torch.randint(2, (length,), generator=generator),
        torch.randn(length, 3 * hidden, generator=generator).bfloat16(),
        torch.randn(length, hidden, generator=generator).bfloat16(),
    )


def write_folder(
    folder: Path, samples: list[Sample], vocab: int = 50, hidden: int = 4, per_shard: int = 3
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    sidecars = []
    for number, start in enumerate(range(0, len(samples), per_shard)):
        part = {str(i): samples[i] for i in range(start, min(start + per_shard, len(samples)))}
        entries = [
            {
                "id": f"row{k}",
                "key": k,
                "length": len(s.input_ids),
                "supervised": int(s.row_mask.sum()),
            }
            for k, s in part.items()
        ]
        sidecars.append(write_shard(folder, number, part, {"samples": entries}))
    target = {"name": "tiny", "hidden_size": hidden, "vocab_size": vocab}
    write_index(folder, {"target": target, "dtype": "bfloat16", "max_length": 64}, sidecars)
    return folder

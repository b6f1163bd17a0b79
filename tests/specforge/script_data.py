"""What SpecForge's script reads, in a small size."""

import json
from pathlib import Path

from bench.specforge_data import untie, write_ckpts
from eagle3fn.data.extract import extract
from eagle3fn.data.sources import model_source
from tests.factories import make_draft, tiny_model, tiny_template, tiny_tokenizer, write_talks

TINY = make_draft(
    16,
    300,
    64,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    max_position_embeddings=256,
    initializer_range=0.02,
)
"""The draft of `write_data`, for the target of `tests.factories`."""


def write_data(root: Path) -> Path:
    """Write all of it into a folder; returns that.

    `target` is a tied target with its head stored separately, as SpecForge reads it; `features` has
    seven samples, `talks.jsonl` their conversations, `draft.json` the draft's configuration.
    """
    model = tiny_model(tie_word_embeddings=True, num_hidden_layers=7).bfloat16()
    model.save_pretrained(root / "tied")
    tiny_tokenizer().save_pretrained(root / "tied")
    untie(root / "tied", root / "target")

    talks = write_talks(root / "talks.jsonl", 7)
    source = model_source(model, (1, 1, 1))
    extract(source, tiny_template(), talks, root / "found", max_length=40)
    assert write_ckpts(root / "found", root / "features") == 7

    draft = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "tie_word_embeddings": False,
        "hidden_size": TINY.hidden_size,
        "intermediate_size": TINY.intermediate_size,
        "head_dim": TINY.head_dim,
        "vocab_size": TINY.vocab_size,
        "draft_vocab_size": TINY.draft_vocab_size,
        "num_attention_heads": TINY.num_attention_heads,
        "num_key_value_heads": TINY.num_key_value_heads,
        "max_position_embeddings": TINY.max_position_embeddings,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 5e4,
        "num_hidden_layers": 1,
    }
    (root / "draft.json").write_text(json.dumps(draft))
    return root


def script_arguments(data: Path, cache: Path, *more: str) -> list[str]:
    """Arguments of SpecForge's script on a folder of `write_data`, without `--output-dir`."""
    places = {
        "--target-model-path": data / "target",
        "--draft-model-config": data / "draft.json",
        "--train-data-path": data / "talks.jsonl",
        "--train-hidden-states-path": data / "features",
        "--cache-dir": cache,
    }
    arguments = []
    for name, path in places.items():
        arguments += [name, str(path)]
    arguments += ["--chat-template", "qwen", "--attention-backend", "sdpa", "--max-length", "40"]
    arguments += ["--batch-size", "2", "--learning-rate", "1e-2"]
    arguments += ["--dataloader-num-workers", "0", "--build-dataset-num-proc", "1"]
    return [*arguments, *more]

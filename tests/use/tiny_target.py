"""A tiny target, and random drafts of it."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from eagle3fn.base.draft_config import DraftConfig
from eagle3fn.base.types import Frozen, VocabMap
from eagle3fn.model.table import init_params
from eagle3fn.testing.builders import on
from eagle3fn.use.export import Draft, export
from tests.factories import make_draft, make_map

LAYERS = 6
VOCAB = 128
DRAFT_VOCAB = 96


@cache
def target(device: str = "cpu") -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCAB,
        max_position_embeddings=256,
        initializer_range=0.3,
        tie_word_embeddings=False,
    )
    model: Any = LlamaForCausalLM(config).eval().requires_grad_(False)
    return model.to(device)


def draft_config() -> DraftConfig:
    return make_draft(
        32,
        VOCAB,
        DRAFT_VOCAB,
        intermediate_size=48,
        head_dim=8,
        max_position_embeddings=256,
        initializer_range=0.02,
        aux_layers=(0, 2, 4),
    )


def vocab_map() -> VocabMap:
    return make_map(VOCAB, DRAFT_VOCAB, torch.Generator().manual_seed(1))


def random_draft(seed: int = 0, device: str = "cpu") -> Draft:
    params = init_params(draft_config(), seed, torch.float32)
    return Draft(draft_config(), on(device, params), on(device, vocab_map()), None)


def prompt(seed: int, size: int, device: str = "cpu") -> Tensor:
    ids = torch.randint(0, VOCAB, (1, size), generator=torch.Generator().manual_seed(seed))
    return ids.to(device)


def write_pair(root: Path) -> tuple[Path, Path]:
    """Folders of a target whose tokens are characters, and of a random draft of it."""
    words = Tokenizer(models.WordLevel({chr(i): i for i in range(VOCAB)}, unk_token="\x00"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")  # pyright: ignore
    template = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="\x02", chat_template=template
    )
    model = target()
    model.generation_config = GenerationConfig(eos_token_id=[2, 3], pad_token_id=2)
    model.save_pretrained(root / "target")
    tokenizer.save_pretrained(root / "target")
    write_draft(root / "draft")
    return root / "target", root / "draft"


def write_draft(folder: Path, **changes: Any) -> None:
    """A random draft; `changes` of its configuration make it one of another target."""
    draft = random_draft()
    config = replace(draft_config(), **changes)
    params = dict(draft.params)
    t2d, d2t = draft.vocab
    if config.vocab_size != VOCAB:
        t2d = torch.cat([t2d, torch.zeros(config.vocab_size - VOCAB, dtype=torch.bool)])
    if config.target_hidden_size != config.hidden_size:
        params["embed_tokens.weight"] = torch.zeros(config.vocab_size, config.hidden_size)
        params["fc.weight"] = torch.zeros(config.hidden_size, 3 * config.target_hidden_size)
    frozen = Frozen(None, torch.zeros(1), t2d, d2t)
    export(params, frozen, config, folder, LAYERS, torch.float32)

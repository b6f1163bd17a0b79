"""A tiny target, and random drafts of it."""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from eagle3fn.base.draft_config import DraftConfig
from eagle3fn.base.types import VocabMap
from eagle3fn.model.table import init_params
from eagle3fn.testing.builders import on
from eagle3fn.use.export import Draft

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
    return DraftConfig(
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=VOCAB,
        draft_vocab_size=DRAFT_VOCAB,
        target_hidden_size=32,
        max_position_embeddings=256,
    )


def vocab_map() -> VocabMap:
    order = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(1))
    kept = order[:DRAFT_VOCAB].sort().values
    t2d = torch.zeros(VOCAB, dtype=torch.bool)
    t2d[kept] = True
    return VocabMap(t2d, kept - torch.arange(DRAFT_VOCAB))


def random_draft(seed: int = 0, device: str = "cpu") -> Draft:
    params = init_params(draft_config(), seed, torch.float32)
    return Draft(draft_config(), on(device, params), on(device, vocab_map()), None)


def prompt(seed: int, size: int, device: str = "cpu") -> Tensor:
    ids = torch.randint(0, VOCAB, (1, size), generator=torch.Generator().manual_seed(seed))
    return ids.to(device)

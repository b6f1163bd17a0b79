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
    )


def vocab_map() -> VocabMap:
    return make_map(VOCAB, DRAFT_VOCAB, torch.Generator().manual_seed(1))


def random_draft(seed: int = 0, device: str = "cpu") -> Draft:
    params = init_params(draft_config(), seed, torch.float32)
    return Draft(draft_config(), on(device, params), on(device, vocab_map()), None)


def prompt(seed: int, size: int, device: str = "cpu") -> Tensor:
    ids = torch.randint(0, VOCAB, (1, size), generator=torch.Generator().manual_seed(seed))
    return ids.to(device)

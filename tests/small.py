"""Small fixed pieces for tests of laws: a configuration, frozen tensors, batches from a seed."""

from typing import NamedTuple

import torch
from torch import Tensor

import eagle3fn as e3
from eagle3fn.testing.builders import Case

H, V, D = 16, 40, 24
NUMERICS = "fast"

# The shapes of SpecForge's own equivalence gates.
GATE = Case(
    heads=(4, 2),
    head_dim=16,
    hidden=64,
    target_hidden=64,
    intermediate=128,
    vocab=256,
    draft_vocab=64,
    lengths=(16, 16),
    steps=3,
    mask="full",
    eps=1e-5,
    dtype="bfloat16",
)


def config_of(dtype: str = "float32", steps: int = 20, head_dim: int = 6, **objective) -> e3.Config:
    draft = e3.DraftConfig(
        hidden_size=H,
        intermediate_size=24,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        vocab_size=V,
        draft_vocab_size=D,
        target_hidden_size=H,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    return e3.Config(
        draft=draft,
        objective=e3.ObjectiveConfig(**{"ttt_length": 4, "numerics": NUMERICS, **objective}),
        optimizer=e3.OptimizerConfig(learning_rate=1e-2),
        train=e3.TrainConfig(steps=steps, dtype=dtype, init="random"),  # pyright: ignore[reportArgumentType]
    )


def frozen_of(config: e3.Config, seed: int = 99) -> e3.Frozen:
    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, config.train.dtype)
    kept = torch.randperm(V, generator=generator)[:D].sort().values
    t2d = torch.zeros(V, dtype=torch.bool)
    t2d[kept] = True
    embed, head = (torch.randn(V, H, generator=generator).to(dtype) for _ in range(2))
    return e3.Frozen(embed, head, t2d, kept - torch.arange(D))


def batch_of(seed: int, lengths: tuple[int, ...]) -> e3.Batch:
    generator = torch.Generator().manual_seed(seed)
    b, s = len(lengths), max(lengths)
    real = (torch.arange(s)[None] < torch.tensor(lengths)[:, None]).long()
    mask = (torch.rand(b, s, generator=generator) < 0.8).long() * real
    return e3.Batch(
        input_ids=torch.randint(0, V, (b, s), generator=generator) * real,
        attention_mask=real,
        row_mask=mask,
        aux_hidden=torch.randn(b, s, 3 * H, generator=generator) * real[..., None],
        last_hidden=torch.randn(b, s, H, generator=generator) * real[..., None],
    )


class LossInput(NamedTuple):
    """What one unroll step's loss is computed from."""

    logits: Tensor  # (1, S, D)
    p_draft: Tensor  # (1, S, D)
    p_full: Tensor  # (1, S, D)
    mask: Tensor  # (1, S, 1)


def underflow() -> LossInput:
    """Four rows of two tokens; in rows 0 (masked) and 2 the acceptance rate underflows.

    There the draft's probability is zero where the teacher's is not, and the other way round.
    """
    logits = torch.tensor([[[0.0, 200.0], [0.0, 1.0], [0.0, 200.0], [1.0, 0.0]]])
    p_full = torch.tensor([[[0.5, 0.0], [0.5, 0.4], [0.5, 0.0], [0.2, 0.3]]])
    p_draft = p_full / p_full.sum(-1, keepdim=True)
    return LossInput(logits, p_draft, p_full, torch.tensor([[0, 1, 1, 1]])[..., None])

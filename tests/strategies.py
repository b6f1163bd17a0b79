"""Hypothesis strategies and tiny builders. A drawn case is a few integers; its tensors come from a seeded generator."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from hypothesis import strategies as st
from torch import Tensor

from eagle3fn.base.config import Config, ObjectiveConfig, OptimizerConfig, TrainConfig
from eagle3fn.base.draft_config import DraftConfig
from eagle3fn.base.types import Batch, Frozen, Params

DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


@dataclass(frozen=True)
class Case:
    """One tiny problem: shapes, options and the seed of its tensors."""

    heads: tuple[int, int] = (4, 2)  # N, J
    head_dim: int = 6
    hidden: int = 16
    target_hidden: int = 16
    intermediate: int = 24
    vocab: int = 40
    draft_vocab: int = 24
    lengths: tuple[int, ...] = (7, 5)
    steps: int = 3
    dtype: Literal["bfloat16", "float32", "float64"] = "float32"
    teacher: Literal["compact", "full"] = "full"
    chunk: int = 11
    normalization: Literal["mask", "rows"] = "rows"
    own_positions: bool = False
    mask_padding: bool = False
    seed: int = 0

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def draft(self) -> DraftConfig:
        return DraftConfig(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_attention_heads=self.heads[0],
            num_key_value_heads=self.heads[1],
            head_dim=self.head_dim,
            vocab_size=self.vocab,
            draft_vocab_size=self.draft_vocab,
            target_hidden_size=self.target_hidden,
            max_position_embeddings=64,
        )

    def config(self, optimizer: OptimizerConfig | None = None, total_steps: int = 10) -> Config:
        objective = ObjectiveConfig(
            numerics="legacy",
            ttt_length=self.steps,
            normalization=self.normalization,
            teacher=self.teacher,
            teacher_chunk=self.chunk,
        )
        train = TrainConfig(steps=total_steps, dtype=self.dtype)
        return Config(self.draft(), objective, optimizer or OptimizerConfig(), train=train)


def generator(case: Case, purpose: int) -> torch.Generator:
    return torch.Generator().manual_seed(case.seed * 1000 + purpose)


def normal(shape: tuple[int, ...], scale: float, source: torch.Generator, dtype: torch.dtype) -> Tensor:
    return (torch.randn(shape, generator=source, dtype=torch.float64) * scale).to(dtype)


def shapes(draft: DraftConfig) -> dict[str, tuple[int, ...]]:
    """Exported names and shapes in `named_parameters()` order; a draft of its own width has its own embedding."""
    size, inner = draft.hidden_size, draft.intermediate_size
    query = draft.num_attention_heads * draft.head_dim
    group = draft.num_key_value_heads * draft.head_dim
    own = {"embed_tokens.weight": (draft.vocab_size, size)} if draft.target_hidden_size != size else {}
    return own | {
        "midlayer.self_attn.q_proj.weight": (query, 2 * size),
        "midlayer.self_attn.k_proj.weight": (group, 2 * size),
        "midlayer.self_attn.v_proj.weight": (group, 2 * size),
        "midlayer.self_attn.o_proj.weight": (size, query),
        "midlayer.mlp.gate_proj.weight": (inner, size),
        "midlayer.mlp.up_proj.weight": (inner, size),
        "midlayer.mlp.down_proj.weight": (size, inner),
        "midlayer.hidden_norm.weight": (size,),
        "midlayer.input_layernorm.weight": (size,),
        "midlayer.post_attention_layernorm.weight": (size,),
        "fc.weight": (size, 3 * draft.target_hidden_size),
        "norm.weight": (size,),
        "lm_head.weight": (draft.draft_vocab_size, size),
    }


def tame_params(case: Case) -> Params:
    """Weights that keep activations near one: norms around 1, matrices scaled by their fan-in."""
    source, params = generator(case, 1), {}
    for name, shape in shapes(case.draft()).items():
        if len(shape) == 1:
            params[name] = (1 + normal(shape, 0.1, source, torch.float64)).to(case.torch_dtype)
        else:
            scale = 1.0 if name.startswith("embed_tokens") else shape[1] ** -0.5
            params[name] = normal(shape, scale, source, case.torch_dtype)
    return params


def tame_frozen(case: Case) -> Frozen:
    """A target head and vocabulary map; the draft vocabulary is a random subset."""
    source = generator(case, 2)
    kept = torch.randperm(case.vocab, generator=source)[: case.draft_vocab].sort().values
    t2d = torch.zeros(case.vocab, dtype=torch.bool)
    t2d[kept] = True
    embed = normal((case.vocab, case.hidden), 1.0, source, case.torch_dtype)
    return Frozen(
        embed_tokens=embed if case.target_hidden == case.hidden else None,
        target_head=normal((case.vocab, case.target_hidden), case.target_hidden**-0.5, source, case.torch_dtype),
        t2d=t2d,
        d2t=kept - torch.arange(case.draft_vocab),
    )


def tame_batch(case: Case, index: int = 0) -> Batch:
    """Right-padded rows, about two of three trained: real ones but the last, or, with `mask_padding`, any.

    Only a trained padded row sees padded keys, so only there the padding's part of the mask shows.
    """
    source = generator(case, 10 + index)
    rows, length = len(case.lengths), max(case.lengths)
    real = torch.arange(length)[None] < torch.tensor(case.lengths)[:, None]
    inner = torch.arange(length)[None] < torch.tensor(case.lengths)[:, None] - 1
    wanted = torch.rand(rows, length, generator=source) < 0.7
    ids = torch.randint(0, case.vocab, (rows, length), generator=source)
    aux = normal((rows, length, 3 * case.target_hidden), 1.0, source, case.torch_dtype)
    last = normal((rows, length, case.target_hidden), 2.0, source, case.torch_dtype)
    positions = torch.rand(rows, length, generator=source).argsort(-1) if case.own_positions else None
    return Batch(
        input_ids=ids * real,
        attention_mask=real.long(),
        loss_mask=(wanted if case.mask_padding else wanted & inner).long(),
        aux_hidden=aux * real[..., None],
        last_hidden=last * real[..., None],
        position_ids=positions,
    )


@st.composite
def cases(draw: st.DrawFn, **fixed: object) -> Case:
    """Cases over every option; `fixed` pins fields."""
    kv_heads = draw(st.sampled_from([1, 2]))
    vocab = draw(st.integers(20, 50))
    hidden = draw(st.sampled_from([16, 24]))
    case = Case(
        heads=(kv_heads * draw(st.sampled_from([1, 2, 3])), kv_heads),
        head_dim=draw(st.sampled_from([4, 6, 8])),
        hidden=hidden,
        target_hidden=draw(st.sampled_from([hidden, hidden, 20])),
        intermediate=draw(st.integers(8, 40)),
        vocab=vocab,
        draft_vocab=draw(st.one_of(st.just(vocab), st.integers(vocab // 2, vocab - 1))),
        lengths=tuple(draw(st.lists(st.integers(5, 10), min_size=1, max_size=3))),
        steps=draw(st.integers(1, 4)),
        dtype=draw(st.sampled_from(["float32", "bfloat16"])),
        teacher=draw(st.sampled_from(["compact", "full"])),
        chunk=draw(st.integers(3, 60)),
        normalization=draw(st.sampled_from(["rows", "mask"])),
        own_positions=draw(st.booleans()),
        mask_padding=draw(st.booleans()),
        seed=draw(st.integers(0, 10**6)),
    )
    return replace(case, **fixed)  # pyright: ignore[reportArgumentType]

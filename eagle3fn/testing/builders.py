"""Tiny problems: a case is a few integers and names, its tensors come from a seeded generator."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from eagle3fn.base.config import Config, ObjectiveConfig, OptimizerConfig, TrainConfig
from eagle3fn.base.draft_config import DraftConfig
from eagle3fn.base.types import Batch, Frozen, Params
from eagle3fn.model.table import EMBED, shapes


@dataclass(frozen=True)
class Case:
    """One tiny problem: shapes, options and the seed of its tensors.

    `mask` says which rows are trained: about two of three real ones but the last, any of them with padded rows, all
    real ones, one (not its sample's last, unless every sample has one place alone), none. `tokens` says where the
    target's choices lie: anywhere, in the draft vocabulary, or, if there is an outside, mostly outside. `tied` makes
    the target's head its embedding, where widths allow.
    """

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
    loss: Literal["kl", "lk_alpha", "lk_lambda"] = "kl"
    kl_scale: float = 1.0
    kl_decay: float = 3.0
    mask: Literal["drawn", "padding", "full", "one", "empty"] = "drawn"
    tokens: Literal["mixed", "inside", "outside"] = "mixed"
    tied: bool = False
    eps: float = 1e-6
    theta: float = 10_000.0
    own_positions: bool = False
    seed: int = 0

    @property
    def torch_dtype(self) -> torch.dtype:
        """The compute dtype."""
        return getattr(torch, self.dtype)

    def draft(self) -> DraftConfig:
        """The draft's shape."""
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
            rms_norm_eps=self.eps,
            rope_theta=self.theta,
        )

    def config(self, optimizer: OptimizerConfig | None = None, total_steps: int = 10) -> Config:
        """The case under the plain numerics."""
        objective = ObjectiveConfig(
            numerics="plain",
            ttt_length=self.steps,
            normalization=self.normalization,
            loss=self.loss,
            kl_scale=self.kl_scale,
            kl_decay=self.kl_decay,
            teacher=self.teacher,
            teacher_chunk=self.chunk,
        )
        train = TrainConfig(steps=total_steps, dtype=self.dtype)
        return Config(self.draft(), objective, optimizer or OptimizerConfig(), train=train)


def generator(case: Case, purpose: int) -> torch.Generator:
    """The case's source of random numbers for one purpose."""
    return torch.Generator().manual_seed(case.seed * 1000 + purpose)


def normal(
    shape: tuple[int, ...], scale: float, source: torch.Generator, dtype: torch.dtype
) -> Tensor:
    """Normal numbers, drawn in fp64 and cast, so that a case is the same problem in every dtype."""
    return (torch.randn(shape, generator=source, dtype=torch.float64) * scale).to(dtype)


def on(device: str, tensors: Any) -> Any:
    """A dict or named tuple with its tensors on `device`."""
    if isinstance(tensors, dict):
        return {name: x.to(device) for name, x in tensors.items()}
    return type(tensors)(*(None if x is None else x.to(device) for x in tensors))


def tiny_params(case: Case) -> Params:
    """Weights that keep activations near one: norms around 1, matrices scaled by their fan-in."""
    source, params = generator(case, 1), {}
    for name, shape in shapes(case.draft()).items():
        if len(shape) == 1:
            params[name] = (1 + normal(shape, 0.1, source, torch.float64)).to(case.torch_dtype)
        else:
            scale = 1.0 if name == EMBED else shape[1] ** -0.5
            params[name] = normal(shape, scale, source, case.torch_dtype)
    return params


def tiny_frozen(case: Case) -> Frozen:
    """A target's embedding and head, and a vocabulary map; the draft vocabulary is a random subset."""
    source = generator(case, 2)
    kept = torch.randperm(case.vocab, generator=source)[: case.draft_vocab].sort().values
    t2d = torch.zeros(case.vocab, dtype=torch.bool)
    t2d[kept] = True
    embed = normal((case.vocab, case.hidden), 1.0, source, case.torch_dtype)
    head = normal(
        (case.vocab, case.target_hidden), case.target_hidden**-0.5, source, case.torch_dtype
    )
    if case.tokens != "mixed":  # halved logits are seldom the largest
        head = torch.where((t2d == (case.tokens == "inside"))[:, None], head, head / 2)
    same_width = case.target_hidden == case.hidden
    embed = head if case.tied else embed
    return Frozen(embed if same_width else None, head, t2d, kept - torch.arange(case.draft_vocab))


def tiny_batch(case: Case, index: int = 0) -> Batch:
    """Right-padded rows of a batch; another `index` is another batch of the same lengths.

    Only a trained padded row sees padded keys, so only there the padding's part of the attention mask shows.
    """
    source = generator(case, 10 + index)
    rows, length = len(case.lengths), max(case.lengths)
    real = torch.arange(length)[None] < torch.tensor(case.lengths)[:, None]
    wanted = torch.rand(rows, length, generator=source) < 0.7
    ids = torch.randint(0, case.vocab, (rows, length), generator=source)
    aux = normal((rows, length, 3 * case.target_hidden), 1.0, source, case.torch_dtype)
    last = normal((rows, length, case.target_hidden), 2.0, source, case.torch_dtype)
    positions = (
        torch.rand(rows, length, generator=source).argsort(-1) if case.own_positions else None
    )
    return Batch(
        input_ids=ids * real,
        attention_mask=real.long(),
        row_mask=_row_mask(case, real, wanted, source).long(),
        aux_hidden=aux * real[..., None],
        last_hidden=last * real[..., None],
        position_ids=positions,
    )


def _row_mask(case: Case, real: Tensor, wanted: Tensor, source: torch.Generator) -> Tensor:
    match case.mask:
        case "drawn":
            last = torch.tensor(case.lengths)[:, None] - 1
            return wanted & real & (torch.arange(real.shape[1])[None] != last)
        case "padding":
            return wanted
        case "full":
            return real
        case "one":
            sample = next((i for i, length in enumerate(case.lengths) if length > 1), 0)
            row = int(torch.randint(0, max(case.lengths[sample] - 1, 1), (), generator=source))
            return torch.zeros_like(real).index_put(
                (torch.tensor(sample), torch.tensor(row)), torch.tensor(True)
            )
        case "empty":
            return torch.zeros_like(real)

"""Tiny problems: a case is a few integers and names; its tensors are drawn from its seed."""

from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from eagle3fn.base.config import Config
from eagle3fn.base.draft_config import DraftConfig
from eagle3fn.base.sections import ObjectiveConfig, OptimizerConfig, TrainConfig
from eagle3fn.base.tree import tree_map
from eagle3fn.base.types import Batch, Frozen, Params, Sample
from eagle3fn.base.weights import Weights
from eagle3fn.data.collate import align, collate_packed
from eagle3fn.model.table import weights


@dataclass(frozen=True)
class Case:
    """One tiny problem: shapes, options and the seed of its tensors."""

    # The draft's shape: (N, J) query and key-value heads, then sizes.
    heads: tuple[int, int] = (4, 2)
    head_dim: int = 6
    hidden: int = 16
    target_hidden: int = 16
    intermediate: int = 24
    vocab: int = 40
    draft_vocab: int = 24

    # The batch: every sample's number of tokens.
    lengths: tuple[int, ...] = (7, 5)

    # The objective; see `ObjectiveConfig`.
    steps: int = 3
    dtype: Literal["bfloat16", "float32", "float64"] = "float32"
    teacher: Literal["compact", "full"] = "full"
    chunk: int = 11
    normalization: Literal["mask", "rows"] = "rows"
    loss: str | Weights = "kl"
    kl_scale: float = 1.0
    kl_decay: float = 3.0

    mask: Literal["drawn", "padding", "full", "one", "empty"] = "drawn"
    """The trained rows: about two of three real ones except a sample's last; about two of three of
    any, padded ones too; all real ones; one, which is a sample's last only if every sample has one
    token; or none."""

    tokens: Literal["mixed", "inside", "outside"] = "mixed"
    """Where the target's choices are: anywhere; in the draft vocabulary; or mostly outside it."""

    tied: bool = False
    """The target's head is its embedding, if the draft is as wide as the target."""

    eps: float = 1e-6
    theta: float = 10_000.0
    own_positions: bool = False
    taps: int = 3
    """The target's tapped layers: its first ones."""

    switches: tuple[tuple[str, Any], ...] = ()
    """Fields of `DraftConfig` that change what the draft computes, each with its value. A window is
    at least `steps`, as a configuration must have it.
    """

    seed: int = 0

    def __repr__(self) -> str:
        """The fields that don't have their default; evaluates to an equal case."""
        changed = []
        for field in fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                changed.append(f"{field.name}={value!r}")
        return f"Case({', '.join(changed)})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """What Hypothesis and IPython print; of a dataclass they print every field otherwise."""
        printer.text(repr(self))

    @property
    def torch_dtype(self) -> torch.dtype:
        """The compute dtype."""
        return getattr(torch, self.dtype)

    def draft(self) -> DraftConfig:
        """The draft's shape."""
        switches = dict(self.switches)
        if "draft_window" in switches:
            switches["draft_window"] = max(switches["draft_window"], self.steps)
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
            aux_layers=None if self.taps == 3 else tuple(range(self.taps)),
            **switches,
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
    """Normal numbers, drawn in fp64 and cast: a case is the same problem in every dtype."""
    return (torch.randn(shape, generator=source, dtype=torch.float64) * scale).to(dtype)


def on(device: str, tree: Any) -> Any:
    """A dict or named tuple with its tensors on `device`."""
    return tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, tree)


def tiny_params(case: Case) -> Params:
    """Weights that keep activations near one: norms around 1, matrices scaled by their fan-in."""
    source = generator(case, 1)
    params = {}
    draft = case.draft()
    for name, weight in weights(draft).items():
        shape = weight.shape(draft)
        if weight.role == "norm":
            params[name] = (1 + normal(shape, 0.1, source, torch.float64)).to(case.torch_dtype)
        else:
            scales = {"embedding": 1.0, "bias": 0.3}
            scale = scales.get(weight.role) or shape[1] ** -0.5
            params[name] = normal(shape, scale, source, case.torch_dtype)
    return params


def tiny_frozen(case: Case) -> Frozen:
    """A target's embedding and head, and a vocabulary map.

    The draft vocabulary is a random subset of the target's.
    """
    source = generator(case, 2)

    # The map: target ids in the draft vocabulary, in ascending order.
    kept = torch.randperm(case.vocab, generator=source)[: case.draft_vocab].sort().values  # (D,)
    t2d = torch.zeros(case.vocab, dtype=torch.bool)
    t2d[kept] = True
    d2t = kept - torch.arange(case.draft_vocab)

    embed = normal((case.vocab, case.hidden), 1.0, source, case.torch_dtype)
    head_shape = (case.vocab, case.target_hidden)
    head = normal(head_shape, case.target_hidden**-0.5, source, case.torch_dtype)

    # A halved row gives a halved logit, which is seldom the largest.
    if case.tokens != "mixed":
        preferred = t2d == (case.tokens == "inside")
        head = torch.where(preferred[:, None], head, head / 2)

    # A draft that is not as wide as its target has no use for the target's embedding.
    if case.target_hidden != case.hidden:
        return Frozen(None, head, t2d, d2t)
    return Frozen(head if case.tied else embed, head, t2d, d2t)


class Unaligned(NamedTuple):
    """Padded samples before they are aligned: each entry is at the token that it is of."""

    input_ids: Tensor  # (B, S) int64
    attention_mask: Tensor  # (B, S) int64
    row_mask: Tensor  # (B, S) int64, of step 0
    aux_hidden: Tensor  # (B, S, A·Ht)
    last_hidden: Tensor  # (B, S, Ht)
    position_ids: Tensor | None = None  # (B, S) int64
    row_counts: Tensor | None = None  # (K,) fp32, as in `Batch`

    def aligned(self, k: int) -> Batch:
        """The batch of `k` unroll steps."""
        tensors = self._asdict()
        row_counts = tensors.pop("row_counts")
        return align(**tensors, k=k)._replace(row_counts=row_counts)


def tiny_batch(case: Case, index: int = 0) -> Batch:
    """Right-padded samples `(B, S)`; another `index` is another batch of the same lengths.

    Only a trained padded row attends to padded keys. So only there can a wrong attention mask for
    padding be seen.
    """
    return tiny_unaligned(case, index).aligned(case.steps)


def tiny_unaligned(case: Case, index: int = 0) -> Unaligned:
    """What `tiny_batch` is made from."""
    source = generator(case, 10 + index)
    samples = len(case.lengths)
    longest = max(case.lengths)
    real = torch.arange(longest)[None] < torch.tensor(case.lengths)[:, None]  # (B, S)

    # The order of the draws is part of the case.
    chosen = torch.rand(samples, longest, generator=source) < 0.7
    ids = torch.randint(0, case.vocab, (samples, longest), generator=source)
    aux_shape = (samples, longest, case.taps * case.target_hidden)
    aux = normal(aux_shape, 1.0, source, case.torch_dtype)
    last_shape = (samples, longest, case.target_hidden)
    last = normal(last_shape, 2.0, source, case.torch_dtype)
    positions = None
    if case.own_positions:
        positions = torch.rand(samples, longest, generator=source).argsort(-1)

    return Unaligned(
        input_ids=ids * real,
        attention_mask=real.long(),
        row_mask=_row_mask(case, real, chosen, source).long(),
        aux_hidden=aux * real[..., None],
        last_hidden=last * real[..., None],
        position_ids=positions,
    )


def tiny_packed(case: Case, index: int = 0, survives: list[Tensor] | None = None) -> Batch:
    """The samples of `tiny_batch` in one packed row, `(1, S)`.

    `survives` are at how many steps their rows take part, each `(S,)` int64. No sample's last row
    may be trained: it has no label. `case.normalization` must be "mask".
    """
    batch = collate_packed(
        samples=tiny_samples(case, index),
        config=case.config(),
        align_mask=lambda token_mask: token_mask,  # the trained rows already
        survives=survives,
    )
    positions = tiny_unaligned(case, index).position_ids
    if positions is None:
        return batch
    own = [row[:length] for row, length in zip(positions, case.lengths, strict=True)]
    return batch._replace(position_ids=torch.cat(own)[None])


def tiny_samples(case: Case, index: int = 0) -> list[Sample]:
    """The samples of `tiny_batch` without padding; each `token_mask` is the rows that are trained
    at step 0.
    """
    padded = tiny_unaligned(case, index)
    samples = []
    for number, length in enumerate(case.lengths):
        real = slice(length)
        sample = Sample(
            input_ids=padded.input_ids[number, real],
            token_mask=padded.row_mask[number, real],
            aux_hidden=padded.aux_hidden[number, real],
            last_hidden=padded.last_hidden[number, real],
        )
        samples.append(sample)
    return samples


def _row_mask(case: Case, real: Tensor, chosen: Tensor, source: torch.Generator) -> Tensor:
    """The trained rows `(B, S)` that `case.mask` describes, of real and of randomly chosen ones."""
    match case.mask:
        case "drawn":
            last = torch.tensor(case.lengths)[:, None] - 1
            return chosen & real & (torch.arange(real.shape[1])[None] != last)

        case "padding":
            return chosen

        case "full":
            return real

        case "one":
            # In the first sample of more than one token, a row that is not its last.
            longer = [i for i, length in enumerate(case.lengths) if length > 1]
            sample = longer[0] if longer else 0
            candidates = max(case.lengths[sample] - 1, 1)
            row = int(torch.randint(0, candidates, (), generator=source))
            mask = torch.zeros_like(real)
            mask[sample, row] = True
            return mask

        case "empty":
            return torch.zeros_like(real)

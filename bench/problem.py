"""Random, tame, seeded problems at the shapes of real drafts."""

from typing import NamedTuple

import torch
from torch import Tensor

from eagle3fn.base.draft_config import DraftConfig
from eagle3fn.base.rows import both_rows
from eagle3fn.base.types import Batch, Frozen, Params
from eagle3fn.data.collate import align_mask
from eagle3fn.model.table import shapes

TURN = (64, 256)  # tokens of a turn, at least and at most
SHAPES = {  # hidden, intermediate, heads, key-value heads, head, vocabulary, draft vocabulary, RoPE base
    "smollm2": (576, 1536, 9, 3, 64, 49152, 16384, 1e5),
    "qwen2.5-7b": (3584, 18944, 28, 4, 128, 152064, 16000, 1e6),
    "llama-3-8b": (4096, 14336, 32, 8, 128, 128256, 32000, 5e5),
    "tiny": (64, 96, 4, 2, 16, 256, 64, 1e4),
}


class Problem(NamedTuple):
    """What every side is given; the parameters are drawn apart, so that a side's memory holds its own."""

    draft: DraftConfig
    frozen: Frozen
    batch: Batch


def draft_of(shape: str, draft_vocab: int | None, seq: int) -> DraftConfig:
    """The draft of a recipe; another draft vocabulary where one is named."""
    h, i, n, j, e, v, d, theta = SHAPES[shape]
    return DraftConfig(
        hidden_size=h,
        intermediate_size=i,
        num_attention_heads=n,
        num_key_value_heads=j,
        head_dim=e,
        vocab_size=v,
        draft_vocab_size=draft_vocab or d,
        target_hidden_size=h,
        max_position_embeddings=max(seq, 2048),
        rope_theta=theta,
    )


def turns(length: int, masked: float, generator: torch.Generator) -> Tensor:
    """Supervised tokens of one sample, `(length,)` int64: turns of 64 to 256 tokens, masked ones first and in turn.

    Exactly `round(length · masked)` tokens are masked. Where one kind needs more turns than the other can give,
    its last ones follow each other.
    """
    hidden = round(length * masked)
    counts = _counts(hidden, length - hidden, generator)
    parts = [
        _split(size, count, generator)
        for size, count in zip((hidden, length - hidden), counts, strict=True)
    ]
    longest = max(counts)
    laid = [
        (kind, part[i]) for i in range(longest) for kind, part in enumerate(parts) if i < len(part)
    ]
    return torch.cat([torch.full((size,), kind, dtype=torch.int64) for kind, size in laid])


def _counts(hidden: int, shown: int, generator: torch.Generator) -> tuple[int, int]:
    """How many turns of each kind: equally many where both can."""
    low, high = TURN
    least = [-(-size // high) for size in (hidden, shown)]
    most = [
        max(size // low, at_least) for size, at_least in zip((hidden, shown), least, strict=True)
    ]
    first, last = max(least), min(most)
    if first > last:
        return (least[0], most[1]) if least[0] > most[1] else (most[0], least[1])
    count = int(torch.randint(first, last + 1, (), generator=generator))
    return count, count


def _split(total: int, count: int, generator: torch.Generator) -> list[int]:
    """`total` in `count` turns, each between the bounds; a single turn may be shorter."""
    sizes = []
    for left in range(count - 1, -1, -1):
        least, most = max(TURN[0], total - left * TURN[1]), min(TURN[1], total - left * TURN[0])
        sizes.append(
            int(torch.randint(least, most + 1, (), generator=generator)) if left else total
        )
        total -= sizes[-1]
    return sizes


def make_problem(
    draft: DraftConfig, *, batch: int, seq: int, masked: float, k: int, seed: int, dtype: torch.dtype, device: str,
    rank: int = 0,
) -> Problem:  # fmt: skip
    """Frozen tensors, the same on all ranks, and a rank's own batch, with its aligned mask and rows."""
    source = torch.Generator().manual_seed(1000 * seed + rank)
    spoken = torch.stack([turns(seq, masked, source) for _ in range(batch)])
    ids = torch.randint(0, draft.vocab_size, (batch, seq), generator=source)
    mask = torch.stack([align_mask(row, "legacy") for row in spoken])
    draw = Drawer(1000 * seed + rank, dtype, device)
    made = Batch(
        input_ids=ids.to(device),
        attention_mask=torch.ones_like(ids).to(device),
        row_mask=mask.to(device),
        aux_hidden=draw((batch, seq, 3 * draft.target_hidden_size), 1.0),
        last_hidden=draw((batch, seq, draft.target_hidden_size), 2.0),
        **{name: rows.to(device) for name, rows in both_rows(mask, k).items()},
    )
    return Problem(draft, make_frozen(draft, seed, dtype, device), made)


def make_frozen(draft: DraftConfig, seed: int, dtype: torch.dtype, device: str) -> Frozen:
    """A random target whose choices lie in the draft vocabulary, a random subset: its other rows are halved."""
    source = torch.Generator().manual_seed(seed)
    kept = (
        torch.randperm(draft.vocab_size, generator=source)[: draft.draft_vocab_size].sort().values
    )
    t2d = torch.zeros(draft.vocab_size, dtype=torch.bool)
    t2d[kept] = True
    draw = Drawer(seed + 2, dtype, device)
    head = draw((draft.vocab_size, draft.target_hidden_size), draft.target_hidden_size**-0.5)
    return Frozen(
        embed_tokens=draw((draft.vocab_size, draft.hidden_size), 1.0),
        target_head=torch.where(t2d.to(device)[:, None], head, head / 2),
        t2d=t2d.to(device),
        d2t=(kept - torch.arange(draft.draft_vocab_size)).to(device),
    )


def draw_params(draft: DraftConfig, seed: int, dtype: torch.dtype, device: str) -> Params:
    """Weights that keep activations near one."""
    draw = Drawer(seed + 1, dtype, device)
    return {
        name: torch.ones(shape, dtype=dtype, device=device)
        if len(shape) == 1
        else draw(shape, shape[1] ** -0.5)
        for name, shape in shapes(draft).items()
    }


class Drawer:
    """Normal numbers, drawn in fp32 on the device and cast."""

    def __init__(self, seed: int, dtype: torch.dtype, device: str) -> None:
        self.generator = torch.Generator(device).manual_seed(seed)
        self.dtype, self.device = dtype, device

    def __call__(self, shape: tuple[int, ...], scale: float) -> Tensor:
        """One tensor of this shape."""
        return (torch.randn(shape, generator=self.generator, device=self.device) * scale).to(
            self.dtype
        )

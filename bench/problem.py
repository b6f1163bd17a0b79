"""Random, seeded problems at the shapes of real drafts, with activations near one."""

from typing import NamedTuple

import torch
from torch import Tensor

from eagle3fn.base.config import Config
from eagle3fn.base.draft_config import DraftConfig
from eagle3fn.base.rows import plan_rows, surviving
from eagle3fn.base.sections import ObjectiveConfig
from eagle3fn.base.types import Batch, Frozen, Params, Sample
from eagle3fn.data.collate import align
from eagle3fn.data.survival import draw_survival
from eagle3fn.model.table import weights
from eagle3fn.specforge import align_mask

TURN = (64, 256)  # tokens of a turn, at least and at most


class Shape(NamedTuple):
    """A draft's sizes, by the names of `DraftConfig`."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    draft_vocab_size: int
    rope_theta: float


SHAPES = {
    "smollm2": Shape(576, 1536, 9, 3, 64, 49152, 16384, 1e5),
    "qwen2.5-7b": Shape(3584, 18944, 28, 4, 128, 152064, 16000, 1e6),
    "llama-3-8b": Shape(4096, 14336, 32, 8, 128, 128256, 32000, 5e5),
    "tiny": Shape(64, 96, 4, 2, 16, 256, 64, 1e4),
}


class Problem(NamedTuple):
    """What every side is given, but for its parameters: a side's memory holds its own."""

    draft: DraftConfig
    frozen: Frozen
    batch: Batch

    @property
    def scored(self) -> Tensor:
        """`(B, K, S)`: 1 where a row is scored at a step, which it survives to."""
        return surviving(self.batch.row_mask, self.batch.survives)


def draft_of(shape: str, draft_vocab: int | None, seq: int) -> DraftConfig:
    """The draft of a shape; another draft vocabulary where one is named."""
    sizes = SHAPES[shape]
    if draft_vocab:
        sizes = sizes._replace(draft_vocab_size=draft_vocab)
    return DraftConfig(
        **sizes._asdict(),
        target_hidden_size=sizes.hidden_size,
        max_position_embeddings=max(seq, 2048),
    )


def turns(length: int, masked: float, generator: torch.Generator) -> Tensor:
    """Supervised tokens of one sample, `(length,)` int64, in turns of 64 to 256 tokens.

    A masked turn comes first, then the two kinds alternate. Exactly `round(length · masked)` tokens
    are masked. Where one kind needs more turns than the other can give, its last ones follow each
    other.
    """
    hidden = round(length * masked)
    shown = length - hidden
    hidden_count, shown_count = _counts(hidden, shown, generator)
    hidden_turns = _split(hidden, hidden_count, generator)
    shown_turns = _split(shown, shown_count, generator)

    parts = []
    for place in range(max(hidden_count, shown_count)):
        for value, sizes in ((0, hidden_turns), (1, shown_turns)):
            if place < len(sizes):
                parts.append(torch.full((sizes[place],), value, dtype=torch.int64))
    return torch.cat(parts)


def _counts(hidden: int, shown: int, generator: torch.Generator) -> tuple[int, int]:
    """How many turns of each kind: equally many where both can."""
    shortest, longest = TURN
    least_hidden = -(-hidden // longest)
    least_shown = -(-shown // longest)
    most_hidden = max(hidden // shortest, least_hidden)
    most_shown = max(shown // shortest, least_shown)

    first = max(least_hidden, least_shown)
    last = min(most_hidden, most_shown)
    if first <= last:
        count = int(torch.randint(first, last + 1, (), generator=generator))
        return count, count

    # No number fits both: the longer kind takes as few turns as it can, the other as many.
    if least_hidden > most_shown:
        return least_hidden, most_shown
    return most_hidden, least_shown


def _split(total: int, count: int, generator: torch.Generator) -> list[int]:
    """`total` in `count` turns, each between the bounds; a single turn may be shorter."""
    shortest, longest = TURN
    sizes = []
    for left in range(count - 1, 0, -1):
        # What is left over must fit into the turns that are left.
        least = max(shortest, total - left * longest)
        most = min(longest, total - left * shortest)
        size = int(torch.randint(least, most + 1, (), generator=generator))
        sizes.append(size)
        total -= size
    if count:
        sizes.append(total)
    return sizes


def make_problem(
    draft: DraftConfig,
    *,
    batch: int,
    seq: int,
    masked: float,
    k: int,
    seed: int,
    dtype: torch.dtype,
    device: str,
    rank: int = 0,
    survival: float = 1.0,
) -> Problem:
    """Frozen tensors, the same on all ranks, and a rank's own batch with mask and rows.

    Args:
        draft: the draft's shape.
        batch: samples.
        seq: tokens of each sample.
        masked: share of the tokens without a loss.
        k: unroll steps.
        seed: of all numbers.
        dtype: of embeddings, head and features.
        device: where the tensors are made.
        rank: chooses the batch.
        survival: chance that a row goes on to the next unroll step.
    """
    source = torch.Generator().manual_seed(1000 * seed + rank)
    token_masks = [turns(seq, masked, source) for _ in range(batch)]
    ids = torch.randint(0, draft.vocab_size, (batch, seq), generator=source)
    row_mask = torch.stack([align_mask(token_mask) for token_mask in token_masks])

    draw = Drawer(1000 * seed + rank, dtype, device)
    made = align(
        input_ids=ids.to(device),
        attention_mask=torch.ones_like(ids).to(device),
        row_mask=row_mask.to(device),
        aux_hidden=draw((batch, seq, draft.taps * draft.target_hidden_size), 1.0),
        last_hidden=draw((batch, seq, draft.target_hidden_size), 2.0),
        k=k,
    )
    problem = Problem(draft, make_frozen(draft, seed, dtype, device), made)
    return with_survival(problem, survival, k)


def with_survival(problem: Problem, survival: float, k: int) -> Problem:
    """A problem whose rows go on to each further unroll step by this chance, and the plan of it."""
    batch = problem.batch
    b, s = batch.attention_mask.shape
    survives = survives_of(b, s, k, survival)
    if survives is not None:
        batch = batch._replace(survives=survives.to(batch.row_mask.device))
    plan = plan_rows(batch.row_mask, batch.survives)
    return problem._replace(batch=batch._replace(plan=plan))


def survives_of(batch: int, seq: int, k: int, survival: float) -> Tensor | None:
    """At how many unroll steps each row takes part, `(B, S)` int64, as the data pipeline draws it
    for training step 0; None: every row at all.
    """
    objective = ObjectiveConfig(ttt_length=k, survival=survival)
    config = Config(draft_of("tiny", None, seq), objective)
    row = torch.empty(seq)
    samples = [Sample(row, row, row, row)] * batch  # only their lengths are read
    drawn = draw_survival(samples, range(batch), config, step=0)
    return None if drawn is None else torch.stack(drawn)


def make_frozen(draft: DraftConfig, seed: int, dtype: torch.dtype, device: str) -> Frozen:
    """A random target whose most likely tokens are in the draft vocabulary, a random subset.

    The head's rows of all other tokens are halved.
    """
    source = torch.Generator().manual_seed(seed)
    tokens = torch.randperm(draft.vocab_size, generator=source)
    kept = tokens[: draft.draft_vocab_size].sort().values
    t2d = torch.zeros(draft.vocab_size, dtype=torch.bool)
    t2d[kept] = True

    draw = Drawer(seed + 2, dtype, device)
    head = draw((draft.vocab_size, draft.target_hidden_size), draft.target_hidden_size**-0.5)
    embed = draw((draft.vocab_size, draft.hidden_size), 1.0)
    return Frozen(
        embed_tokens=None if draft.other_width else embed,
        target_head=torch.where(t2d.to(device)[:, None], head, head / 2),
        t2d=t2d.to(device),
        d2t=(kept - torch.arange(draft.draft_vocab_size)).to(device),
    )


def draw_params(draft: DraftConfig, seed: int, dtype: torch.dtype, device: str) -> Params:
    """Weights that keep activations near one: norms 1, biases 0.1, matrices normal(0, 1/fan_in)."""
    draw = Drawer(seed + 1, dtype, device)
    params = {}
    for name, weight in weights(draft).items():
        shape = weight.shape(draft)
        if weight.role == "norm":
            params[name] = torch.ones(shape, dtype=dtype, device=device)
        elif weight.role == "bias":
            params[name] = torch.full(shape, 0.1, dtype=dtype, device=device)
        else:
            params[name] = draw(shape, shape[1] ** -0.5)
    return params


class Drawer:
    """Normal numbers, drawn in fp32 on the device and cast."""

    def __init__(self, seed: int, dtype: torch.dtype, device: str) -> None:
        self.generator = torch.Generator(device).manual_seed(seed)
        self.dtype = dtype
        self.device = device

    def __call__(self, shape: tuple[int, ...], scale: float) -> Tensor:
        """One tensor of this shape with this standard deviation."""
        drawn = torch.randn(shape, generator=self.generator, device=self.device)
        return (drawn * scale).to(self.dtype)

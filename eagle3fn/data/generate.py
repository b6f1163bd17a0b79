"""The target writes on: tokens drawn after prompts, a batch at once."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eagle3fn.data.target import cache_name, stop_ids

_SEEDS_APART = 1_000_003  # generators of different seeds and batches differ
_LIKELIEST = 256  # tokens that a draw chooses from
_COMPACT_EVERY = 8  # tokens


class Sampling(NamedTuple):
    """How tokens are drawn."""

    temperature: float  # of the softmax; 0 is greedy
    top_p: float  # nucleus mass
    max_new: int  # tokens


class Continuation(NamedTuple):
    """What the target wrote after one prompt."""

    ids: list[int]  # new tokens, without the one that ended it
    stop: int | None  # the stop token that ended it; None: the limit did

    @property
    def ended(self) -> bool:
        """Whether a stop token ended it, not the limit."""
        return self.stop is not None


def batch_generator(seed: int, index: int) -> torch.Generator:
    """What the tokens of batch `index` are drawn by."""
    return torch.Generator().manual_seed((seed * _SEEDS_APART + index) % 2**63)


def generate(
    model: Any, tokenizer: Any, prompts: list[str], sampling: Sampling, generator: torch.Generator
) -> list[Continuation]:
    """Sample a continuation of each prompt, all in one batch; `generate_ids` of their tokens.

    Raises:
        UserError: no stop token, neither of the model nor of the tokenizer.
    """
    if not prompts:
        return []
    rows = tokenizer(prompts, add_special_tokens=False).input_ids
    return generate_ids(model, rows, sampling, stop_ids(model, tokenizer), generator)


@torch.no_grad()
def generate_ids(
    model: Any,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    stops: Sequence[int],
    generator: torch.Generator,
) -> list[Continuation]:
    """Sample a continuation of each prompt of token ids, all in one batch.

    Rows that ended leave the batch every few tokens, so that short answers don't cost what the
    longest does. Below, B is the number of prompts and A of those still in the batch.

    Args:
        model: the target, on any device.
        prompts: at least one, of at least one token each.
        sampling: how tokens are drawn.
        stops: tokens that end a row, at least one.
        generator: of the CPU; what is drawn is a function of it, the prompts and their order.
    """
    device = model.device
    ends = torch.tensor(stops, device=device)
    ids, mask = _left_padded(prompts, stops[0])
    new_ids = ids.to(device)  # (A, S) at first, then (A, 1): what the cache does not hold yet
    mask = mask.to(device)  # (A, tokens so far)

    cache_key = cache_name(model)
    cache = None
    alive = torch.arange(len(prompts), device=device)  # (A,): the prompts in the batch
    done = torch.zeros(len(prompts), dtype=torch.bool, device=device)  # (B,)
    rows: list[list[int]] = [[] for _ in prompts]
    ended_by: dict[int, int] = {}  # the stop tokens of prompts that ended
    for step in range(sampling.max_new):
        # One run of the target, one token a row. Positions count real tokens: padding is on the
        # left.
        positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, -new_ids.shape[1] :]
        out = model(
            input_ids=new_ids,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
            **{cache_key: cache},
        )
        cache = out[cache_key]
        token = sample(out.logits[:, -1].float(), sampling, generator)  # (A,)

        # Keep the tokens of rows that have not ended.
        done[alive] |= torch.isin(token, ends)
        for row, value in zip(alive.tolist(), token.tolist(), strict=True):
            if not done[row]:
                rows[row].append(value)
            else:
                ended_by.setdefault(row, value)  # what is drawn later does not count
        if done.all():
            break

        # The tokens are the next input. Now and then, drop the rows that have ended.
        new_ids = token[:, None]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        if step % _COMPACT_EVERY == 0 and done[alive].any():
            keep = (~done[alive]).nonzero().flatten()
            cache.batch_select_indices(keep)
            alive = alive[keep]
            new_ids = new_ids[keep]
            mask = mask[keep]
    return [Continuation(ids, ended_by.get(row)) for row, ids in enumerate(rows)]


def _left_padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Token ids and mask of rows, each `(B, S)` int64; the mask hides the token `pad`."""
    width = max(len(row) for row in rows)

    ids = []
    mask = []
    for row in rows:
        gap = width - len(row)
        ids.append([pad] * gap + list(row))
        mask.append([0] * gap + [1] * len(row))
    return torch.tensor(ids), torch.tensor(mask)


def sample(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Draw one token a row from `(B, V)` fp32 logits by temperature and nucleus: `(B,)` int64.

    Only the 256 likeliest tokens are drawn from, and their softmax is the nucleus's mass. A token
    is in the nucleus if the mass of those before it is at most `top_p`.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    top = torch.topk(logits / sampling.temperature, min(_LIKELIEST, logits.shape[-1]), dim=-1)
    mass = top.values.softmax(-1)  # (B, 256), descending
    mass = mass.masked_fill(mass.cumsum(-1) - mass > sampling.top_p, 0.0)
    # Drawn on the CPU: every device gives the same tokens for the same mass.
    choice = torch.multinomial(mass.cpu(), 1, generator=generator).to(logits.device)  # (B, 1)
    return top.indices.gather(-1, choice)[:, 0]

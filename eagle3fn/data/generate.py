"""The target writes on: tokens drawn after prompts, a batch at once."""

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
    ended: bool  # by a stop token, not by the limit


def batch_generator(seed: int, index: int) -> torch.Generator:
    """What the tokens of batch `index` are drawn by."""
    return torch.Generator().manual_seed(seed * _SEEDS_APART + index)


@torch.no_grad()
def generate(
    model: Any, tokenizer: Any, prompts: list[str], sampling: Sampling, generator: torch.Generator
) -> list[Continuation]:
    """Sample a continuation of each prompt, all in one batch.

    Rows that ended leave the batch every few tokens, so that short answers don't cost what the
    longest does. Below, B is the number of prompts and A of those still in the batch.

    Raises:
        UserError: no stop token, neither of the model nor of the tokenizer.
    """
    if not prompts:
        return []
    device = model.device
    ends = torch.tensor(stop_ids(model, tokenizer), device=device)
    ids, mask = _left_padded(tokenizer, prompts, int(ends[0]))
    new_ids = ids.to(device)  # (A, S) at first, then (A, 1): what the cache does not hold yet
    mask = mask.to(device)  # (A, tokens so far)

    cache_key = cache_name(model)
    cache = None
    alive = torch.arange(len(prompts), device=device)  # (A,): the prompts in the batch
    done = torch.zeros(len(prompts), dtype=torch.bool, device=device)  # (B,)
    rows: list[list[int]] = [[] for _ in prompts]
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
    return [Continuation(ids, ended) for ids, ended in zip(rows, done.tolist(), strict=True)]


def _left_padded(tokenizer: Any, prompts: list[str], end: int) -> tuple[Tensor, Tensor]:
    """Token ids and mask of the prompts, each `(B, S)` int64.

    `end` pads where the tokenizer has no pad token: the mask hides it.
    """
    rows = tokenizer(prompts, add_special_tokens=False).input_ids
    pad = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    width = max(len(row) for row in rows)

    ids = []
    mask = []
    for row in rows:
        gap = width - len(row)
        ids.append([pad] * gap + row)
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

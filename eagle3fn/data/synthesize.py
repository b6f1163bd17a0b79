"""The target writes its own conversations: it completes a user turn, then answers it.

Batch `b` is a pure function of (target, seed, settings, `b`): a run cut off goes on where it stopped.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from eagle3fn.base.errors import UserError
from eagle3fn.base.files import read_jsonl, write_jsonl
from eagle3fn.data.fingerprint import weights_digest
from eagle3fn.data.openings import opening, stub
from eagle3fn.data.overlap import grams_of_file, without
from eagle3fn.data.target import cache_name

_MARK = "\x02user turn\x02"
_COMPACT_EVERY = 8
_TRIED, _USABLE = (
    20,
    0.05,
)  # a target that has less than this share of usable turns after so many batches is refused


class Sampling(NamedTuple):
    """How tokens are drawn: softmax temperature (0 is greedy), nucleus mass, at most `max_new` tokens."""

    temperature: float
    top_p: float
    max_new: int


USER_TURN = Sampling(temperature=0.8, top_p=0.95, max_new=144)
ANSWER = Sampling(temperature=0.5, top_p=0.95, max_new=224)


def synthesize(
    model: Any,
    tokenizer: Any,
    out: str | Path,
    count: int,
    seed: int = 0,
    batch: int = 64,
    exclude: str | Path | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Write `count` or more conversations to `out` (JSONL, `.xz` and `.gz` compress); returns their number.

    Finished batches wait in `<out>.parts/` until all are there, and are taken up again by a call with the same
    target, template, sampling, `seed` and `batch`. A user turn is kept once. `exclude` names a JSONL
    file whose texts must not come back: conversations that share 13 words in a row with it are dropped.

    Raises:
        UserError: the tokenizer has no chat template, or less than 5% of the turns asked for are usable.
    """
    parts, digest = Path(f"{out}.parts"), _digest(model, tokenizer, seed, batch)
    forbidden = grams_of_file(exclude) if exclude else set()
    rows: list[dict] = []
    seen: set[str] = set()
    for index, turns in enumerate(_batches(model, tokenizer, parts / digest, seed, batch), 1):
        rows += [
            row
            for row in without(turns, forbidden)
            if not (_user(row) in seen or seen.add(_user(row)))
        ]
        on_progress(len(rows), count)
        if len(rows) >= count:
            break
        if index >= _TRIED and len(rows) < _USABLE * index * batch:
            raise UserError(
                f"target wrote {len(rows)} usable turns of {index * batch} asked for: they must end by themselves, "
                "differ and be free of the excluded texts; take an instruction-tuned target, or exclude less"
            )
    write_jsonl(out, rows)
    for part in parts.glob(f"*{digest}-*"):
        part.unlink()
    if not any(parts.iterdir()):
        parts.rmdir()
    return len(rows)


def _digest(model: Any, tokenizer: Any, seed: int, batch: int) -> str:
    """What a batch is a function of, as 12 hex digits."""
    settings = [weights_digest(model), tokenizer.chat_template, USER_TURN, ANSWER, seed, batch]
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def _user(row: dict) -> str:
    return row["conversations"][0]["content"]


def _batches(model: Any, tokenizer: Any, stem: Path, seed: int, batch: int) -> Iterator[list[dict]]:
    index = 0
    while True:
        part = stem.with_name(f"{stem.name}-{index:05d}.jsonl")
        if not part.exists():
            write_jsonl(part, _write_batch(model, tokenizer, seed, index, batch))
        yield read_jsonl(part)
        index += 1


def _write_batch(model: Any, tokenizer: Any, seed: int, index: int, batch: int) -> list[dict]:
    head, _ = user_frame(tokenizer)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
    names = range(index * batch, (index + 1) * batch)
    openings = [opening(seed, name) for name in names]
    ended = generate(model, tokenizer, [head + text for text in openings], USER_TURN, generator)
    users = {
        name: stub(start + tokenizer.decode(rest, skip_special_tokens=True), seed, name).strip()
        for name, start, (rest, whole) in zip(names, openings, ended, strict=True)
        if whole or '"""' in start
    }
    users = {name: text for name, text in users.items() if len(text) >= 12}
    prompts = [chat_prompt(tokenizer, text) for text in users.values()]
    answers = generate(model, tokenizer, prompts, ANSWER, generator)
    return [
        {
            "id": f"{seed}-{name}",
            "conversations": _turns(user, tokenizer.decode(ids, skip_special_tokens=True)),
        }
        for (name, user), (ids, _) in zip(users.items(), answers, strict=True)
        if len(ids) >= 16
    ]


def _turns(user: str, answer: str) -> list[dict]:
    return [{"role": "user", "content": user}, {"role": "assistant", "content": answer.strip()}]


def user_frame(tokenizer: Any) -> tuple[str, str]:
    """What the chat template puts before and behind the first user turn."""
    if not tokenizer.chat_template:
        raise UserError(
            f"{tokenizer.name_or_path}: no chat template; take an instruction-tuned target"
        )
    text = tokenizer.apply_chat_template([{"role": "user", "content": _MARK}], tokenize=False)
    head, _, tail = text.partition(_MARK)
    return head, tail


def chat_prompt(tokenizer: Any, user: str) -> str:
    """The chat template around one user turn, up to where the answer begins."""
    messages = [{"role": "user", "content": user}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


@torch.no_grad()
def generate(
    model: Any, tokenizer: Any, prompts: list[str], sampling: Sampling, generator: torch.Generator
) -> list[tuple[list[int], bool]]:
    """Sample a continuation of each prompt in one batch; returns (new token ids, ended by itself).

    Rows that ended leave the batch every few steps, so a long answer doesn't hold the short ones' cost.
    """
    if not prompts:
        return []
    ends = torch.tensor(sorted(end_tokens(model)), device=model.device)
    step_ids, mask = (x.to(model.device) for x in _left_padded(tokenizer, prompts, int(ends[0])))
    name, cache = cache_name(model), None
    alive = torch.arange(len(prompts), device=model.device)
    rows: list[list[int]] = [[] for _ in prompts]
    done = torch.zeros(len(prompts), dtype=torch.bool, device=model.device)
    for step in range(sampling.max_new):
        positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, -step_ids.shape[1] :]
        out = model(
            input_ids=step_ids,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
            **{name: cache},
        )
        cache = out[name]
        token = sample(out.logits[:, -1].float(), sampling, generator)
        done[alive] |= torch.isin(token, ends)
        for row, value in zip(alive.tolist(), token.tolist(), strict=True):
            if not done[row]:
                rows[row].append(value)
        if done.all():
            break
        step_ids, mask = token[:, None], torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        if step % _COMPACT_EVERY == 0 and done[alive].any():
            keep = (~done[alive]).nonzero().flatten()
            cache.batch_select_indices(keep)
            alive, step_ids, mask = alive[keep], step_ids[keep], mask[keep]
    return list(zip(rows, done.tolist(), strict=True))


def _left_padded(tokenizer: Any, prompts: list[str], end: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask `(B, S)` int64; `end` pads where the tokenizer has no pad token (the mask hides it)."""
    rows = tokenizer(prompts, add_special_tokens=False).input_ids
    pad, width = (
        end if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        max(map(len, rows)),
    )
    ids = [[pad] * (width - len(row)) + row for row in rows]
    return torch.tensor(ids), torch.tensor(
        [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    )


def sample(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> torch.Tensor:
    """Draw one token a row from `(B, V)` fp32 logits by temperature and nucleus; `(B,)` int64.

    It draws among the 256 likeliest tokens: their softmax alone is the nucleus's mass.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    top = torch.topk(logits / sampling.temperature, min(256, logits.shape[-1]), dim=-1)
    mass = top.values.softmax(-1)
    mass = mass.masked_fill(mass.cumsum(-1) - mass > sampling.top_p, 0.0)
    choice = torch.multinomial(mass.cpu(), 1, generator=generator).to(logits.device)
    return top.indices.gather(-1, choice)[:, 0]


def end_tokens(model: Any) -> set[int]:
    """The target's end-of-turn token ids, from its generation config."""
    ends = model.generation_config.eos_token_id
    if ends is None:
        raise UserError(
            f"{model.name_or_path}: no eos_token_id in generation_config.json or config.json"
        )
    return set(ends) if isinstance(ends, (list, tuple)) else {ends}

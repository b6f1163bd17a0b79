"""The target writes its own conversations: it completes a user turn, then answers it.

Batch `b` is a pure function of (target, seed, settings, threads, `b`): a run that was cut off goes
on where it stopped, with the number of threads that it began with. An evaluation's texts
are kept out by their 13-grams (as in arXiv 2005.14165, appendix C).
"""

import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eagle3fn.base.errors import UserError
from eagle3fn.base.files import json_sha256, write_jsonl
from eagle3fn.base.places import check_out_file
from eagle3fn.base.read import read_jsonl
from eagle3fn.base.temporary import clear
from eagle3fn.base.threads import Kept, keep_threads, read_kept
from eagle3fn.data.cache_check import check_batch
from eagle3fn.data.held import held
from eagle3fn.data.openings import opening, stub
from eagle3fn.data.rejects import rejecting, usable
from eagle3fn.data.row_files import FileRow, read_rows
from eagle3fn.data.samples import Tokens
from eagle3fn.data.target import cache_name, stop_ids
from eagle3fn.data.target_files import KEPT, loaded_digest
from eagle3fn.data.template import ChatTemplate

# A target is refused if after this many batches less than this share of its turns are usable.
_TRIED_BATCHES = 20
_USABLE_SHARE = 0.05

_SEEDS_APART = 1_000_003  # generators of different seeds and batches differ
_SHORTEST_USER = 12  # characters
_SHORTEST_ANSWER = 16  # tokens
_LIKELIEST = 256  # tokens that a draw chooses from
_COMPACT_EVERY = 8  # tokens
_THREADS = "threads.json"
_OWN_ID = re.compile(r"\d+-\d+")  # seed and number
_PLACEHOLDER = "\x02user turn\x02"  # found again in a rendered template


class Sampling(NamedTuple):
    """How tokens are drawn."""

    temperature: float  # of the softmax; 0 is greedy
    top_p: float  # nucleus mass
    max_new: int  # tokens


USER_TURN = Sampling(temperature=0.8, top_p=0.95, max_new=144)
ANSWER = Sampling(temperature=0.5, top_p=0.95, max_new=224)


class Continuation(NamedTuple):
    """What the target wrote after one prompt."""

    ids: list[int]  # new tokens, without the one that ended it
    ended: bool  # by a stop token, not by the limit


def synthesize(
    model: Any,
    template: ChatTemplate,
    out: str | Path,
    count: int,
    seed: int = 0,
    batch: int = 64,
    exclude: str | Path | None = None,
    answer: Sampling | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Write `count` or more conversations to `out` (JSONL, `.xz` and `.gz` compress).

    Finished batches are kept in `<out>.parts/` until all are there. A call with the same target,
    template, sampling, `seed` and `batch` takes them up again. Each user turn is kept once.

    Args:
        model: the target, on any device.
        template: the chat template of the target's tokenizer, with its arguments.
        out: the file of conversations.
        count: conversations to write, at least.
        seed: of openings and sampling.
        batch: conversations written together.
        exclude: a file or folder of rows whose texts must be kept out. Conversations that share
            13 words in a row with it are dropped.
        answer: how the answers are drawn; `ANSWER` if absent.
        on_progress: called with the conversations so far and `count`.

    Returns:
        The number of conversations written.

    Raises:
        UserError: the tokenizer has no chat template, rows of the target's cache cannot be dropped
            (not with `batch` 1), or less than 5% of the turns asked for are usable.
    """
    if batch > 1:
        check_batch(model)
    forbidden = grams_of_file(exclude) if exclude else set()
    with hold_parts(out):
        settings = (answer or ANSWER, seed, batch)
        parts = Parts(out, parts_digest(model, template, out, USER_TURN, *settings))
        batches = _batches(model, template, parts, *settings)
        rows = _chosen(batches, forbidden, count, batch, on_progress)
        parts.finish(rows)
    return len(rows)


def parts_digest(model: Any, template: ChatTemplate, out: str | Path, *settings: Any) -> str:
    """Digest of all that the batches of `out` are made from: target, template and settings."""
    target = loaded_digest(model, Parts(out, "").folder / KEPT)
    made_from = [target, template.tokenizer.chat_template, template.arguments, *settings]
    return json_sha256(made_from)[:12]


def _chosen(
    batches: Iterator[list[dict]],
    forbidden: "Grams",
    count: int,
    batch: int,
    on_progress: Callable[[int, int], None],
) -> list[dict]:
    """The first `count` conversations, or a few more, whose user turns differ."""
    rows: list[dict] = []
    users: set[str] = set()
    for tried, written in enumerate(batches, 1):
        for row in without(written, forbidden):
            user = row["conversations"][0]["content"]
            if user not in users:
                users.add(user)
                rows.append(row)
        on_progress(len(rows), count)
        if len(rows) >= count:
            break
        if tried >= _TRIED_BATCHES and len(rows) < _USABLE_SHARE * tried * batch:
            raise UserError(
                f"target wrote {len(rows)} usable turns of {tried * batch} asked for: "
                "they must end by themselves, differ and be free of the excluded texts; "
                "take an instruction-tuned target, or exclude less"
            )
    return rows


class Parts(NamedTuple):
    """The finished batches of a file that is being written, kept in `<out>.parts/`."""

    out: str | Path
    digest: str  # of all that the batches are made from; those of another one are not read

    @property
    def folder(self) -> Path:
        """Where they are kept."""
        return Path(f"{self.out}.parts")

    def batch(self, index: int, write: Callable[[], list[dict]]) -> list[dict]:
        """The rows of batch `index`: read if they were written before, else `write()`."""
        part = self.folder / f"{self.digest}-{index:05d}.jsonl"
        if not part.exists():
            keep_threads(self.folder / _THREADS)
            write_jsonl(part, write())
        return read_jsonl(part)

    def finish(self, rows: list[dict]) -> None:
        """Write `out`; then the parts, and what a kill left of one, are deleted."""
        write_jsonl(self.out, rows)
        for part in self.folder.glob(f"{self.digest}-*"):
            clear(part)
            part.unlink()


def check_out_conversations(out: str | Path) -> None:
    """Refuse a place for conversations: a file whose rows were not written here.

    Raises:
        UserError: as `base.places.check_out_file`; there are other rows, or none can be read.
    """
    check_out_file(out)
    if not os.path.lexists(out) or not os.path.getsize(out):
        return
    first = next(iter(read_rows(out)), None)
    row = first.value if first is not None and isinstance(first.value, dict) else {}
    is_own = isinstance(row.get("id"), str) and _OWN_ID.fullmatch(row["id"])
    is_answer = type(row.get("answers")) is int and type(row.get("cut")) is int
    if not (is_own or is_answer):
        raise UserError(
            f"{out}: holds rows that eagle3fn synthesize did not write; name a new file, or "
            "remove this one"
        )


def hold_parts(out: str | Path) -> AbstractContextManager[None]:
    """Hold the batches of `out`; afterwards their folder is removed, unless some are left in it.

    Raises:
        UserError: another process writes `out`.
    """
    return held(Parts(out, "").folder, [_THREADS], ours=True)


def begun_threads(out: str | Path) -> Kept | None:
    """The number of threads that a call that writes `out` began with, if it was cut off."""
    return read_kept(Parts(out, "").folder / _THREADS)


def batch_generator(seed: int, index: int) -> torch.Generator:
    """What the tokens of batch `index` are drawn by."""
    return torch.Generator().manual_seed(seed * _SEEDS_APART + index)


def _batches(
    model: Any, template: ChatTemplate, parts: Parts, answer: Sampling, seed: int, batch: int
) -> Iterator[list[dict]]:
    """Endless batches of conversations."""
    for index in itertools.count():
        write = partial(_write_batch, model, template, answer, seed, index, batch)
        yield parts.batch(index, write)


def _write_batch(
    model: Any, template: ChatTemplate, answer: Sampling, seed: int, index: int, batch: int
) -> list[dict]:
    """The usable conversations of batch `index`, at most `batch`."""
    generator = batch_generator(seed, index)

    # User turns: the target completes an opening after the template's beginning of such a turn.
    tokenizer = template.tokenizer
    tokens = Tokens(template)
    head, _ = user_frame(template)
    names = list(range(index * batch, (index + 1) * batch))
    openings = [opening(seed, name) for name in names]
    prompts = [head + text for text in openings]
    completed = generate(model, tokenizer, prompts, USER_TURN, generator)

    # A turn is usable if it ended by itself, or is code to be cut after its docstring.
    users: dict[int, str] = {}
    for name, start, rest in zip(names, openings, completed, strict=True):
        if not rest.ended and '"""' not in start:
            continue
        text = start + tokenizer.decode(rest.ids, skip_special_tokens=True)
        text = stub(text, seed, name).strip()
        if len(text) >= _SHORTEST_USER:
            users[name] = text

    # Answers, of any ending; short ones are dropped.
    prompts = [chat_prompt(template, text) for text in users.values()]
    answers = generate(model, tokenizer, prompts, answer, generator)
    rows = []
    for (name, user), written in zip(users.items(), answers, strict=True):
        if len(written.ids) >= _SHORTEST_ANSWER:
            text = tokens.text(written.ids)
            turns = [{"role": "user", "content": user}, {"role": "assistant", "content": text}]
            row = {"id": f"{seed}-{name}", "conversations": turns}
            if template.arguments:
                row["chat_template_kwargs"] = template.arguments
            rows.append(row)
    return rows


# The chat template


def user_frame(template: ChatTemplate) -> tuple[str, str]:
    """The text that the chat template has before and after the first user turn.

    Raises:
        UserError: no chat template.
    """
    turns = [{"role": "user", "content": template.content(_PLACEHOLDER)}]
    text = template.render(turns, "a user turn", **template.arguments)
    head, _, tail = text.partition(_PLACEHOLDER)
    return head, tail


def chat_prompt(template: ChatTemplate, user: str, where: str = "a user turn") -> str:
    """The chat template around one user turn, up to where the answer begins.

    Raises:
        UserError: no chat template, or it refuses the turn; `where` names it.
    """
    turns = [{"role": "user", "content": template.content(user)}]
    return template.render(turns, where, add_generation_prompt=True, **template.arguments)


# Sampling


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


# Keeping an evaluation's texts out

GRAM_SIZE = 13
Grams = set[tuple[str, ...]]
_WORD = re.compile(r"\w+|[^\w\s]")


def grams(text: str) -> Grams:
    """All runs of 13 words or punctuation marks, in lower case."""
    words = _WORD.findall(text.lower())
    starts = range(len(words) - GRAM_SIZE + 1)
    return {tuple(words[start : start + GRAM_SIZE]) for start in starts}


def grams_of_file(path: str | Path) -> Grams:
    """The 13-grams of every string, at any depth, in the rows of a file or folder.

    Raises:
        UserError: unreadable, a row that is broken or not an object, or there is no string in it.
    """
    found: Grams = set()
    count = 0
    with rejecting(path) as rejects:
        for row in usable(read_rows(path), _object, rejects):
            for text in _texts(row):
                found |= grams(text)
                count += 1
    if not count:
        raise UserError(f"{path}: no text in it to keep out; name a file whose rows hold texts")
    return found


def _object(row: FileRow) -> dict[str, Any]:
    if not isinstance(row.value, dict):
        raise UserError("not a JSON object; mend or delete the row")
    return row.value


def _texts(value: Any) -> Iterator[str]:
    """Every string in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _texts(item)


def without(rows: Iterable[dict[str, Any]], forbidden: Grams) -> list[dict[str, Any]]:
    """The conversations none of whose turns shares a 13-gram with `forbidden`."""
    kept = []
    for row in rows:
        shared = [turn for turn in row["conversations"] if grams(turn["content"]) & forbidden]
        if not shared:
            kept.append(row)
    return kept

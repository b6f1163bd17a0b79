"""The target answers given prompts: conversations whose answers are its own, to train on.

Every assistant turn is replaced by the target's answer to the turns before it, with its own earlier
answers among them. Batch `b` is a pure function of (target, settings, rows of batch `b`), so a run
that was cut off goes on where it stopped.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from eagle3fn.base.errors import UserError
from eagle3fn.base.files import json_sha256
from eagle3fn.data.chat import apply_template, check_template, messages_of
from eagle3fn.data.rejects import rejecting, usable
from eagle3fn.data.row_files import FileRow, read_rows
from eagle3fn.data.synthesize import (
    ANSWER,
    Parts,
    Sampling,
    batch_generator,
    generate,
    grams_of_file,
    without,
)
from eagle3fn.data.target import weights_digest

GIVEN_ANSWER = ANSWER._replace(max_new=512)
"""How an answer to a given prompt is drawn."""

Messages = list[dict[str, str]]


class Prompt(NamedTuple):
    """A row of the prompts' file. Assistant turns are places for answers, their texts are void."""

    id: str
    where: str  # file and line, for errors
    turns: Messages


class Answered(NamedTuple):
    """What `answer_prompts` wrote."""

    conversations: int
    answers: int
    cut: int  # answers that ended by the limit; they are kept
    excluded: int  # conversations left out


def answer_prompts(
    model: Any,
    tokenizer: Any,
    prompts: str | Path,
    out: str | Path,
    count: int | None = None,
    seed: int = 0,
    batch: int = 64,
    exclude: str | Path | None = None,
    sampling: Sampling = GIVEN_ANSWER,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Answered:
    """Answer every row of `prompts` and write conversations to `out`, in the same order.

    An answer that is cut by the limit is kept: the loss is against the target's probabilities at
    every place of it, and an engine cuts answers too. Its row has their number under `cut`.

    Args:
        model: the target, on any device.
        tokenizer: the target's.
        prompts: a file or folder (`data.row_files`) of rows with `prompt`, or with turns under
            `conversations` or `messages`. After a last turn that is no answer, one is added. An
            answer before any other turn has no prompt and stays as it is.
        out: the file of conversations; `.xz` and `.gz` compress.
        count: only the first rows; all, if None.
        seed: of sampling.
        batch: conversations answered together.
        exclude: a file or folder of rows whose texts must be kept out. Conversations that share
            13 words in a row with it are dropped.
        sampling: how answers are drawn. With temperature 0 they are the greedy ones.
        on_progress: called with the conversations answered so far and in all.

    Raises:
        UserError: before the target runs: no chat template, a malformed or empty row, a prompt that
            does not fit the target's positions together with its answers, a template that refuses
            the turns.
    """
    check_template(tokenizer)
    rows = prompt_rows(prompts)[:count]
    for row in rows:
        _check_fits(model, tokenizer, row, sampling.max_new)
    forbidden = grams_of_file(exclude) if exclude else set()
    parts = Parts(out, _digest(model, tokenizer, rows, sampling, seed, batch))

    answered = []
    for index, start in enumerate(range(0, len(rows), batch)):
        group = rows[start : start + batch]
        generator = batch_generator(seed, index)
        write = partial(_answer_batch, model, tokenizer, group, sampling, generator)
        answered += parts.batch(index, write)
        on_progress(len(answered), len(rows))

    kept = without(answered, forbidden)
    parts.finish(kept)
    return Answered(
        conversations=len(kept),
        answers=sum(len(_places(row["conversations"])) for row in kept),
        cut=sum(row.get("cut", 0) for row in kept),
        excluded=len(answered) - len(kept),
    )


def _digest(
    model: Any, tokenizer: Any, rows: list[Prompt], sampling: Sampling, seed: int, batch: int
) -> str:
    given = [(row.id, _without_answers(row.turns)) for row in rows]
    target = [weights_digest(model), tokenizer.chat_template]
    return json_sha256([*target, sampling, seed, batch, given])[:12]


# Reading


def prompt_rows(path: str | Path) -> list[Prompt]:
    """The rows of a file of prompts or conversations, each ending in a place for an answer.

    A row without an `id` has its number.

    Raises:
        UserError: unreadable, no rows, or bad rows: malformed, or with a turn without text that is
            no answer; the message counts them and names the first.
    """
    with rejecting(path) as rejects:
        rows = list(usable(read_rows(path), lambda row: _prompt_of(row, rejects.rows), rejects))
    if not rows:
        raise UserError(f"{path}: no rows; write one JSON object with a prompt a line")
    return rows


def _prompt_of(row: FileRow, number: int) -> Prompt:
    turns = _turns_of(row.value, row.where)
    for place, turn in enumerate(turns, 1):
        if turn["role"] != "assistant" and not turn["content"].strip():
            raise UserError(f"{row.where}: turn {place} is empty; mend or delete the row")
    if turns[-1]["role"] != "assistant":
        turns.append({"role": "assistant", "content": ""})
    if not _places(turns):
        raise UserError(
            f"{row.where}: nothing to answer; a row needs a user turn, or text under prompt"
        )
    return Prompt(str(row.value.get("id", number)), row.where, turns)


def _turns_of(row: Any, where: str) -> Messages:
    """A row's turns. Where it has both, its conversation counts: `prompt` is then its beginning."""
    has_turns = isinstance(row, dict) and (row.get("conversations") or row.get("messages"))
    if isinstance(row, dict) and "prompt" in row and not has_turns:
        return messages_of({"messages": [{"role": "user", "content": row["prompt"]}]}, where)
    return messages_of(row, where)


def _places(turns: Messages) -> list[int]:
    """Where the answers are: assistant turns that have turns before them."""
    return [place for place, turn in enumerate(turns) if place and turn["role"] == "assistant"]


def _without_answers(turns: Messages) -> Messages:
    places = set(_places(turns))
    return [
        {**turn, "content": ""} if place in places else turn for place, turn in enumerate(turns)
    ]


def _check_fits(model: Any, tokenizer: Any, row: Prompt, max_new: int) -> None:
    """Refuse a row whose turns and longest possible answers exceed the target's positions."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    text = _prompt_text(tokenizer, _without_answers(row.turns), row.where)
    length = len(tokenizer(text, add_special_tokens=False).input_ids)
    answers = len(_places(row.turns))
    if limit is not None and length + answers * max_new > limit:
        raise UserError(
            f"{row.where}: {length} tokens and {answers} answers of up to {max_new} exceed the "
            f"target's max_position_embeddings = {limit}; lower --max-new, or shorten or delete "
            "the row"
        )


def _prompt_text(tokenizer: Any, turns: Messages, where: str) -> str:
    """The chat template on these turns, up to where the last one, an answer, begins."""
    options = {"tokenize": False, "add_generation_prompt": True}
    return apply_template(tokenizer, turns[:-1], where, **options)


# Answering


def _answer_batch(
    model: Any, tokenizer: Any, rows: list[Prompt], sampling: Sampling, generator: Any
) -> list[dict]:
    """The rows' conversations, answered together, the first answer of all, then the second, …"""
    turns = [_without_answers(row.turns) for row in rows]
    places = [_places(each) for each in turns]
    cut = [0] * len(rows)

    for number in range(max(map(len, places))):
        # The rows that have so many answers, each up to the place of this one.
        asked = [row for row in range(len(rows)) if number < len(places[row])]
        prompts = []
        for row in asked:
            upto = turns[row][: places[row][number] + 1]
            prompts.append(_prompt_text(tokenizer, upto, rows[row].where))

        # The answers become the rows' turns: the next ones are given after them.
        written = generate(model, tokenizer, prompts, sampling, generator)
        for row, answer in zip(asked, written, strict=True):
            text = tokenizer.decode(answer.ids, skip_special_tokens=True)
            turns[row][places[row][number]] = {"role": "assistant", "content": text}
            cut[row] += not answer.ended

    return [
        {"id": row.id, "conversations": turns[number], "cut": cut[number]}
        for number, row in enumerate(rows)
    ]

"""The target answers given prompts: conversations whose answers are its own, to train on.

Every assistant turn is replaced by the target's answer to the turns before it, with its own earlier
answers among them. Batch `b` is a pure function of (target, settings, rows of batch `b`), so a run
that was cut off goes on where it stopped.
"""

from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from eagle3fn.base.errors import UserError
from eagle3fn.data.cache_check import check_batch
from eagle3fn.data.rejects import rejecting, usable
from eagle3fn.data.rendering import Rendering
from eagle3fn.data.row_files import FileRow, read_rows
from eagle3fn.data.row_values import name_of, text_of
from eagle3fn.data.samples import Tokens
from eagle3fn.data.synthesize import (
    ANSWER,
    Parts,
    Sampling,
    batch_generator,
    generate,
    grams_of_file,
    hold_parts,
    parts_digest,
    without,
)
from eagle3fn.data.template import ChatTemplate
from eagle3fn.data.turns import Conversation, Turn, conversation_of

GIVEN_ANSWER = ANSWER._replace(max_new=512)
"""How an answer to a given prompt is drawn."""


class Prompt(NamedTuple):
    """A row of the prompts' file. Its assistant turns are places for answers, without a text."""

    id: str
    where: str  # file and line, for errors
    conversation: Conversation

    @property
    def places(self) -> list[int]:
        """Where the answers are: assistant turns that have turns before them."""
        turns = self.conversation.turns
        return [place for place, turn in enumerate(turns) if place and turn["role"] == "assistant"]


class Answered(NamedTuple):
    """What `answer_prompts` wrote."""

    conversations: int
    answers: int
    cut: int  # answers that ended by the limit; they are kept
    excluded: int  # conversations left out


def answer_prompts(
    model: Any,
    template: ChatTemplate,
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
        template: the chat template of the target's tokenizer, with its arguments.
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
            the turns, a target whose cache cannot drop rows (not with `batch` 1).
    """
    template.check()
    rows = prompt_rows(prompts, count)
    tokens = Tokens(template)
    for row in rows:
        _check_fits(model, template, tokens, row, sampling.max_new)
    if batch > 1:
        check_batch(model)
    forbidden = grams_of_file(exclude) if exclude else set()
    with hold_parts(out):
        asked = [(row.id, row.conversation[:-1]) for row in rows]  # without the unused keys
        digest = parts_digest(model, template, out, sampling, seed, batch, asked)
        parts = Parts(out, digest)

        answered = []
        for index, start in enumerate(range(0, len(rows), batch)):
            group = rows[start : start + batch]
            generator = batch_generator(seed, index)
            write = partial(_answer_batch, model, template, tokens, group, sampling, generator)
            answered += parts.batch(index, write)
            on_progress(len(answered), len(rows))

        kept = without(answered, forbidden)
        parts.finish(kept)
    return Answered(
        conversations=len(kept),
        answers=sum(row["answers"] for row in kept),
        cut=sum(row.get("cut", 0) for row in kept),
        excluded=len(answered) - len(kept),
    )


# Reading


def prompt_rows(path: str | Path, limit: int | None = None) -> list[Prompt]:
    """The first rows of a file of prompts or conversations, each with a place for an answer.

    A row without an `id` has its number.

    Raises:
        UserError: unreadable, no rows, or bad rows: malformed, or with a turn without text that is
            no answer; the message counts them and names the first.
    """
    with rejecting(path) as rejects:
        rows = list(usable(islice(read_rows(path), limit), _prompt, rejects))
    if not rows:
        raise UserError(f"{path}: no rows; write one JSON object with a prompt a line")
    return rows


def _prompt(row: FileRow) -> Prompt:
    """A row, its answers emptied.

    Raises:
        UserError: malformed, an empty turn that is no answer, tool calls, or nothing to answer.
    """
    where = row.where
    conversation = conversation_of(row.value, where)
    turns = []
    for place, turn in enumerate(conversation.turns):
        if "tool_calls" in turn or turn["role"] == "tool":
            raise UserError(
                f"{where}: turn {place + 1}: a call of a tool cannot be made anew; delete the row"
            )
        if place and turn["role"] == "assistant":
            turns.append({"role": "assistant", "content": ""})
        elif not text_of(turn["content"]).strip():
            raise UserError(f"{where}: turn {place + 1} is empty; mend or delete the row")
        else:
            turns.append(turn)

    if turns and turns[-1]["role"] != "assistant":
        turns.append({"role": "assistant", "content": ""})
    name = name_of(row.value) or row.number
    prompt = Prompt(name, where, conversation._replace(turns=turns))
    if not prompt.places:
        raise UserError(
            f"{where}: nothing to answer; a row needs a user turn, or text under prompt"
        )
    return prompt


def _check_fits(
    model: Any, template: ChatTemplate, tokens: Tokens, row: Prompt, max_new: int
) -> None:
    """Refuse a row whose turns and longest possible answers exceed the target's positions."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    template.check_arguments(row.conversation.arguments, row.where)
    last = row.places[-1]
    text = Rendering(template, row.conversation, row.where).prompt(last)
    length = len(tokens.prompt(text))
    answers = len(row.places)
    if limit is not None and length + answers * max_new > limit:
        raise UserError(
            f"{row.where}: {length} tokens and {answers} answers of up to {max_new} exceed the "
            f"target's max_position_embeddings = {limit}; lower --max-new, or shorten or delete "
            "the row"
        )


# Answering


def _answer_batch(
    model: Any,
    template: ChatTemplate,
    tokens: Tokens,
    rows: list[Prompt],
    sampling: Sampling,
    generator: Any,
) -> list[dict]:
    """The rows' conversations, answered together, the first answer of all, then the second, …"""
    turns: list[list[Turn]] = [list(row.conversation.turns) for row in rows]
    cut = [0] * len(rows)

    for number in range(max(len(row.places) for row in rows)):
        # The rows that have so many answers, each up to the place of this one.
        asked = [index for index, row in enumerate(rows) if number < len(row.places)]
        prompts = []
        for index in asked:
            row = rows[index]
            conversation = row.conversation._replace(turns=turns[index])
            rendering = Rendering(template, conversation, row.where)
            prompts.append(rendering.prompt(row.places[number]))

        # The answers become the rows' turns: the next ones are given after them.
        written = generate(model, template.tokenizer, prompts, sampling, generator)
        for index, answer in zip(asked, written, strict=True):
            text = tokens.text(answer.ids)
            turns[index][rows[index].places[number]] = {"role": "assistant", "content": text}
            cut[index] += not answer.ended

    return [_written(template, row, turns[index], cut[index]) for index, row in enumerate(rows)]


def _written(template: ChatTemplate, row: Prompt, turns: list[Turn], cut: int) -> dict[str, Any]:
    """A row of the file of conversations: with all that its prompt was rendered from."""
    given = {
        "tools": row.conversation.tools,
        "chat_template_kwargs": {**template.arguments, **row.conversation.arguments},
    }
    return {
        "id": row.id,
        "conversations": turns,
        "answers": len(row.places),
        "cut": cut,
        **{name: value for name, value in given.items() if value},
    }

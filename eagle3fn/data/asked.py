"""Conversations whose answers are to be given anew: which they are, and the row that is written.

Anew are exactly the answers that the row trains on (`Conversation.supervised`): what is trained is
then the target's own. Calls of tools are kept, because the results after them belong to them, and
so are answers of weight 0; both are context, of weight 0 in the written row.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from eagle3fn.base.errors import UserError
from eagle3fn.data.rejects import MEND_OR_SKIP, rejecting, usable
from eagle3fn.data.rendering import Rendering
from eagle3fn.data.row_files import FileRow, read_rows
from eagle3fn.data.row_values import name_of, text_of
from eagle3fn.data.template import ChatTemplate
from eagle3fn.data.tokens import Tokens
from eagle3fn.data.turns import Conversation, Turn, conversation_of


class Asked(NamedTuple):
    """A row of the file. Its answers to be given are turns with an empty text."""

    id: str
    where: str  # file and line, for errors
    conversation: Conversation
    places: tuple[int, ...]  # of the answers to be given, among the turns
    kept: int  # answers and calls of tools that stay as they are


class Given(NamedTuple):
    """An answer."""

    turn: Turn
    cut: bool  # by the limit of tokens

    @property
    def is_call(self) -> bool:
        """Whether it is a call of a tool: nobody has its result, so nothing can follow."""
        return "tool_calls" in self.turn

    @property
    def is_empty(self) -> bool:
        """Whether it says nothing at all."""
        return not (self.is_call or self.turn["content"].strip() or self.turn.get("reasoning"))


def read_asked(
    path: str | Path,
    template: ChatTemplate,
    max_new: int,
    positions: int | None,
    limit: int | None = None,
    skip_bad: float | None = None,
    rejects_path: str | Path | None = None,
) -> tuple[list[Asked], str]:
    """The first rows of a file of prompts or conversations, and a line on those left out.

    A row without an `id` has its number.

    Args:
        path: a file or folder, as `data.row_files` reads it.
        template: the target's, which must render every row.
        max_new: tokens of an answer, at most.
        positions: of the target; a row must fit them with its answers. None: not known.
        limit: only so many rows; all, if None.
        skip_bad: the share of the rows that may be bad and are left out; None: none.
        rejects_path: where these are written, with `skip_bad`.

    Raises:
        UserError: unreadable, no rows, or bad rows: malformed, with an empty turn, with nothing to
            answer, refused by the template, or too long. The message counts them and names the
            first few.
    """
    template.check()
    check_length = _length_check(template, max_new, positions)

    def make(row: FileRow) -> Asked:
        asked = _asked(row)
        check_length(asked)
        return asked

    given = rejects_path if skip_bad is not None else None
    with rejecting(path, skip_bad, given, MEND_OR_SKIP) as rejects:
        rows = list(usable(islice(read_rows(path), limit), make, rejects))
    if not rows:
        raise UserError(f"{path}: no rows; write one JSON object with a prompt a line")
    return rows, rejects.describe()


def _asked(row: FileRow) -> Asked:
    """A row, its answers emptied.

    Raises:
        UserError: malformed, an empty turn that is no answer, or nothing to answer.
    """
    where = row.where
    conversation = conversation_of(row.value, where)
    turns: list[Turn] = []
    places = []
    kept = 0
    for place, turn in enumerate(conversation.turns):
        is_answer = place > 0 and turn["role"] == "assistant"
        if is_answer and place in conversation.supervised and "tool_calls" not in turn:
            places.append(place)
            turns.append(_EMPTY)
            continue
        if is_answer:
            kept += 1
            turns.append({**turn, "weight": 0})
            continue
        if turn["role"] != "tool" and not text_of(turn["content"]).strip():
            raise UserError(f"{where}: turn {place + 1} is empty; mend or delete the row")
        turns.append(turn)

    is_trained = row.value.get("weight") != 0 and row.value.get("train") is not False
    if turns and turns[-1]["role"] != "assistant" and is_trained:
        places.append(len(turns))
        turns.append(_EMPTY)
    if not (places or kept):
        raise UserError(
            f"{where}: nothing to answer; a row needs a user turn, or text under prompt"
        )
    name = name_of(row.value) or row.number
    return Asked(name, where, conversation._replace(turns=turns), tuple(places), kept)


_EMPTY: Turn = {"role": "assistant", "content": ""}


def _length_check(
    template: ChatTemplate, max_new: int, positions: int | None
) -> Callable[[Asked], None]:
    """A check that a row's turns can be rendered, and fit with their longest possible answers."""
    tokens = Tokens(template)

    def check(row: Asked) -> None:
        template.check_arguments(row.conversation.arguments, row.where)
        if not row.places:
            return
        text = Rendering(template, row.conversation, row.where).prompt(row.places[-1])
        length = len(tokens.prompt(text))
        answers = len(row.places)
        if positions is not None and length + answers * max_new > positions:
            raise UserError(
                f"{row.where}: {length} tokens and {answers} answers of up to {max_new} exceed the "
                f"target's max_position_embeddings = {positions}; lower --max-new, or shorten or "
                "delete the row"
            )

    return check


# With answers


def is_finished(asked: Asked, given: Sequence[Given]) -> bool:
    """Whether nothing more is to be answered."""
    return len(given) == len(asked.places) or (bool(given) and given[-1].is_call)


def turns_before(asked: Asked, given: Sequence[Given]) -> list[Turn]:
    """The turns before the next answer, with those given so far in their places."""
    return _filled(asked, given)[: asked.places[len(given)]]


def written_row(
    asked: Asked, given: Sequence[Given], arguments: Mapping[str, Any]
) -> dict[str, Any]:
    """A row of the file that is written: with all that its prompts were rendered from.

    It ends with a call of a tool, if the target made one.
    """
    turns = _filled(asked, given)
    if given and given[-1].is_call:
        turns = turns[: asked.places[len(given) - 1] + 1]
    optional = {
        "tools": asked.conversation.tools,
        "chat_template_kwargs": {**arguments, **asked.conversation.arguments},
    }
    return {
        "id": asked.id,
        "conversations": turns,
        "answers": len(given),
        "cut": sum(each.cut for each in given),
        **{name: value for name, value in optional.items() if value},
    }


def _filled(asked: Asked, given: Sequence[Given]) -> list[Turn]:
    turns = list(asked.conversation.turns)
    for place, answer in zip(asked.places, given, strict=False):
        turns[place] = answer.turn
    return turns

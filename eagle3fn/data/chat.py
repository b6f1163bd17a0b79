"""Conversations to tokens, with a mask over the assistant's text."""

import re
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from eagle3fn.base.errors import UserError

_ROLES = ("system", "user", "assistant", "tool")
_SHAREGPT = {"human": "user", "gpt": "assistant"}  # its role names
_GENERATION = re.compile(r"\{%-?\s*generation")
_ANSWERS = ("\x02first answer\x02", "\x02second answer\x02")  # placeholders, found again in a text
_SHOWN = 48  # characters
_SHOWN_RUNS = 6


def messages_of(row: Any, where: str) -> list[dict[str, str]]:
    """A row's turns as `[{"role", "content"}, …]`; ShareGPT's `from` and `value` are read too.

    `where` names the row in errors, as in `chats.jsonl:7`.

    Raises:
        UserError: no list of turns, an unknown role, or content that is missing, no string or not
            Unicode.
    """
    turns = None
    if isinstance(row, dict):
        turns = row.get("conversations") or row.get("messages")
    if not isinstance(turns, list) or not turns:
        raise UserError(
            f"{where}: no list of turns; "
            'a row must read {"conversations": [{"role", "content"}, …]}'
        )
    return [_message(turn, f"{where}: turn {number}") for number, turn in enumerate(turns, 1)]


def _message(turn: Any, where: str) -> dict[str, str]:
    if not isinstance(turn, dict):
        raise UserError(
            f'{where}: {_short(turn)}: must be {{"role": …, "content": …}}; mend or delete the row'
        )

    name = turn.get("role", turn.get("from"))
    role = _SHAREGPT.get(name, name) if isinstance(name, str) else name
    if role not in _ROLES:
        raise UserError(
            f"{where}: role {_short(name)}: must be one of {', '.join((*_ROLES, *_SHAREGPT))}; "
            "mend or delete the row"
        )

    content = turn.get("content", turn.get("value"))
    if not isinstance(content, str):
        raise UserError(
            f"{where}: content {_short(content)}: must be a string; mend or delete the row"
        )
    try:
        content.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(
            f"{where}: content {_short(content)}: holds half of a surrogate pair, "
            "which UTF-8 has no bytes for; mend or delete the row"
        ) from None
    return {"role": role, "content": content}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"


def encode(tokenizer: Any, messages: list[dict[str, str]], where: str) -> tuple[Tensor, Tensor]:
    """Tokens of a conversation and the mask of its assistant turns, each `(S,)` int64.

    The mask is 1 on an answer and on its end-of-turn token, and 0 on what the template writes
    after that. If the template has `{% generation %}` marks of its own, they decide. An answer
    before any other turn is not supervised.

    Raises:
        UserError: no chat template, a template that refuses the turns or does not render them one
            after the other, a tokenizer without offsets.
    """
    check_template(tokenizer)

    # The template's own marks: transformers makes the mask.
    if _GENERATION.search(tokenizer.get_chat_template()):
        coded = apply_template(
            tokenizer,
            messages,
            where,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        return _tensor(coded["input_ids"]), _tensor(coded["assistant_masks"])

    # Else find the answers in the rendered text, and the tokens that begin inside them.
    text = apply_template(tokenizer, messages, where, tokenize=False)
    spans = assistant_spans(tokenizer, messages, text, where)
    if not tokenizer.is_fast:
        raise UserError(
            f"{tokenizer.name_or_path}: the tokenizer gives no offsets; "
            "take one with a tokenizer.json"
        )
    coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    mask = [_inside(start, spans) for start, _ in coded["offset_mapping"]]
    return _tensor(coded["input_ids"]), _tensor(mask)


def check_template(tokenizer: Any) -> None:
    """Refuse a tokenizer that has no chat template, or named ones without a default.

    Raises:
        UserError: it has none, or no default.
    """
    if not tokenizer.chat_template:
        raise UserError(
            f"{tokenizer.name_or_path}: no chat template; take an instruction-tuned target"
        )
    named = tokenizer.chat_template
    if isinstance(named, dict) and "default" not in named:
        raise UserError(
            f"{tokenizer.name_or_path}: chat templates named {', '.join(sorted(named))}, and none "
            "named default: copy the one to use to chat_template.jinja in the target's folder"
        )


def _inside(place: int, spans: list[tuple[int, int]]) -> bool:
    return any(begin <= place < end for begin, end in spans)


def _tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int64).flatten()


def apply_template(
    tokenizer: Any, messages: list[dict[str, str]], where: str, **options: Any
) -> Any:
    """The chat template on `messages`.

    Raises:
        UserError: the template refuses them; `where` names the row.
    """
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, **options)
    except TemplateError as error:
        raise UserError(
            f"{where}: the chat template refuses these turns ({error}); mend or delete the row"
        ) from None


def assistant_spans(
    tokenizer: Any, messages: list[dict[str, str]], text: str, where: str
) -> list[tuple[int, int]]:
    """Where each answer begins and ends in the rendered `text`, in characters.

    An answer begins where the turns before it end, rendered with the generation prompt. It ends
    after its end-of-turn token.

    Raises:
        UserError: the template does not render the turns one after the other.
    """
    marks = end_marks(tokenizer)
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant" or index == 0:
            continue

        # Begin: `text` must start as the turns before this one do.
        prompt = apply_template(
            tokenizer, messages[:index], where, tokenize=False, add_generation_prompt=True
        )
        if not text.startswith(prompt):
            raise _not_in_order(tokenizer, where, index)
        begin = len(prompt)

        # End: the last mark of the turns up to this one. Some templates write the last answer of a
        # conversation differently from earlier ones; `text` then has another turn here, and the
        # first mark after the beginning is taken.
        upto = apply_template(tokenizer, messages[: index + 1], where, tokenize=False)
        if text.startswith(upto):
            end = _last_end(text, begin, len(upto), marks)
        else:
            end = _first_end(text, begin, marks)
        if end <= begin:
            raise _not_in_order(tokenizer, where, index)
        spans.append((begin, end))
    return spans


def _not_in_order(tokenizer: Any, where: str, index: int) -> UserError:
    return UserError(
        f"{where}: turn {index + 1}: the chat template of {tokenizer.name_or_path} does not render "
        "turns one after the other; "
        "put {% generation %} marks around the assistant's text in the template"
    )


def _last_end(text: str, begin: int, end: int, marks: list[str]) -> int:
    """Where the last mark in `text[begin:end]` ends; `end` if there is none."""
    ends = []
    for mark in marks:
        place = text.rfind(mark, begin, end)
        if place >= 0:
            ends.append(place + len(mark))
    return max(ends, default=end)


def _first_end(text: str, begin: int, marks: list[str]) -> int:
    """Where the first mark of `text[begin:]` ends; 0 if there is none."""
    ends = []
    for mark in marks:
        place = text.find(mark, begin)
        if place >= 0:
            ends.append(place + len(mark))
    return min(ends, default=0)


def end_marks(tokenizer: Any) -> list[str]:
    """The special tokens that the chat template writes first after an answer.

    Taken from two answers, one in the middle and one at the end of a conversation.
    """
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": _ANSWERS[0]},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": _ANSWERS[1]},
    ]
    text = apply_template(tokenizer, turns, "chat template", tokenize=False)
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]

    marks = set()
    for answer in _ANSWERS:
        after = text.partition(answer)[2]
        # The first; of several that begin at one place, the longest.
        found = [(after.find(token), -len(token), token) for token in special if token in after]
        if found:
            _, _, mark = min(found)
            marks.add(mark)
    return sorted(marks)


def describe_mask(tokenizer: Any, ids: Tensor, mask: Tensor) -> str:
    """The first runs of equal mask as a short text, the supervised ones in ⟦ ⟧.

    `ids` and `mask` are `(S,)` int64. Long runs are cut in their middle.
    """
    changes = (mask[1:] != mask[:-1]).nonzero().flatten() + 1
    bounds = [0, *changes.tolist(), len(ids)]
    runs = list(pairwise(bounds))[:_SHOWN_RUNS]

    parts = []
    for begin, end in runs:
        text = tokenizer.decode(ids[begin:end].tolist())
        if len(text) > 2 * _SHOWN:
            text = f"{text[:_SHOWN]} … {text[-_SHOWN:]}"
        parts.append(f"⟦{text}⟧" if mask[begin] else text)
    return "".join(parts)

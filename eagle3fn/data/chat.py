"""Conversations to tokens, with a mask over what the assistant said."""

import re
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from eagle3fn.base.errors import UserError

_ROLES = {"human": "user", "gpt": "assistant"}
_KNOWN = ("system", "user", "assistant", "tool")
_GENERATION = re.compile(r"\{%-?\s*generation")
_MARKS = ("\x02first answer\x02", "\x02second answer\x02")
_SHOWN = 48


def messages_of(row: Any, where: str) -> list[dict[str, str]]:
    """A row's turns as `[{"role", "content"}, …]`; ShareGPT's `from` and `value` are read too.

    `where` names the row in errors, as in `chats.jsonl:7`.

    Raises:
        UserError: no list of turns, an unknown role, or content that is missing, no string or not Unicode.
    """
    turns = (row.get("conversations") or row.get("messages")) if isinstance(row, dict) else None
    if not isinstance(turns, list) or not turns:
        raise UserError(
            f'{where}: no list of turns; a row must read {{"conversations": [{{"role", "content"}}, …]}}'
        )
    return [_message(turn, f"{where}: turn {number}") for number, turn in enumerate(turns, 1)]


def _message(turn: Any, where: str) -> dict[str, str]:
    if not isinstance(turn, dict):
        raise UserError(
            f'{where}: {_short(turn)}: must be {{"role": …, "content": …}}; mend or delete the row'
        )
    name = turn.get("role", turn.get("from"))
    role = _ROLES.get(name, name) if isinstance(name, str) else name
    if role not in _KNOWN:
        raise UserError(
            f"{where}: role {_short(name)}: must be one of {', '.join((*_KNOWN, *_ROLES))}; mend or delete the row"
        )
    content = turn.get("content", turn.get("value"))
    if not isinstance(content, str):
        raise UserError(
            f"{where}: content {_short(content)}: must be a string; mend or delete the row"
        )
    try:
        content.encode("utf-8")
    except UnicodeEncodeError:
        what = "holds half of a surrogate pair, which UTF-8 has no bytes for"
        raise UserError(
            f"{where}: content {_short(content)}: {what}; mend or delete the row"
        ) from None
    return {"role": role, "content": content}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"


def encode(tokenizer: Any, messages: list[dict[str, str]], where: str) -> tuple[Tensor, Tensor]:
    """Tokens of a conversation and the mask of its assistant turns, each `(S,)` int64.

    A turn's end-of-turn token is supervised, what the template writes behind it is not. The template's own
    `{% generation %}` marks are used if it has them. An answer before any other turn is not supervised.

    Raises:
        UserError: no chat template, a template that refuses the turns or does not render them one behind the other.
    """
    if not tokenizer.chat_template:
        raise UserError(
            f"{tokenizer.name_or_path}: no chat template; take an instruction-tuned target"
        )
    if _GENERATION.search(tokenizer.get_chat_template()):
        coded = _apply(
            tokenizer,
            messages,
            where,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        return _tensor(coded["input_ids"]), _tensor(coded["assistant_masks"])
    text = _apply(tokenizer, messages, where, tokenize=False)
    spans = assistant_spans(tokenizer, messages, text, where)
    if not tokenizer.is_fast:
        raise UserError(
            f"{tokenizer.name_or_path}: the tokenizer gives no offsets; take one with a tokenizer.json"
        )
    coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    starts = [start for start, _ in coded["offset_mapping"]]
    mask = [int(any(begin <= start < end for begin, end in spans)) for start in starts]
    return _tensor(coded["input_ids"]), _tensor(mask)


def _tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int64).flatten()


def _apply(tokenizer: Any, messages: list[dict[str, str]], where: str, **options: Any) -> Any:
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
    """Where in the rendered `text` each assistant turn begins and ends, in characters."""
    marks = end_marks(tokenizer)
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant" or index == 0:
            continue
        prompt = _apply(
            tokenizer, messages[:index], where, tokenize=False, add_generation_prompt=True
        )
        if not text.startswith(prompt):
            raise _not_in_order(tokenizer, where, index)
        upto = _apply(tokenizer, messages[: index + 1], where, tokenize=False)
        begin = len(prompt)
        end = (
            _last_end(text, begin, len(upto), marks)
            if text.startswith(upto)
            else _first_end(text, begin, marks)
        )
        if end <= begin:
            raise _not_in_order(tokenizer, where, index)
        spans.append((begin, end))
    return spans


def _not_in_order(tokenizer: Any, where: str, index: int) -> UserError:
    return UserError(
        f"{where}: turn {index + 1}: the chat template of {tokenizer.name_or_path} does not render turns one behind "
        "the other; put {% generation %} marks around the assistant's text in the template"
    )


def _last_end(text: str, begin: int, end: int, marks: list[str]) -> int:
    found = [at + len(mark) for mark in marks if (at := text.rfind(mark, begin, end)) >= 0]
    return max(found, default=end)


def _first_end(text: str, begin: int, marks: list[str]) -> int:
    found = [at + len(mark) for mark in marks if (at := text.find(mark, begin)) >= 0]
    return min(found, default=0)


def end_marks(tokenizer: Any) -> list[str]:
    """The special tokens that the chat template writes first behind an answer, in the middle and at the end."""
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    first, second = _MARKS
    turns = [("user", "a"), ("assistant", first), ("user", "b"), ("assistant", second)]
    messages = [{"role": role, "content": content} for role, content in turns]
    text = _apply(tokenizer, messages, "chat template", tokenize=False)
    marks = []
    for answer in _MARKS:
        tail = text.partition(answer)[2]
        found = [(tail.find(token), -len(token), token) for token in special if token in tail]
        marks += [min(found)[2]] if found else []
    return sorted(set(marks))


def describe_mask(tokenizer: Any, ids: Tensor, mask: Tensor) -> str:
    """A short text of the tokens with the supervised runs in ⟦ ⟧; long runs are cut in their middle."""
    bounds = [0, *((mask[1:] != mask[:-1]).nonzero().flatten() + 1).tolist(), len(ids)]
    parts = []
    for begin, end in list(pairwise(bounds))[:6]:
        run = tokenizer.decode(ids[begin:end].tolist())
        run = run if len(run) <= 2 * _SHOWN else f"{run[:_SHOWN]} … {run[-_SHOWN:]}"
        parts.append(f"⟦{run}⟧" if mask[begin] else run)
    return "".join(parts)

"""A row of a conversations' file to turns that a chat template takes.

Read are OpenAI's `messages`, ShareGPT's `conversations`, `prompt` with `completion`, and plain
`text`. What a row says and cannot be given to a template is refused by name; keys that change
nothing here are listed in `Conversation.unused`, so that they can be listed.
"""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from eagle3fn.base.errors import UserError
from eagle3fn.data.row_values import json_value, shown, unicode_text
from eagle3fn.data.tools import calls_of, tools_of

Turn = dict[str, Any]
"""`role`, `content`, and where the row has them `reasoning`, `tool_calls`, `tool_call_id`, `name`.

`content` is a string, or a list of strings where the row has several parts.
"""

_ROLES = ("system", "developer", "user", "assistant", "tool")
_OTHER_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "observation": "tool",
    "function_call": "assistant",  # its text is the call
}

# Keys of a turn and of a row that are read here.
_REASONING = ("reasoning_content", "thinking", "reasoning")
_TURN_KEYS = {
    "role",
    "from",
    "content",
    "value",
    "tool_calls",
    "tool_call_id",
    "name",
    "weight",
    "train",
    *_REASONING,
}
# Arguments that rendering gives a template itself.
RESERVED = ("messages", "tools", "add_generation_prompt", "strftime_now", "documents")
_ROW_ARGUMENTS = ("enable_thinking", "reasoning_effort")  # of the template, next to the turns
_ROW_KEYS = {
    "id",
    "conversations",
    "messages",
    "system",
    "tools",
    "chat_template_kwargs",
    "weight",
    "train",
    "answers",  # counts that `regenerate` writes
    "cut",
    *_ROW_ARGUMENTS,
}

# Keys that change what an engine sees or what is trained, and what to write in their place.
_REFUSED_IN_TURNS = {
    "function_call": "write tool_calls",
    "images": "only text is trained; delete the row",
    "image": "only text is trained; delete the row",
    "videos": "only text is trained; delete the row",
    "audio": "only text is trained; delete the row",
    "audios": "only text is trained; delete the row",
    "loss": "write weight, 0 or 1",
    "mask": "write weight, 0 or 1",
    "masked": "write weight, 0 or 1",
    "loss_mask": "write weight, 0 or 1",
    "training": "write train, true or false",
    "train_detail": "write weight, 0 or 1, on whole turns",
    "prefix": "write the whole answer as content",
    "refusal": "write it as content, or delete the turn",
}
_REFUSED_IN_ROWS = {
    **_REFUSED_IN_TURNS,
    "functions": "write tools",
    "documents": "write their texts into a turn",
    "chat_template": "put it into the target's folder",
    "add_generation_prompt": "delete it: every answer has its own prompt",
    "continue_final_message": "write the whole answer as content",
    "system_prompt": "write system",
    "chosen": "write the answer to train on as a turn",
    "rejected": "delete it; the answer to train on is a turn",
}
_TEXT_PARTS = ("text", "input_text", "output_text")
_REASONING_PARTS = ("thinking", "reasoning")


class Conversation(NamedTuple):
    """A row, checked."""

    turns: list[Turn]
    supervised: tuple[int, ...]  # numbers of the assistant turns to train on, counted from 0
    tools: list[dict[str, Any]]  # as a chat template takes them
    arguments: dict[str, Any]  # the row's own arguments of the template
    text: str | None = None  # of a row without turns
    unused: frozenset[str] = frozenset()  # keys of the row and of its turns that were not read


def conversation_of(row: Any, where: str) -> Conversation:
    """Read a row.

    Supervised are the assistant's turns, but those of weight 0 or `train: false`.

    Args:
        row: the parsed value.
        where: names the row in errors, as in `chats.jsonl:7`.

    Raises:
        UserError: no turns; an unknown role; content that is missing, no text or not Unicode; a
            key that changes what is trained and is not supported.
    """
    if not isinstance(row, dict):
        raise UserError(f"{where}: {shown(row)}: must be a JSON object; mend or delete the row")
    _refuse(row, _REFUSED_IN_ROWS, where)

    # The turns, or a plain text.
    found, form_keys = _turns_of(row, where)
    unused = {key for key in row if key not in _ROW_KEYS and key not in form_keys}
    if isinstance(found, str):
        lost = [key for key in ("system", "tools", *_ROW_ARGUMENTS) if row.get(key)]
        if lost:
            raise UserError(
                f"{where}: {lost[0]} beside text: a plain text has no turns; write messages"
            )
        text = unicode_text(found, "text", where)
        return Conversation([], (), [], {}, text, frozenset(unused))

    turns: list[Turn] = []
    weights = []
    for number, value in enumerate(found, 1):
        turn, weight, rest = _turn(value, f"{where}: turn {number}")
        turns.append(turn)
        weights.append(weight)
        unused |= {f"turn.{key}" for key in rest}

    # A system text next to the turns is the first of them.
    system = row.get("system")
    if system:
        text = unicode_text(system, "system", where)
        if turns[0]["role"] != "system":
            turns.insert(0, {"role": "system", "content": text})
            weights.insert(0, True)
        elif turns[0]["content"] != text:
            raise UserError(f"{where}: system beside a system turn of another text; delete one")

    trained = _weight(row, where)
    supervised = [
        number
        for number, turn in enumerate(turns)
        if turn["role"] == "assistant" and weights[number] and trained
    ]
    return Conversation(
        turns=turns,
        supervised=tuple(supervised),
        tools=tools_of(row.get("tools"), where),
        arguments=_arguments(row, where),
        unused=frozenset(unused),
    )


def _refuse(tree: dict[str, Any], keys: dict[str, str], where: str) -> None:
    """Refuse a key with a value that is neither null nor empty."""
    for key, value in tree.items():
        if key in keys and value not in (None, [], ""):
            raise UserError(f"{where}: {key} is not supported; {keys[key]}")


def _turns_of(row: dict[str, Any], where: str) -> tuple[list[Any] | str, tuple[str, ...]]:
    """The row's turns or its plain text, and the keys that they were read from."""
    named = [key for key in ("conversations", "messages") if row.get(key)]
    if len(named) == 2 and row["conversations"] != row["messages"]:
        raise UserError(f"{where}: conversations and messages differ; delete one of them")
    if named:
        turns = row[named[0]]
        if not isinstance(turns, list):
            raise UserError(
                f"{where}: {named[0]} {shown(turns)}: must be a list of turns; "
                "mend or delete the row"
            )
        return turns, ()

    if "prompt" in row:
        prompt = _as_turns(row["prompt"], "user", f"{where}: prompt")
        answer = row.get("completion")
        turns = [] if answer is None else _as_turns(answer, "assistant", f"{where}: completion")
        return prompt + turns, ("prompt", "completion")

    if isinstance(row.get("text"), str) and row["text"]:
        return row["text"], ("text",)
    empty = [key for key in ("conversations", "messages", "text") if key in row]
    found = f"{empty[0]} is empty" if empty else f"its keys are {shown(list(row))}"
    raise UserError(
        f"{where}: no list of turns ({found}); a row must read "
        '{"messages": [{"role", "content"}, …]}, {"conversations": [{"from", "value"}, …]}, '
        '{"prompt", "completion"}, {"prompt"} (to be answered by eagle3fn regenerate) or {"text"}'
    )


def _as_turns(value: Any, role: str, where: str) -> list[Any]:
    """A text as one turn of `role`, or a list of turns as it is."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if isinstance(value, list) and value:
        return value
    raise UserError(f"{where} {shown(value)}: must be a text or a list of turns; mend the row")


# A turn


def _turn(value: Any, where: str) -> tuple[Turn, bool, set[str]]:
    """A turn, whether its weight is 1, and the keys that were not read."""
    if not isinstance(value, dict):
        raise UserError(
            f'{where}: {shown(value)}: must be {{"role": …, "content": …}}; mend or delete the row'
        )
    _refuse(value, _REFUSED_IN_TURNS, where)

    name = value.get("role", value.get("from"))
    role = _OTHER_ROLES.get(name, name) if isinstance(name, str) else name
    if role not in _ROLES:
        known = ", ".join((*_ROLES, *_OTHER_ROLES))
        raise UserError(
            f"{where}: role {shown(name)}: must be one of {known}; mend or delete the row"
        )

    calls = calls_of(value.get("tool_calls"), where)
    content = value.get("content", value.get("value"))
    if value.get("value", content) != content:
        raise UserError(f"{where}: content and value differ; delete one of them")
    if name == "function_call":
        calls = calls_of(json_value(content, where), where)
        content = ""
    if content is None and calls:
        content = ""

    texts, thoughts = _content(content, where)
    turn: Turn = {"role": role, "content": texts[0] if len(texts) == 1 else texts}
    reasoning = _reasoning(value, thoughts, where)
    if reasoning:
        turn["reasoning"] = reasoning
    if calls:
        turn["tool_calls"] = calls
    lost = [key for key in ("reasoning", "tool_calls") if key in turn and role != "assistant"]
    if lost:
        raise UserError(f"{where}: {lost[0]} of role {role}: only the assistant's turns have them")
    turn |= {key: value[key] for key in ("tool_call_id", "name") if value.get(key)}

    rest = {key for key in value if key not in _TURN_KEYS}
    return turn, _weight(value, where), rest


def _reasoning(value: dict[str, Any], thoughts: list[str], where: str) -> str | None:
    """The thought of a turn, from its keys and from the parts of its content."""
    named = [unicode_text(value[key], key, where) for key in _REASONING if value.get(key)]
    found = dict.fromkeys([*named, *thoughts])
    if len(found) > 1:
        raise UserError(f"{where}: two different thoughts; write one reasoning_content")
    return next(iter(found), None)


def _weight(tree: dict[str, Any], where: str) -> bool:
    """Whether a turn or row is trained, by `weight` and `train`."""
    weight = tree.get("weight")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise UserError(f"{where}: weight {shown(weight)}: must be 0 or 1")
    train = tree.get("train")
    if train is not None and not isinstance(train, bool):
        raise UserError(f"{where}: train {shown(train)}: must be true or false")
    return weight != 0 and train is not False


def _content(content: Any, where: str) -> tuple[list[str], list[str]]:
    """The texts of a turn's content, and the thoughts among its parts."""
    if isinstance(content, str):
        return [unicode_text(content, "content", where)], []
    if not isinstance(content, list):
        raise UserError(
            f"{where}: content {shown(content)}: must be a string or a list of text parts; "
            "mend or delete the row"
        )

    texts = []
    thoughts = []
    for part in content:
        if isinstance(part, str):
            texts.append(unicode_text(part, "content", where))
            continue
        if not isinstance(part, dict):
            raise UserError(
                f"{where}: a part of content {shown(part)}: must be a text or a JSON object; "
                "mend or delete the row"
            )

        kind = part.get("type")
        if kind in _TEXT_PARTS:
            texts.append(unicode_text(part.get("text"), "content", where))
        elif kind in _REASONING_PARTS:
            thoughts.append(unicode_text(part.get(kind, part.get("text")), "content", where))
        else:
            raise UserError(
                f"{where}: a part of type {shown(kind)}: only text is trained; delete the row"
            )
    return texts or [""], thoughts


def _arguments(row: dict[str, Any], where: str) -> dict[str, Any]:
    """The row's own arguments of the chat template."""
    given = row.get("chat_template_kwargs") or {}
    if not isinstance(given, dict):
        raise UserError(
            f"{where}: chat_template_kwargs {shown(given)}: must be a JSON object; mend the row"
        )
    beside = {key: row[key] for key in _ROW_ARGUMENTS if row.get(key) is not None}
    arguments = {**beside, **given}
    check_given(arguments, where)
    return arguments


def check_given(arguments: Mapping[str, Any], where: str) -> None:
    """Refuse arguments of a template that are not a caller's, and truth values as texts.

    Raises:
        UserError: names the argument; `where` names who gives it.
    """
    for name, value in arguments.items():
        if name in RESERVED:
            raise UserError(f"{where}: {name} is no argument of the template to give; delete it")
        unicode_text(json.dumps({name: value}, ensure_ascii=False), "template argument", where)
        if isinstance(value, str) and value.lower() in ("true", "false"):
            raise UserError(
                f"{where}: {name} = {value!r} is a text, which a template takes as true; "
                f"write {value.lower()} without quotes"
            )

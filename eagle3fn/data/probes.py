"""Short conversations that are rendered to see what a chat template does."""

import json
from typing import Any, NamedTuple

# Texts that are found again in what is rendered.
QUESTION = "\x02question\x02"
ANSWER = "\x02answer\x02"
PARTS = ["\x02first part\x02", "\x02second part\x02"]
THOUGHT = "\x02thought\x02"
CALL_NAME = "probed_function"
CALL_VALUE = "probedvalue"
SAID = "probedtext"  # JSON does not change it

TOOL = {
    "type": "function",
    "function": {
        "name": CALL_NAME,
        "description": "probed",
        "parameters": {"type": "object", "properties": {}},
    },
}


class CallStyle(NamedTuple):
    """How a template takes an assistant turn with tool calls."""

    empty: str | None  # content where there is none
    as_text: bool  # arguments as JSON text, not as an object


CALL_STYLES = (
    CallStyle("", False),
    CallStyle(None, False),
    CallStyle("", True),
    CallStyle(None, True),
)


def styled_call(call: dict[str, Any], style: CallStyle) -> dict[str, Any]:
    """A tool call in a style."""
    if not style.as_text:
        return call
    function = call["function"]
    text = json.dumps(function["arguments"], ensure_ascii=False)
    return {**call, "function": {**function, "arguments": text}}


def asked() -> list[dict[str, Any]]:
    """A question and its answer."""
    return [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]


def called(style: CallStyle) -> list[dict[str, Any]]:
    """A question, and an answer that calls a function."""
    function = {"name": CALL_NAME, "arguments": {"key": CALL_VALUE}}
    call = styled_call({"id": "call1", "type": "function", "function": function}, style)
    answer = {"role": "assistant", "content": style.empty, "tool_calls": [call]}
    return [{"role": "user", "content": QUESTION}, answer]


def reply() -> dict[str, Any]:
    """A tool's reply to `called`."""
    return {"role": "tool", "content": SAID, "tool_call_id": "call1", "name": CALL_NAME}

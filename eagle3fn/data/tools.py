"""Tools of a row and calls of them, in the one form that chat templates take."""

import json
from typing import Any

from eagle3fn.base.errors import UserError
from eagle3fn.data.row_values import json_value, shown, unicode_text

_CALL_KEYS = ("name", "arguments", "id", "type", "index")


def calls_of(value: Any, where: str) -> list[dict[str, Any]]:
    """Tool calls as `{"id", "type": "function", "function": {"name", "arguments": {…}}}`."""
    if not value:
        return []
    calls = value if isinstance(value, list) else [value]

    read = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise UserError(
                f"{where}: tool call {shown(call)}: must be "
                '{"function": {"name", "arguments"}}; mend or delete the row'
            )
        lost = [key for key in function if key not in _CALL_KEYS]
        if lost:
            raise UserError(
                f"{where}: {lost[0]} in the call of {function['name']}: a call has name and "
                "arguments; write these"
            )
        arguments = function.get("arguments")
        if arguments in (None, ""):
            arguments = {}
        if isinstance(arguments, str):
            arguments = json_value(arguments, where)
        if not isinstance(arguments, dict):
            raise UserError(
                f"{where}: arguments {shown(arguments)} of {function['name']}: "
                "must be a JSON object; mend or delete the row"
            )
        entry = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
        if call.get("id"):
            entry["id"] = call["id"]
        unicode_text(json.dumps(entry, ensure_ascii=False), "tool call", where)
        read.append(entry)
    return read


def tools_of(value: Any, where: str) -> list[dict[str, Any]]:
    """A row's tools as `{"type": "function", "function": {"name", …}}`."""
    if isinstance(value, str) and value.strip():
        value = json_value(value, where)
    if not value:
        return []
    tools = value if isinstance(value, list) else [value]

    read = []
    for tool in tools:
        entry = tool if isinstance(tool, dict) else {}
        function = entry.get("function", entry)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise UserError(
                f"{where}: tool {shown(tool)}: must be "
                '{"type": "function", "function": {"name", …}}; mend or delete the row'
            )
        unicode_text(json.dumps(tool, ensure_ascii=False), "tool", where)
        bare = function is entry
        read.append({"type": "function", **({"function": function} if bare else entry)})
    return read

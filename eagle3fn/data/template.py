"""The target's chat template: what an engine renders, and which tokens end an answer.

What a template does with thoughts, tool calls and parts of content is found by rendering short
conversations, not by a list of families.
"""

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from jinja2 import TemplateError

from eagle3fn.base.errors import UserError
from eagle3fn.data.jinja import Program
from eagle3fn.data.prefixes import Prefixes
from eagle3fn.data.turns import Conversation, Turn, text_of

# Texts of conversations that are rendered to see what a template does; found again in the result.
_QUESTION = "\x02question\x02"
_ANSWER = "\x02answer\x02"
_PARTS = ["\x02first part\x02", "\x02second part\x02"]
_THOUGHT = "\x02thought\x02"
_CALL_NAME = "probed_function"
_CALL_VALUE = "probedvalue"
_SAID = "probedtext"  # JSON does not change it

_TOOL = {
    "type": "function",
    "function": {
        "name": _CALL_NAME,
        "description": "probed",
        "parameters": {"type": "object", "properties": {}},
    },
}

_REASONING_NAMES = ("reasoning_content", "thinking", "reasoning")
_BUILT_IN = {"messages", "tools", "documents", "add_generation_prompt", "strftime_now"}
# The end of a prompt that opens a thought.
_OPENING = re.compile(r"<([\w:.-]+)>\s*\Z")
_TAG = re.compile(r"</?(\w+)>")
_LONGEST_OPENING = 64  # characters
_LONG = 12  # messages from which on all beginnings are rendered at once


class _CallStyle(NamedTuple):
    """How a template takes an assistant turn with tool calls."""

    empty: str | None  # content where there is none
    as_text: bool  # arguments as JSON text, not as an object


_CALL_STYLES = (
    _CallStyle("", False),
    _CallStyle(None, False),
    _CallStyle("", True),
    _CallStyle(None, True),
)


class Thought(NamedTuple):
    """What the template writes around an answer's thought."""

    opening: str  # after the prompt; empty where the prompt has it
    closing: str  # between thought and answer
    on_lines: bool  # a line break is before the thought


class Opened(NamedTuple):
    """A thought that a prompt opens."""

    opening: str  # the prompt's end
    closing: str  # what ends the thought, without blanks


class NoChatTemplateError(UserError):
    """The target has no chat template that can be used: no fault of a row."""


class ChatTemplate:
    """A tokenizer's chat template with fixed arguments.

    Args:
        tokenizer: the target's.
        stops: ids of the tokens that end an answer (`data.target.stop_ids`). The tokenizer's own
            eos is one of them, if it is not named. Ordinary tokens among added ones are not heeded.
        arguments: of the template, as `enable_thinking`; a row's own come before them.

    Raises:
        UserError: an argument that the template has no variable for.
    """

    def __init__(
        self,
        tokenizer: Any,
        stops: Sequence[int] = (),
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.arguments = dict(arguments or {})

        # A stop token that is an ordinary piece of text, as in a configuration that nobody wrote,
        # would end an answer in its middle.
        eos = tokenizer.eos_token_id
        ids = dict.fromkeys(([] if eos is None else [eos]) + list(stops))
        added = [number for number in ids if number in tokenizer.added_tokens_decoder]
        self.stops = {tokenizer.decode([number]): number for number in added or ids}
        if self.arguments:
            self.check_arguments(self.arguments, "--template-arg")

    @property
    def name(self) -> str:
        """The tokenizer's, for errors."""
        return self.tokenizer.name_or_path

    # Rendering

    def rendering(self, conversation: Conversation, where: str) -> "Rendering":
        """A conversation in the template's form; `where` names it in errors."""
        messages = [self.message(turn) for turn in conversation.turns]
        options = {**self.arguments, **conversation.arguments}
        return Rendering(self, messages, {**options, "tools": conversation.tools or None}, where)

    def render(self, messages: list[dict[str, Any]], where: str, **options: Any) -> str:
        """The template on messages in its own form.

        Raises:
            UserError: no template, or it refuses the messages; `where` names the row.
        """
        try:
            return self._program_of(options).render(
                {**self._marks, **options, "messages": messages}
            )
        except NoChatTemplateError:
            raise
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"{where}: the chat template refuses these turns ({reason}); mend or delete the row"
            ) from None

    def prefixes(self, messages: list[dict[str, Any]], **options: Any) -> Prefixes | None:
        """The texts of all beginnings of a conversation; None if they must be rendered each."""
        program = self._program_of(options).prefixes
        return program.prefixes(messages, {**self._marks, **options})

    def _program_of(self, options: dict[str, Any]) -> Program:
        return self._tools_program if options.get("tools") else self._program

    def message(self, turn: Turn) -> dict[str, Any]:
        """A turn in the template's form."""
        message = {key: turn[key] for key in ("role", "tool_call_id", "name") if key in turn}
        message["content"] = self.content(turn["content"])

        if "reasoning" in turn:
            message |= dict.fromkeys(self._reasoning_names, turn["reasoning"])

        if "tool_calls" in turn:
            style = self._call_style
            message["content"] = message["content"] if turn["content"] else style.empty
            message["tool_calls"] = [_call(call, style) for call in turn["tool_calls"]]
        return message

    def content(self, content: str | list[str]) -> Any:
        """A turn's content as the template takes it."""
        if not self._takes_parts:
            return text_of(content)
        if isinstance(content, str):
            return content if self._takes_text else [{"type": "text", "text": content}]
        return [{"type": "text", "text": text} for text in content]

    def text_of(self, content: str | list[str]) -> str:
        """An answer's content as one text: its parts joined as the template joins them."""
        return content if isinstance(content, str) else self._between_parts.join(content)

    @cached_property
    def _between_parts(self) -> str:
        """What is between the parts of an answer."""
        text = self._probe([_asked()[0], {"role": "assistant", "content": _PARTS}])
        between = text.partition(_PARTS[0])[2].partition(_PARTS[1])
        return between[0] if between[1] else text_of(["", ""])

    def without_doubled_lines(self, message: dict[str, Any]) -> dict[str, Any]:
        """An answer without the line breaks around its thought that the template writes itself.

        Parsers of engines keep them: they cut a thought at its tags.
        """
        names = [name for name in self._reasoning_names if name in message]
        if not names or not self.thought:
            return message
        text = message[names[0]]
        text = text.lstrip("\n") if self.thought.on_lines else text
        text = text.rstrip("\n") if self.thought.closing.startswith("\n") else text

        content = message["content"]
        if isinstance(content, str) and self.thought.closing.endswith("\n"):
            content = content.lstrip("\n")
        return {**message, **dict.fromkeys(names, text), "content": content}

    # What the template has

    def check(self) -> None:
        """Refuse a tokenizer without a chat template that can be used.

        Raises:
            NoChatTemplateError: it has none, or only named ones without a default.
        """
        template = self.tokenizer.chat_template
        if not template:
            raise NoChatTemplateError(
                f"{self.name}: no chat template; take an instruction-tuned target, "
                "or rows with text in place of turns"
            )
        if isinstance(template, dict) and "default" not in template:
            raise NoChatTemplateError(
                f"{self.name}: no default chat template, only {', '.join(sorted(template))}; "
                "copy the one that is served to chat_template.jinja in the target's folder"
            )

    def has_argument(self, name: str) -> bool:
        """Whether the template has a variable of this name."""
        return name in self._variables

    def check_arguments(self, arguments: Mapping[str, Any], where: str) -> None:
        """Refuse arguments that the template has no variable for.

        Raises:
            UserError: names the argument and the variables that there are.
        """
        self.check()
        for name in arguments:
            if name not in self._variables:
                known = ", ".join(sorted(self._variables - _BUILT_IN)) or "none"
                raise UserError(
                    f"{where}: {name}: the chat template of {self.name} has no such variable "
                    f"(it has: {known}); delete it or write one of these"
                )

    @cached_property
    def _program(self) -> Program:
        return self._compiled("default")

    @cached_property
    def _tools_program(self) -> Program:
        """The template for rows with tools: some tokenizers have one of its own."""
        template = self.tokenizer.chat_template
        named = isinstance(template, dict) and "tool_use" in template
        return self._compiled("tool_use") if named else self._program

    def _compiled(self, name: str) -> Program:
        self.check()
        template = self.tokenizer.chat_template
        try:
            return Program(template[name] if isinstance(template, dict) else template)
        except TemplateError as error:
            raise NoChatTemplateError(
                f"{self.name}: its chat template is no Jinja template ({error}); mend it"
            ) from None

    @cached_property
    def _marks(self) -> dict[str, Any]:
        """The special tokens that a template writes by their names, as `bos_token`."""
        return dict(self.tokenizer.special_tokens_map)

    @cached_property
    def _source(self) -> str:
        """The template's text; of several, all of them."""
        template = self.tokenizer.chat_template
        return "\n".join(template.values()) if isinstance(template, dict) else template

    @property
    def _variables(self) -> set[str]:
        return self._program.arguments | self._tools_program.arguments

    @cached_property
    def _reasoning_names(self) -> list[str]:
        """The keys under which the template looks for a thought."""
        return [name for name in _REASONING_NAMES if re.search(rf"\b{name}\b", self._source)]

    @cached_property
    def _takes_parts(self) -> bool:
        """Whether content may be a list of parts."""
        parts = [{"type": "text", "text": text} for text in _PARTS]
        text = self._try([{"role": "user", "content": parts}])
        return all(text.count(part) == 1 for part in _PARTS) and "'type'" not in text

    @cached_property
    def _takes_text(self) -> bool:
        """Whether content may be a text; some templates render nothing then."""
        return _QUESTION in self._try([{"role": "user", "content": _QUESTION}])

    @cached_property
    def _call_style(self) -> _CallStyle:
        """How tool calls must be given, so that the template renders them."""
        for style in _CALL_STYLES:
            text = self._probe(_called(style))
            if _CALL_NAME in text and _CALL_VALUE in text:
                return style
        return _CALL_STYLES[0]  # none is rendered: `samples` finds the call missing

    @cached_property
    def has_tools(self) -> bool:
        """Whether a prompt shows the tools that the template is given."""
        prompts = [
            self._probe(turns, tools=[_TOOL], add_generation_prompt=True)
            for turns in (_asked()[:1], [{"role": "system", "content": _ANSWER}, *_asked()[:1]])
        ]
        return any(_CALL_NAME in prompt for prompt in prompts) or not any(prompts)

    @cached_property
    def has_calls(self) -> bool:
        """Whether history shows tool calls."""
        question, call = _called(self._call_style)
        texts = [
            self._probe([question, turn, *reply], tools=tools)
            for turn in (call, {**call, "content": _ANSWER})
            for reply in ([], [_reply()])
            for tools in (None, [_TOOL])
        ]
        return any(_CALL_VALUE in text for text in texts) or not any(texts)

    def has_role(self, role: str, first: bool) -> bool:
        """Whether a prompt shows the text of another role than user, in its first turn or later.

        Where the template refuses such turns in general, nothing is said against it.
        """
        if (role, first) not in self._roles:
            before = [] if first else _called(self._call_style) if role == "tool" else _asked()
            turn = _reply() if role == "tool" else {"role": role, "content": _SAID}
            after = [] if role == "tool" else _asked()[:1]
            text = self._probe([*before, turn, *after], add_generation_prompt=True)
            self._roles[role, first] = _SAID in text or not text
        return self._roles[role, first]

    @cached_property
    def _roles(self) -> dict[tuple[str, bool], bool]:
        return {}

    @cached_property
    def thought(self) -> Thought | None:
        """How a thought is rendered; None if it is not."""
        thinks = dict.fromkeys(self._reasoning_names, _THOUGHT)
        prompt = self._probe(_asked()[:1], add_generation_prompt=True)

        # Before an answer, or else before a call.
        question, answer = _asked()
        shown = self._probe([question, {**answer, **thinks}]).partition(_THOUGHT)
        closing, _, found = shown[2].rpartition(_ANSWER)
        if not (shown[1] and _ANSWER in shown[2]):
            question, answer = _called(self._call_style)
            shown = self._probe([question, {**answer, **thinks}]).partition(_THOUGHT)
            call = self._probe([question, answer]).removeprefix(prompt)
            found = shown[2].endswith(call)
            closing = shown[2].removesuffix(call)
        if not (shown[1] and found):
            return None
        opening = shown[0].removeprefix(prompt) if shown[0].startswith(prompt) else ""
        return Thought(opening, closing, shown[0].endswith("\n"))

    def opened(self, prompt: str) -> Opened | None:
        """The thought that a prompt opens, or its end that is no turn's own text."""
        end = _OPENING.search(prompt[-_LONGEST_OPENING:])
        if end and end[0] != self._header_end:
            return Opened(end[0], f"</{end[1]}>")
        if self.thought:
            opening, closing, _ = self.thought
            if opening.strip() and prompt.endswith(opening):
                return Opened(opening, closing.strip())
        return None

    @cached_property
    def _header_end(self) -> str | None:
        """A tag that a prompt ends with and that opens no thought: answers follow in history."""
        prompt = self._probe(_asked()[:1], add_generation_prompt=True)
        end = _OPENING.search(prompt)
        answered = self._probe(_asked())
        return end[0] if end and answered.startswith(prompt + _ANSWER) else None

    @cached_property
    def header(self) -> str:
        """What the template writes before an answer, in a prompt."""
        prompt = self._probe(_asked()[:1], add_generation_prompt=True)
        turns = self._probe(_asked()[:1])
        return prompt[len(turns) :] if prompt.startswith(turns) else ""

    def _probe(self, messages: list[dict[str, Any]], **options: Any) -> str:
        """The template on a probing conversation; empty where it refuses it."""
        turns = [
            {**each, "content": self.content(each["content"])} if each["content"] else each
            for each in messages
        ]
        return self._try(turns, **options)

    def _try(self, messages: list[dict[str, Any]], **options: Any) -> str:
        try:
            return self.render(messages, "", **self.arguments, **options)
        except UserError:
            return ""

    # Tokens that end an answer

    @cached_property
    def special(self) -> dict[str, int]:
        """The tokenizer's special tokens, by their texts."""
        return {
            token.content: number
            for number, token in self.tokenizer.added_tokens_decoder.items()
            if token.special
        }

    @cached_property
    def text_tokens(self) -> list[str]:
        """The special tokens that are text where an answer says them.

        `<think>` and its like are written by the target as tokens, whatever the tokenizer calls
        them.
        """
        known = {token.content for token in self.tokenizer.added_tokens_decoder.values()}
        ends = {*self.stops, *(self.tokenizer.special_tokens_map or {}).values()}
        return [token for token in self.special if token in ends or not _is_tag(token, known)]

    def stop_in(self, text: str, literal: Sequence[tuple[int, int]] = ()) -> tuple[int, str] | None:
        """Place and text of the token in `text` that ends an answer.

        One that lies in a piece of `literal`, from begin to end, ends nothing.
        """
        place = self._first(list(self.stops), text, literal)
        if not place and self._end_mark:
            return self._first([self._end_mark], text, literal)
        return place

    def _first(
        self, marks: list[str], text: str, literal: Sequence[tuple[int, int]]
    ) -> tuple[int, str] | None:
        found = [
            (match.start(), -len(mark), mark)
            for mark in marks
            for match in re.finditer(re.escape(mark), text)
            if not any(begin <= match.start() < end for begin, end in literal)
        ]
        return (min(found)[0], min(found)[2]) if found else None

    @cached_property
    def answer_stop(self) -> str:
        """What the target writes last in an answer without tool calls."""
        found = self.stop_in(self._probe(_asked()).rpartition(_ANSWER)[2])
        return found[1] if found else self.stop_after(calls=False)

    def stop_id(self, stop: str) -> int:
        """The id of a text that `stop_in` or `stop_after` gave."""
        return self.stops[stop] if stop in self.stops else self.special[stop]

    def stop_after(self, calls: bool) -> str:
        """What the target writes last where the template writes no end: the mark of the next turn
        if it is one of its stop tokens, else its own end.

        Args:
            calls: the answer ends with tool calls.

        Raises:
            UserError: the target has no stop token.
        """
        mark = self._mark_after_calls if calls else self._mark_after_answer
        if mark:
            return mark
        if self._end_mark:
            return self._end_mark
        if not self.stops:
            raise UserError(
                f"{self.name}: no eos token, and its chat template writes none after an answer; "
                "write eos_token_id into generation_config.json"
            )
        return next(iter(self.stops))

    @cached_property
    def _end_mark(self) -> str | None:
        """A special token that the template writes right after an answer, and no stop token is."""
        text = self._probe(_asked()).rpartition(_ANSWER)[2]
        if any(stop in text for stop in self.stops):
            return None
        marks = [mark for mark in self.special if text.lstrip().startswith(mark)]
        return max(marks, key=len, default=None)

    @cached_property
    def _mark_after_answer(self) -> str | None:
        text = self._probe([*_asked(), {"role": "user", "content": _PARTS[0]}])
        return self._first_stop(text.partition(_ANSWER)[2].partition(_PARTS[0])[0])

    @cached_property
    def _mark_after_calls(self) -> str | None:
        text = self._probe([*_called(self._call_style), _reply()])
        return self._first_stop(text.rpartition(_CALL_VALUE)[2].partition(_SAID)[0])

    def _first_stop(self, text: str) -> str | None:
        found = self._first(list(self.stops), text, ())
        return found[1] if found else None


class Rendering:
    """A conversation, rendered up to one of its turns.

    Args:
        template: the target's.
        messages: the turns in its form.
        options: arguments of the template, and `tools`.
        where: names the row in errors.
    """

    def __init__(
        self,
        template: ChatTemplate,
        messages: list[dict[str, Any]],
        options: dict[str, Any],
        where: str,
    ) -> None:
        self.template = template
        self.messages = messages
        self.options = options
        self.where = where
        # Of a long conversation all beginnings, with a prompt after them and without.
        self._beginnings: dict[bool, Prefixes | None] = {}

    def prompt(self, turns: int) -> str:
        """What an engine gives the target before it answers: the first `turns` turns."""
        return self._beginning(turns, add_generation_prompt=True)

    def through(self, turns: int, other: Turn | None = None) -> str:
        """The first `turns` turns, the last of them as it is written, without a further prompt.

        `other` comes in place of the last of them.
        """
        *before, last = self.messages[:turns]
        message = self.template.message(other) if other else last
        written = self.template.without_doubled_lines(message)
        if written is last:
            return self._beginning(turns, add_generation_prompt=False)
        return self._text([*before, written], add_generation_prompt=False)

    def _beginning(self, turns: int, add_generation_prompt: bool) -> str:
        if len(self.messages) >= _LONG:
            if add_generation_prompt not in self._beginnings:
                self._beginnings[add_generation_prompt] = self.template.prefixes(
                    self.messages, **self.options, add_generation_prompt=add_generation_prompt
                )
            beginnings = self._beginnings[add_generation_prompt]
            text = beginnings and beginnings.of(turns)
            if text is not None:
                return text
        return self._text(self.messages[:turns], add_generation_prompt=add_generation_prompt)

    def before_answer(self, turns: int) -> str:
        """The first `turns` turns as they are shown once they are answered, up to the answer."""
        answer = {"role": "assistant", "content": self.template.content(_ANSWER)}
        text = self._text([*self.messages[:turns], answer], add_generation_prompt=False)
        return text.rpartition(_ANSWER)[0]

    def _text(self, messages: list[dict[str, Any]], **options: Any) -> str:
        return self.template.render(messages, self.where, **self.options, **options)


def _is_tag(token: str, known: set[str]) -> bool:
    """Whether a token is one of a pair, as `<think>` and `</think>`."""
    match = _TAG.fullmatch(token)
    return bool(match) and {f"<{match[1]}>", f"</{match[1]}>"} <= known


def _call(call: dict[str, Any], style: _CallStyle) -> dict[str, Any]:
    if not style.as_text:
        return call
    function = call["function"]
    text = json.dumps(function["arguments"], ensure_ascii=False)
    return {**call, "function": {**function, "arguments": text}}


def _asked() -> list[dict[str, Any]]:
    """A question and its answer."""
    return [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]


def _called(style: _CallStyle) -> list[dict[str, Any]]:
    """A question, and an answer that calls a function."""
    function = {"name": _CALL_NAME, "arguments": {"key": _CALL_VALUE}}
    call = _call({"id": "call1", "type": "function", "function": function}, style)
    answer = {"role": "assistant", "content": style.empty, "tool_calls": [call]}
    return [{"role": "user", "content": _QUESTION}, answer]


def _reply() -> dict[str, Any]:
    """A tool's reply to `_called`."""
    return {"role": "tool", "content": _SAID, "tool_call_id": "call1", "name": _CALL_NAME}

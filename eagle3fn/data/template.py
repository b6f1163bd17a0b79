"""The target's chat template: what an engine renders, and what the template has.

What a template does with thoughts, tool calls and parts of content is found by rendering short
conversations, not by a list of families.
"""

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import TemplateError

from eagle3fn.base.errors import UserError
from eagle3fn.data.jinja import Program
from eagle3fn.data.jinja_budget import TemplateLimitError
from eagle3fn.data.prefixes import Prefixes
from eagle3fn.data.probes import (
    ANSWER,
    CALL_NAME,
    CALL_STYLES,
    CALL_VALUE,
    PARTS,
    QUESTION,
    SAID,
    THOUGHT,
    TOOL,
    CallStyle,
    asked,
    called,
    reply,
    styled_call,
)
from eagle3fn.data.row_values import text_of, unicode_text
from eagle3fn.data.turns import Turn

_REASONING_NAMES = ("reasoning_content", "thinking", "reasoning")
_BUILT_IN = {"messages", "tools", "documents", "add_generation_prompt", "strftime_now"}
# The end of a prompt that opens a thought.
_OPENING = re.compile(r"<([\w:.-]+)>\s*\Z")
_LONGEST_OPENING = 64  # characters


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


def reason_of(error: Exception) -> str:
    """An error of a template in a few words."""
    return " ".join(str(error).split())[:200] or type(error).__name__


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

    def render(self, messages: list[dict[str, Any]], where: str, **options: Any) -> str:
        """The template on messages in its own form.

        Raises:
            NoChatTemplateError: no template, or a faulty one; names its file.
            UserError: it refuses the messages; `where` names the row.
        """
        program = self._program_of(options)
        try:
            text = program.render({**self._marks, **options, "messages": messages})
            return text if text.isascii() else unicode_text(text, "text", where)
        except UserError:
            raise
        except TemplateLimitError as error:
            raise self._faulty(str(error)) from None
        except Exception as error:  # a template's expressions raise what they like
            if type(error) is not TemplateError and self._fails_always:
                raise self._faulty(f"fails on any conversation ({reason_of(error)})") from None
            raise UserError(
                f"{where}: the chat template refuses these turns ({reason_of(error)}); mend or "
                "delete the row"
            ) from None

    def _faulty(self, what: str) -> "NoChatTemplateError":
        return NoChatTemplateError(f"{self._file}: its chat template {what}; mend it")

    @property
    def _file(self) -> str:
        """The file that the template is in, where that is known; else the tokenizer's name."""
        for name in ("chat_template.jinja", "tokenizer_config.json"):
            if (Path(self.name) / name).is_file():
                return str(Path(self.name) / name)
        return self.name

    @cached_property
    def _fails_always(self) -> bool:
        """Whether the template fails on plain conversations too, by other than its own refusal."""
        question, answer = asked()
        as_parts = {**question, "content": [{"type": "text", "text": question["content"]}]}
        for messages in ([question], [as_parts], [question, answer]):
            for more in ({"add_generation_prompt": True}, {"tools": [TOOL]}):
                variables = {**self._marks, **self.arguments, **more, "messages": messages}
                try:
                    self._program_of(more).render(variables)
                except TemplateLimitError as error:  # the next one would take as long
                    raise self._faulty(str(error)) from None
                except Exception as error:
                    if type(error) is not TemplateError:
                        continue
                return False
        return True

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
            style = self.call_style
            message["content"] = message["content"] if turn["content"] else style.empty
            message["tool_calls"] = [styled_call(call, style) for call in turn["tool_calls"]]
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
        text = self.probe([asked()[0], {"role": "assistant", "content": PARTS}])
        between = text.partition(PARTS[0])[2].partition(PARTS[1])
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
                known = ", ".join(sorted(self._variables - _BUILT_IN))
                remedy = f"delete it or write one of {known}" if known else "delete it: it has none"
                raise UserError(
                    f"{where}: {name}: the chat template of {self.name} has no such variable; "
                    f"{remedy}"
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
        except Exception as error:  # Jinja's own, and Python's of what Jinja made of it
            raise self._faulty(f"is no Jinja template ({reason_of(error)})") from None

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
        parts = [{"type": "text", "text": text} for text in PARTS]
        text = self._try([{"role": "user", "content": parts}])
        return all(text.count(part) == 1 for part in PARTS) and "'type'" not in text

    @cached_property
    def _takes_text(self) -> bool:
        """Whether content may be a text; some templates render nothing then."""
        return QUESTION in self._try([{"role": "user", "content": QUESTION}])

    @cached_property
    def call_style(self) -> CallStyle:
        """How tool calls must be given, so that the template renders them."""
        for style in CALL_STYLES:
            text = self.probe(called(style))
            if CALL_NAME in text and CALL_VALUE in text:
                return style
        return CALL_STYLES[0]  # none is rendered: `samples` finds the call missing

    @cached_property
    def has_tools(self) -> bool:
        """Whether a prompt shows the tools that the template is given."""
        prompts = [
            self.probe(turns, tools=[TOOL], add_generation_prompt=True)
            for turns in (asked()[:1], [{"role": "system", "content": ANSWER}, *asked()[:1]])
        ]
        return any(CALL_NAME in prompt for prompt in prompts) or not any(prompts)

    @cached_property
    def has_calls(self) -> bool:
        """Whether history shows tool calls."""
        question, call = called(self.call_style)
        texts = [
            self.probe([question, turn, *after], tools=tools)
            for turn in (call, {**call, "content": ANSWER})
            for after in ([], [reply()])
            for tools in (None, [TOOL])
        ]
        return any(CALL_VALUE in text for text in texts) or not any(texts)

    def has_role(self, role: str, first: bool) -> bool:
        """Whether a prompt shows the text of another role than user, in its first turn or later.

        Where the template refuses such turns in general, nothing is said against it.
        """
        if (role, first) not in self._roles:
            before = [] if first else called(self.call_style) if role == "tool" else asked()
            turn = reply() if role == "tool" else {"role": role, "content": SAID}
            after = [] if role == "tool" else asked()[:1]
            text = self.probe([*before, turn, *after], add_generation_prompt=True)
            self._roles[role, first] = SAID in text or not text
        return self._roles[role, first]

    @cached_property
    def _roles(self) -> dict[tuple[str, bool], bool]:
        return {}

    @cached_property
    def thought(self) -> Thought | None:
        """How a thought is rendered; None if it is not."""
        thinks = dict.fromkeys(self._reasoning_names, THOUGHT)
        prompt = self.probe(asked()[:1], add_generation_prompt=True)

        # Before an answer, or else before a call.
        question, answer = asked()
        shown = self.probe([question, {**answer, **thinks}]).partition(THOUGHT)
        closing, _, found = shown[2].rpartition(ANSWER)
        if not (shown[1] and ANSWER in shown[2]):
            question, answer = called(self.call_style)
            shown = self.probe([question, {**answer, **thinks}]).partition(THOUGHT)
            call = self.probe([question, answer]).removeprefix(prompt)
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
        prompt = self.probe(asked()[:1], add_generation_prompt=True)
        end = _OPENING.search(prompt)
        answered = self.probe(asked())
        return end[0] if end and answered.startswith(prompt + ANSWER) else None

    @cached_property
    def header(self) -> str:
        """What the template writes before an answer, in a prompt."""
        prompt = self.probe(asked()[:1], add_generation_prompt=True)
        turns = self.probe(asked()[:1])
        return prompt[len(turns) :] if prompt.startswith(turns) else ""

    def probe(self, messages: list[dict[str, Any]], **options: Any) -> str:
        """The template on a probing conversation; empty where it refuses it."""
        turns = [
            {**each, "content": self.content(each["content"])} if each["content"] else each
            for each in messages
        ]
        return self._try(turns, **options)

    def _try(self, messages: list[dict[str, Any]], **options: Any) -> str:
        try:
            return self.render(messages, "", **self.arguments, **options)
        except NoChatTemplateError:
            raise
        except UserError:
            return ""

"""What the target writes as a turn, found in the rendered conversation."""

import re
from typing import Any, NamedTuple

from eagle3fn.base.errors import UserError
from eagle3fn.data.template import ChatTemplate, Opened, Rendering
from eagle3fn.data.turns import Conversation, Turn, forms_of, text_of

# Why an answer is in no sample.
EMPTY = "have an empty answer"
NO_THOUGHT = "answer without a thought, where the prompt opens one"

_BLANK = re.compile(r"\s+")
_NO_THOUGHT = re.compile(r"<([\w:.-]+)>\s*</\1>\s*\Z")  # the end of a prompt
_LONGEST_MARK = 64  # characters
_UNCLOSED = re.compile(r"<[^<>]*\Z")  # the beginning of a mark
_LEADING_BLANK = re.compile(r"\s*")


class Answer(NamedTuple):
    """What the target writes after a prompt."""

    text: str
    stop: str  # the token after it
    own: list[str]  # the row's own texts that may be in it, in their order


class Answers:
    """The answers of a rendered conversation."""

    def __init__(
        self, template: ChatTemplate, conversation: Conversation, rendering: Rendering
    ) -> None:
        self.template = template
        self.turns = conversation.turns
        self.rendering = rendering
        self._template = f"the chat template of {template.name}"  # in errors

    def answer(self, number: int, prompt: str) -> Answer | str:
        """What the target writes as turn `number`, or the reason that it cannot be known.

        Raises:
            UserError: the template does not render what the turn says.
        """
        turn = self.turns[number]
        content = text_of(turn["content"])
        rendered_only = "tool_calls" in turn or "reasoning" in turn
        if not content.strip() and not rendered_only:
            return EMPTY

        # An answer may repeat that it has no thought, as the prompt says.
        no_thought = _NO_THOUGHT.search(prompt[-_LONGEST_MARK:])
        if no_thought:
            content = _without(no_thought[0], content)

        # A thought in the content, in the target's own marks: the content is what it wrote.
        opened = self.template.opened(prompt, text_of(self.turns[number - 1]["content"]))
        if opened and "reasoning" not in turn and opened.closing not in content:
            return NO_THOUGHT
        if not (rendered_only or no_thought):
            written = self._with_thought(content, opened)
            if written:
                return written

        # Else what the template renders after the prompt.
        through = self.rendering.through(number + 1)
        if through.startswith(prompt):
            body, stop = self._split(through[len(prompt) :], turn)
            self._check(number, body)
        else:
            supplied, rest = self._after_supplied(number, prompt, through)
            body, stop = self._split(rest, turn)
            self._check(number, body, supplied)
            body = _without(supplied, body)
            content = _without(supplied, content)
        own = own_texts(turn)
        if rendered_only:
            return Answer(body, stop, own)
        if _squeezed(content) == _squeezed(body):
            return Answer(_with_lead(content, body), stop, own)
        if _is_end(body, content):
            # The template leaves out a thought in marks of its own; no token in it ends an answer.
            visible = content[_begin_of_end(body, content) :]
            stops = [each for each in self.template.stops if each in content]
            return Answer(content, stop, [visible, *stops])
        return Answer(body, stop, own)

    def _with_thought(self, content: str, opened: Opened | None) -> Answer | None:
        """An answer whose content has a thought in the target's marks; None if there is none."""
        thought = self.template.thought
        if opened and opened.closing in content:
            text = _without(opened.opening, content)
            begin, closing = 0, opened.closing
        elif thought and thought.opening.strip() and thought.closing.strip() in content:
            text, closing = content, thought.closing.strip()
            if not text.lstrip().startswith(thought.opening.strip()):
                return None
            begin = text.index(thought.opening.strip()) + len(thought.opening.strip())
        else:
            return None
        middle = text.index(closing, begin)
        end = middle + len(closing)
        own = [each for each in (text[begin:middle], text[end:]) if each.strip()]
        return Answer(text, self.template.answer_stop, own)

    def _after_supplied(self, number: int, prompt: str, through: str) -> tuple[str, str]:
        """Where history does not show the prompt: what it supplies, and `through` after that.

        History may leave out what the prompt ends with, and thoughts of turns before.
        """
        where = f"{self.rendering.where}: turn {number + 1}"
        turns = self.rendering.through(number)
        shown = self.rendering.before_answer(number)

        # The last turn's end, where the header of an answer begins.
        last = text_of(self.turns[number - 1]["content"]).strip()
        end = turns[max(turns.rfind(last), 0) :] if last else turns
        begin = shown.rfind(end) + len(end)
        if not prompt.startswith(turns) or end not in shown:
            raise UserError(
                f"{where}: {self._template} renders the turns before it in another way once it is "
                "answered; mend or delete the row"
            )

        # What the prompt has in common with any answer, and what it supplies after that.
        tail = prompt[len(turns) :]
        common = len(_UNCLOSED.sub("", tail[: _common(tail, shown[begin:])]))
        supplied = tail[common:]
        head = shown[: begin + common]
        if not through.startswith(head):
            raise UserError(
                f"{where}: the prompt ends with {tail!r}, and {self._template} renders this answer "
                "in another way; change --template-arg, or mend or delete the row"
            )
        return supplied, through[len(head) :]

    def _split(self, written: str, turn: Turn) -> tuple[str, str]:
        """What is written before the stop token, and the stop token."""
        header = self.template.header
        if header.strip():
            written = written.removeprefix(header)  # as if the answer had a prompt of its own
        found = self.template.stop_in(written, own_texts(turn))
        if found:
            place, stop = found
            return written[:place], stop
        return written.rstrip(), self.template.stop_after("tool_calls" in turn)

    def _check(self, number: int, body: str, supplied: str = "") -> None:
        """Refuse a thought, a tool call or a text that the template does not render."""
        turn = self.turns[number]
        where = f"{self.rendering.where}: turn {number + 1}"
        if not is_in(turn.get("reasoning", ""), body):
            remedy = "write it into content, or take a target that thinks"
            if supplied.strip():
                remedy = f"write the thought into content, after {supplied.strip()}"
            raise UserError(
                f"{where}: {self._template} does not render reasoning_content; {remedy}"
            )
        for call in turn.get("tool_calls", []):
            if not _has_call(call, turn, body):
                raise not_rendered(where, self._template, call)
        content = text_of(turn["content"])
        if not (is_in(content, body) or _parsed(content, body) or _is_end(body, content)):
            raise UserError(
                f"{where}: {self._template} changes the text of this answer; mend or delete the row"
            )


def not_rendered(where: str, template: str, call: dict[str, Any]) -> UserError:
    """The error of a tool call that is lost."""
    return UserError(
        f"{where}: {template} does not render tool_calls ({call['function']['name']}); "
        "write the call as content, or take a target that has tools"
    )


# Texts


def own_texts(turn: Turn) -> list[str]:
    """The row's own texts in a turn, in the order of rendering; none is empty."""
    texts = [turn.get("reasoning", ""), text_of(turn["content"])]
    for call in turn.get("tool_calls", []):
        texts.append(call["function"]["name"])
        texts += _strings(call["function"]["arguments"])
    return [text for text in texts if text.strip()]


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for each in inner for text in _strings(each)]


def is_in(text: str, rendered: str) -> bool:
    """Whether a template rendered a text, as it is, without blanks around it, or as JSON."""
    text = text.strip()
    if not text or text in rendered or any(form in rendered for form in forms_of(text)):
        return True
    return _squeezed(text) in _squeezed(rendered)


def _has_call(call: dict[str, Any], turn: Turn, body: str) -> bool:
    """Whether a body shows a call: its name as often as it is called, and its arguments."""
    name = call["function"]["name"]
    times = sum(each["function"]["name"] == name for each in turn["tool_calls"])
    values = _strings(call["function"]["arguments"])
    return body.count(name) >= times and all(is_in(value, body) for value in values)


def _parsed(content: str, body: str) -> bool:
    """Whether a template rendered a content with a thought in tags, without its opening tag."""
    thought, closed, visible = content.rpartition("</think>")
    thought = thought.replace("<think>", "")
    return bool(closed) and is_in(thought, body) and is_in(visible, body)


def _with_lead(content: str, body: str) -> str:
    """A text with the blanks that the template writes before it, if it has none of its own."""
    lead = _LEADING_BLANK.match(body)
    return content if content[:1].isspace() or not lead else lead[0] + content


def _is_end(body: str, content: str) -> bool:
    """Whether a template rendered the end of a text alone."""
    return bool(body.strip()) and _squeezed(content).endswith(_squeezed(body))


def _begin_of_end(body: str, content: str) -> int:
    """Where the end of a text begins that a template rendered alone."""
    left = len(_squeezed(body))
    for place in range(len(content) - 1, -1, -1):
        left -= not content[place].isspace()
        if left == 0:
            return place
    return 0


def _without(supplied: str, text: str) -> str:
    """A text that repeats what the prompt supplies, without it."""
    beginning = supplied.strip()
    if not beginning or not text.lstrip().startswith(beginning):
        return text
    rest = text.lstrip().removeprefix(beginning)
    return rest.removeprefix(supplied[len(supplied.rstrip()) :])


def _common(one: str, other: str) -> int:
    """The length of the text that both begin with."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _squeezed(text: str) -> str:
    return _BLANK.sub("", text)

"""What the target writes as a turn, found in the rendered conversation."""

import re
from typing import Any, NamedTuple

from eagle3fn.base.errors import UserError
from eagle3fn.data.ends import Ends
from eagle3fn.data.rendered import (
    Rendered,
    Span,
    Words,
    begin_of_end,
    begin_without,
    common_length,
    has_call,
    has_thought,
    in_order,
    is_end,
    is_in,
    is_parsed,
    mentions_closing,
    own_texts,
    places,
    squeezed,
    with_lead,
    without_empty,
)
from eagle3fn.data.rendering import Rendering
from eagle3fn.data.template import Opened
from eagle3fn.data.turns import Conversation, Turn

# Why an answer is in no sample.
EMPTY = "have an empty answer"
NO_THOUGHT = "answer without a thought, where the prompt opens one"

_NO_THOUGHT = re.compile(r"<([\w:.-]+)>\s*</\1>\s*\Z")  # the end of a prompt
_LONGEST_MARK = 64  # characters
_UNCLOSED = re.compile(r"<[^<>]*\Z")  # the beginning of a mark


class Answer(NamedTuple):
    """What the target writes after a prompt."""

    text: str
    stop: str  # the token after it
    literal: tuple[Span, ...]  # where special tokens in `text` are text, not the token


class Answers:
    """The answers of a rendered conversation."""

    def __init__(self, ends: Ends, conversation: Conversation, rendering: Rendering) -> None:
        self.ends = ends
        self.template = ends.template
        self.turns = conversation.turns
        self.rendering = rendering
        self._template = f"the chat template of {self.template.name}"  # in errors

    def answer(self, number: int, prompt: str) -> Answer | str:
        """What the target writes as turn `number`, or the reason that it cannot be known.

        Raises:
            UserError: the template does not render what the turn says, or the turn has a thought
                and the prompt says that there is none.
        """
        turn = self.turns[number]
        content = self.template.text_of(turn["content"])

        # An answer may repeat that it has no thought, as the prompt says.
        end = self._end_of(number, prompt)
        no_thought = _NO_THOUGHT.search(end[-_LONGEST_MARK:])
        if no_thought:
            turn = without_empty(turn, content, no_thought[1])
            content = self.template.text_of(turn["content"])
            self._check_no_thought(number, no_thought, content)
        rendered_only = "tool_calls" in turn or "reasoning" in turn
        if not content.strip() and not rendered_only:
            return EMPTY

        # A thought in the content, in the target's own marks: the content is what it wrote.
        opened = self.template.opened(end)
        if opened and "reasoning" not in turn and opened.closing not in content:
            return NO_THOUGHT
        if not (rendered_only or no_thought):
            written = self._with_thought(content, opened)
            if written:
                return written

        # Else what the template renders after the prompt.
        supplied, rest = self._after(number, prompt, self._through(number, turn))
        body, stop = self._split(rest, turn)
        self._check(number, turn, body.text, opened, supplied)
        body = body.part(begin_without(supplied, body.text))
        content = content[begin_without(supplied, content) :]
        if rendered_only:
            return self._as_rendered(number, body, stop)
        if squeezed(content) == squeezed(body.text):
            text = with_lead(content, body.text)
            return Answer(text, stop, ((0, len(text)),))
        if is_end(body.text, content):
            # The template leaves out a thought in marks of its own; no token in it ends an answer.
            visible = (begin_of_end(body.text, content), len(content))
            stops = [m.span() for each in self.template.stops for m in places(each, content)]
            return Answer(content, stop, (visible, *stops))
        return self._as_rendered(number, body, stop)

    def _as_rendered(self, number: int, body: Rendered, stop: str) -> Answer:
        if body.literal is None:
            raise UserError(
                f"{self.rendering.where}: turn {number + 1}: an answer has a special token as "
                "text, and the chat template changes it; mend or delete the row"
            )
        return Answer(body.text, stop, body.literal)

    def _end_of(self, number: int, prompt: str) -> str:
        """The end of a prompt, without a text of its last turn that ends in a tag itself."""
        last = self.template.text_of(self.turns[number - 1]["content"])
        if not last.rstrip().endswith(">"):
            return prompt
        turns = self.rendering.through(number)
        return prompt[len(turns) :] if prompt.startswith(turns) else ""

    def _check_no_thought(self, number: int, supplied: re.Match[str], content: str) -> None:
        """Refuse a thought after a prompt that says that there is none."""
        thought = self.turns[number].get("reasoning", "")
        if not (thought.strip() or has_thought(content, supplied[1])):
            return
        remedy = "delete the thought"
        if self.rendering.options.get("enable_thinking") is False:
            remedy += ", or drop enable_thinking=false"
        elif self.template.has_argument("enable_thinking"):
            remedy += ", or give --template-arg enable_thinking=true"
        raise UserError(
            f"{self.rendering.where}: turn {number + 1}: the answer has a thought, which the "
            f"prompt rules out (it ends with {supplied[0]!r}); {remedy}"
        )

    def _with_thought(self, content: str, opened: Opened | None) -> Answer | None:
        """An answer whose content has a thought in the target's marks; None if there is none."""
        thought = self.template.thought
        if opened and opened.closing in content:
            text = content[begin_without(opened.opening, content) :]
            begin, closing = 0, opened.closing
        elif thought and thought.opening.strip() and thought.closing.strip() in content:
            text, closing = content, thought.closing.strip()
            if not text.lstrip().startswith(thought.opening.strip()):
                return None
            begin = text.index(thought.opening.strip()) + len(thought.opening.strip())
        else:
            return None
        middle = text.index(closing, begin)
        literal = ((begin, middle), (middle + len(closing), len(text)))
        return Answer(text, self.ends.answer_stop, literal)

    def _through(self, number: int, turn: Turn) -> Rendered:
        """The turns up to `number`, which is `turn`, as they are rendered, and where its own
        special tokens are: found by rendering it once more with other words in their place.
        """
        given = turn is self.turns[number]
        mention = mentions_closing(self.template.text_of(turn["content"]))
        tokens = [*self.ends.text_tokens, *(["</think>"] if mention else [])]
        words = Words(turn, tokens)
        plain = "" if mention else self.rendering.through(number + 1, None if given else turn)
        if not words.by_token:
            return Rendered(plain)

        found = words.undone(self.rendering.through(number + 1, words.turn))
        if mention or found.text == plain:
            return found
        return Rendered(plain, in_order(own_texts(turn), tokens, plain))

    def _after(self, number: int, prompt: str, through: Rendered) -> tuple[str, Rendered]:
        """What the prompt supplies and history does not show, and `through` after the prompt.

        History may leave out what the prompt ends with, and thoughts of turns before.
        """
        if through.text.startswith(prompt):
            return "", through.part(len(prompt))
        where = f"{self.rendering.where}: turn {number + 1}"
        turns = self.rendering.through(number)
        shown = self.rendering.before_answer(number)

        # The last turn's end, where the header of an answer begins.
        last = self.template.text_of(self.turns[number - 1]["content"]).strip()
        end = turns[max(turns.rfind(last), 0) :] if last else turns
        begin = shown.rfind(end) + len(end)
        if not prompt.startswith(turns) or end not in shown:
            raise UserError(
                f"{where}: {self._template} renders the turns before it in another way once it is "
                "answered; mend or delete the row"
            )

        # What the prompt has in common with any answer, and what it supplies after that.
        tail = prompt[len(turns) :]
        common = len(_UNCLOSED.sub("", tail[: common_length(tail, shown[begin:])]))
        supplied = tail[common:]
        head = shown[: begin + common]
        if not through.text.startswith(head):
            raise UserError(
                f"{where}: the prompt ends with {tail!r}, and {self._template} renders this answer "
                "in another way; change --template-arg, or mend or delete the row"
            )
        return supplied, through.part(len(head))

    def _split(self, written: Rendered, turn: Turn) -> tuple[Rendered, str]:
        """What is written before the stop token, and the stop token."""
        header = self.template.header
        if header.strip() and written.text.startswith(header):
            written = written.part(len(header))  # as if the answer had a prompt of its own
        found = self.ends.stop_in(written.text, written.literal or ())
        if found:
            place, stop = found
            return written.part(0, place), stop
        end = len(written.text.rstrip())
        return written.part(0, end), self.ends.stop_after("tool_calls" in turn)

    def _check(
        self, number: int, turn: Turn, body: str, opened: Opened | None, supplied: str
    ) -> None:
        """Refuse a thought, a tool call or a text that the template does not render."""
        where = f"{self.rendering.where}: turn {number + 1}"
        if not is_in(turn.get("reasoning", ""), body):
            remedy = "write it into content, or take a target that thinks"
            if opened:
                remedy = (
                    f"write the thought into content, after {opened.opening.strip()} and before "
                    f"{opened.closing}"
                )
            elif supplied.strip():
                remedy = f"write the thought into content, after {supplied.strip()}"
            raise UserError(
                f"{where}: {self._template} does not render reasoning_content; {remedy}"
            )
        for call in turn.get("tool_calls", []):
            if not has_call(call, turn, body):
                raise not_rendered(where, self._template, call)
        content = self.template.text_of(turn["content"])
        if not (is_in(content, body) or is_parsed(content, body) or is_end(body, content)):
            raise UserError(
                f"{where}: {self._template} changes the text of this answer; mend or delete the row"
            )


def not_rendered(where: str, template: str, call: dict[str, Any]) -> UserError:
    """The error of a tool call that is lost."""
    return UserError(
        f"{where}: {template} does not render tool_calls ({call['function']['name']}); "
        "write the call as content, or take a target that has tools"
    )

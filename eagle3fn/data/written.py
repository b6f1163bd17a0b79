"""What the target writes as a turn, found in the rendered conversation."""

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from eagle3fn.base.errors import UserError
from eagle3fn.data.ends import Ends
from eagle3fn.data.rendering import Rendering
from eagle3fn.data.template import Opened
from eagle3fn.data.turns import Conversation, Turn, forms_of, text_of

# Why an answer is in no sample.
EMPTY = "have an empty answer"
NO_THOUGHT = "answer without a thought, where the prompt opens one"

_BLANK = re.compile(r"\s+")
_NO_THOUGHT = re.compile(r"<([\w:.-]+)>\s*</\1>\s*\Z")  # the end of a prompt
_LONGEST_MARK = 64  # characters
_UNCLOSED = re.compile(r"<[^<>]*\Z")  # the beginning of a mark
_LEADING_BLANK = re.compile(r"\s*")


Span = tuple[int, int]
"""Begin and end of a piece of text."""


class Answer(NamedTuple):
    """What the target writes after a prompt."""

    text: str
    stop: str  # the token after it
    literal: tuple[Span, ...]  # where special tokens in `text` are text, not the token


class Rendered(NamedTuple):
    """A piece of rendered text."""

    text: str
    # Where the row's own texts have special tokens; None where that cannot be found.
    literal: tuple[Span, ...] | None = ()

    def part(self, begin: int, end: int | None = None) -> "Rendered":
        """The piece from `begin` to `end`."""
        text = self.text[begin:end]
        if not self.literal:
            return Rendered(text, self.literal)
        moved = ((start - begin, stop - begin) for start, stop in self.literal)
        return Rendered(text, tuple(s for s in moved if s[0] >= 0 and s[1] <= len(text)))


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
            turn = _without_empty(turn, content, no_thought[1])
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
        body = body.part(_begin_without(supplied, body.text))
        content = content[_begin_without(supplied, content) :]
        if rendered_only:
            return self._as_rendered(number, body, stop)
        if _squeezed(content) == _squeezed(body.text):
            text = _with_lead(content, body.text)
            return Answer(text, stop, ((0, len(text)),))
        if _is_end(body.text, content):
            # The template leaves out a thought in marks of its own; no token in it ends an answer.
            visible = (_begin_of_end(body.text, content), len(content))
            stops = [m.span() for each in self.template.stops for m in _places(each, content)]
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
        if not (thought.strip() or _has_thought(content, supplied[1])):
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
            text = content[_begin_without(opened.opening, content) :]
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
        mention = _mentions_closing(self.template.text_of(turn["content"]))
        tokens = [*self.ends.text_tokens, *(["</think>"] if mention else [])]
        words = _Words(turn, tokens)
        plain = "" if mention else self.rendering.through(number + 1, None if given else turn)
        if not words.by_token:
            return Rendered(plain)

        found = words.undone(self.rendering.through(number + 1, words.turn))
        if mention or found.text == plain:
            return found
        return Rendered(plain, _in_order(own_texts(turn), tokens, plain))

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
        common = len(_UNCLOSED.sub("", tail[: _common(tail, shown[begin:])]))
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
            if not _has_call(call, turn, body):
                raise not_rendered(where, self._template, call)
        content = self.template.text_of(turn["content"])
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
    """Whether a template rendered a text: as it is, without blanks around it, as JSON, or in
    single quotes.
    """
    text = text.strip()
    if not text or text in rendered:
        return True
    if any(form in rendered for form in (*forms_of(text), _in_quotes(text))):
        return True
    return _squeezed(text) in _squeezed(rendered)


def _in_quotes(text: str) -> str:
    """A text as it is written between single quotes in Python."""
    text = text.replace("\\", "\\\\").replace("'", "\\'")
    return text.replace("\n", "\\n").replace("\r", "\\r")


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


def _begin_without(supplied: str, text: str) -> int:
    """Where a text goes on that repeats what the prompt supplies; 0 if it does not."""
    beginning = supplied.strip()
    begin = len(text) - len(text.lstrip())
    if not beginning or not text.startswith(beginning, begin):
        return 0
    begin += len(beginning)
    return begin + _common(supplied[len(supplied.rstrip()) :], text[begin:])


def _without_empty(turn: Turn, content: str, tag: str) -> Turn:
    """A turn whose content may begin with an empty thought, without it."""
    found = re.match(rf"\s*<{tag}>\s*</{tag}>\n*", content)
    return {**turn, "content": content[found.end() :]} if found else turn


# Thoughts in a content


def _has_thought(content: str, tag: str) -> bool:
    """Whether a content begins with a thought in tags; the opening one may be missing."""
    thought, closed, _ = content.partition(f"</{tag}>")
    if not closed or _mentions_closing(content, tag):
        return False
    return bool(thought.replace(f"<{tag}>", "").strip())


def _mentions_closing(content: str, tag: str = "think") -> bool:
    """Whether a closing tag is a word of the text: none is opened, and it stands within a line."""
    opening, closing = f"<{tag}>", f"</{tag}>"
    if closing not in content or content.lstrip().startswith(opening):
        return False
    return all(
        line.strip() != closing and not line.strip().endswith(closing)
        for line in content.splitlines()
        if closing in line
    )


# Special tokens in the row's own texts


class _Words:
    """A turn with a word in the place of each special token in its own texts."""

    def __init__(self, turn: Turn, tokens: Sequence[str]) -> None:
        texts = own_texts(turn)
        stem = "qz"
        while any(stem in text for text in texts):
            stem += "q"
        inside = [each for each in tokens if any(each in text for text in texts)]
        self.by_token = {token: f"{stem}{number}z" for number, token in enumerate(inside)}
        self._tokens = _any_of(inside)
        self._words = _any_of(list(self.by_token.values()))
        self._by_word = {word: token for token, word in self.by_token.items()}
        keys = ("content", "reasoning", "tool_calls")
        self.turn = {**turn, **{key: self._done(turn[key]) for key in keys if key in turn}}

    def _done(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._tokens.sub(lambda match: self.by_token[match[0]], value)
        if isinstance(value, dict):
            return {self._done(key): self._done(each) for key, each in value.items()}
        return [self._done(each) for each in value] if isinstance(value, list) else value

    def undone(self, text: str) -> Rendered:
        """A rendered text with the tokens in their places, and where they are."""
        done = ""
        literal = []
        begin = 0
        for match in self._words.finditer(text):
            done += text[begin : match.start()]
            token = self._by_word[match[0]]
            literal.append((len(done), len(done) + len(token)))
            done += token
            begin = match.end()
        return Rendered(done + text[begin:], tuple(literal))


def _any_of(texts: Sequence[str]) -> re.Pattern[str]:
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _in_order(texts: list[str], tokens: Sequence[str], rendered: str) -> tuple[Span, ...] | None:
    """Where texts with special tokens are rendered, one after another; None if one is not."""
    spans = []
    begin = 0
    for text in texts:
        if not any(token in text for token in tokens):
            continue
        places = [(rendered.find(form, begin), -len(form)) for form in forms_of(text)]
        found = min((place for place in places if place[0] >= 0), default=None)
        if not found:
            return None
        begin = found[0] - found[1]
        spans.append((found[0], begin))
    return tuple(spans)


def _places(text: str, inside: str) -> Iterator[re.Match[str]]:
    return re.finditer(re.escape(text), inside)


def _common(one: str, other: str) -> int:
    """The length of the text that both begin with."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _squeezed(text: str) -> str:
    return _BLANK.sub("", text)

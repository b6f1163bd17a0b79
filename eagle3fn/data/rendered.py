"""Rendered text, and the row's own texts in it."""

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from eagle3fn.data.row_values import forms_of, text_of
from eagle3fn.data.turns import Turn

_BLANK = re.compile(r"\s+")
_LEADING_BLANK = re.compile(r"\s*")

Span = tuple[int, int]
"""Begin and end of a piece of text."""


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
    return squeezed(text) in squeezed(rendered)


def _in_quotes(text: str) -> str:
    """A text as it is written between single quotes in Python."""
    text = text.replace("\\", "\\\\").replace("'", "\\'")
    return text.replace("\n", "\\n").replace("\r", "\\r")


def has_call(call: dict[str, Any], turn: Turn, body: str) -> bool:
    """Whether a body shows a call: its name as often as it is called, and its arguments."""
    name = call["function"]["name"]
    times = sum(each["function"]["name"] == name for each in turn["tool_calls"])
    values = _strings(call["function"]["arguments"])
    return body.count(name) >= times and all(is_in(value, body) for value in values)


def is_parsed(content: str, body: str) -> bool:
    """Whether a template rendered a content with a thought in tags, without its opening tag."""
    thought, closed, visible = content.rpartition("</think>")
    thought = thought.replace("<think>", "")
    return bool(closed) and is_in(thought, body) and is_in(visible, body)


def with_lead(content: str, body: str) -> str:
    """A text with the blanks that the template writes before it, if it has none of its own."""
    lead = _LEADING_BLANK.match(body)
    return content if content[:1].isspace() or not lead else lead[0] + content


def is_end(body: str, content: str) -> bool:
    """Whether a template rendered the end of a text alone."""
    return bool(body.strip()) and squeezed(content).endswith(squeezed(body))


def begin_of_end(body: str, content: str) -> int:
    """Where the end of a text begins that a template rendered alone."""
    left = len(squeezed(body))
    for place in range(len(content) - 1, -1, -1):
        left -= not content[place].isspace()
        if left == 0:
            return place
    return 0


def begin_without(supplied: str, text: str) -> int:
    """Where a text goes on that repeats what the prompt supplies; 0 if it does not."""
    beginning = supplied.strip()
    begin = len(text) - len(text.lstrip())
    if not beginning or not text.startswith(beginning, begin):
        return 0
    begin += len(beginning)
    return begin + common_length(supplied[len(supplied.rstrip()) :], text[begin:])


def without_empty(turn: Turn, content: str, tag: str) -> Turn:
    """A turn whose content may begin with an empty thought, without it."""
    found = re.match(rf"\s*<{tag}>\s*</{tag}>\n*", content)
    return {**turn, "content": content[found.end() :]} if found else turn


# Thoughts in a content


def has_thought(content: str, tag: str) -> bool:
    """Whether a content begins with a thought in tags; the opening one may be missing."""
    thought, closed, _ = content.partition(f"</{tag}>")
    if not closed or mentions_closing(content, tag):
        return False
    return bool(thought.replace(f"<{tag}>", "").strip())


def mentions_closing(content: str, tag: str = "think") -> bool:
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


class Words:
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


def in_order(texts: list[str], tokens: Sequence[str], rendered: str) -> tuple[Span, ...] | None:
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


def places(text: str, inside: str) -> Iterator[re.Match[str]]:
    """Where a text lies in another one."""
    return re.finditer(re.escape(text), inside)


def common_length(one: str, other: str) -> int:
    """The length of the text that both begin with."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def squeezed(text: str) -> str:
    """A text without blanks."""
    return _BLANK.sub("", text)

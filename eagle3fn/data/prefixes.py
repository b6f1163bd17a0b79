"""A conversation's beginnings, all from one rendering: a long one in linear time.

Most templates write message after message. Then the text of the first `k` messages is the text of
the whole conversation up to the end of message `k - 1`, and what the template writes at the very
end. This holds if, until there, the template has read none of the messages from `k` on, nor how
many there are, and if the end is the same for all. The first is watched during the rendering, the
second is seen in the template's text. Where it does not hold, nothing is said of the beginning.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from jinja2 import Template, nodes

from eagle3fn.data.jinja import compiled, parse, rendering

_BEGIN = "eagle3fn_message_begins"
_END = "eagle3fn_message_ends"


class Prefixes(NamedTuple):
    """The texts of a conversation's beginnings."""

    text: str  # of the whole conversation
    ends: dict[int, int]  # by the number of messages, where in `text` they end
    tail: str  # what follows them

    def of(self, count: int) -> str | None:
        """The text of the first `count` messages; None if it must be rendered by itself."""
        end = self.ends.get(count)
        return None if end is None else self.text[:end] + self.tail


class PrefixProgram:
    """A template that marks where messages begin and end.

    Args:
        source: the template's text.
    """

    def __init__(self, source: str) -> None:
        self._source = source
        self._template = _marked(source)

    def __reduce__(self) -> tuple[Any, ...]:
        return PrefixProgram, (self._source,)  # compiled again in another process

    def prefixes(self, messages: list[Any], variables: dict[str, Any]) -> Prefixes | None:
        """The beginnings of a conversation; None if the template refuses it or looks ahead."""
        if self._template is None:
            return None
        watch = _Watch(len(messages))
        marks: dict[str, Callable[[], str]] = {_BEGIN: watch.begin, _END: watch.end}
        variables = {**variables, **marks, "messages": _Watched(messages, 0, watch)}
        try:
            with rendering(self._template, variables) as parts:
                for part in parts:
                    watch.add(part)
        except Exception:  # whatever it is: rendering without a watch tells it
            return None

        text = "".join(watch.parts)
        last = watch.ends.get(len(messages))
        return None if last is None else Prefixes(text, watch.ends, text[last:])


class _Watch:
    """What a template has written, and how far it has read."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.parts: list[str] = []
        self.ends: dict[int, int] = {}
        self._written = 0  # characters
        self._read = 0  # messages of which the template can have taken notice
        self._current = 0  # messages read when the loop began its current one

    def add(self, part: str) -> None:
        self.parts.append(part)
        self._written += len(part)

    def read(self, count: int) -> None:
        self._read = max(self._read, count)

    def read_all(self) -> None:
        self._read = self.count + 1  # how many there are, too

    def begin(self) -> str:
        self._current = self._read
        return ""

    def end(self) -> str:
        # The message that ends is the last one read, or another was looked at before.
        if self._read == self._current <= self.count:
            self.ends[self._current] = self._written
        return ""


class _Watched(Sequence[Any]):
    """Messages that tell what is read of them."""

    def __init__(self, messages: list[Any], start: int, watch: _Watch) -> None:
        self._messages = messages
        self._start = start
        self._watch = watch

    def __iter__(self) -> Iterator[Any]:
        for number in range(self._start, len(self._messages)):
            self._watch.read(number + 1)
            yield self._messages[number]
        self._watch.read_all()

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, int) and 0 <= index < len(self._messages) - self._start:
            self._watch.read(self._start + index + 1)
            return self._messages[self._start + index]
        start = index.start if isinstance(index, slice) else None
        if isinstance(start, int) and start >= 0 and index == slice(start, None, None):
            return _Watched(self._messages, self._start + start, self._watch)
        self._watch.read_all()
        return self._messages[self._start :][index]

    def __len__(self) -> int:
        self._watch.read_all()
        return len(self._messages) - self._start

    def __eq__(self, other: object) -> bool:
        self._watch.read_all()
        return self._messages[self._start :] == other

    __hash__ = None  # type: ignore[assignment]

    def __bool__(self) -> bool:
        self._watch.read(self._start + 1)
        return len(self._messages) > self._start


# The template's text


def _marked(source: str) -> Template | None:
    """The template with marks in its main loop; None if it has none, or no constant end."""
    tree = parse(source)
    loops = [i for i, node in enumerate(tree.body) if isinstance(node, nodes.For)]
    if not loops:
        return None
    loop = tree.body[loops[-1]]
    assert isinstance(loop, nodes.For)
    if loop.recursive or _varies(tree, tree.body[loops[-1] + 1 :]):
        return None
    loop.body = [_call(_BEGIN), *loop.body, _call(_END)]
    return compiled(tree)


def _varies(tree: nodes.Template, tail: list[nodes.Node]) -> bool:
    """Whether the nodes after the loop read messages, or what the template has set."""
    names = list(tree.find_all(nodes.Name))
    own = {name.name for name in names if name.ctx != "load"} | {"messages", "loop"}
    read = {name.name for node in tail for name in node.find_all(nodes.Name)}
    inner = {type(each) for node in tail for each in node.find_all(nodes.Node)}
    return bool(read & own) or not inner <= _CONSTANT


_CONSTANT: set[type[nodes.Node]] = {
    nodes.Output,
    nodes.TemplateData,
    nodes.If,
    nodes.Name,
    nodes.Const,
    nodes.Compare,
    nodes.Operand,
    nodes.And,
    nodes.Or,
    nodes.Not,
    nodes.Test,
    nodes.Add,
    nodes.Concat,
    nodes.CondExpr,
}
"""What a constant end may be made of."""


def _call(name: str) -> nodes.Output:
    call = nodes.Call(nodes.Name(name, "load"), [], [], None, None, lineno=1)
    return nodes.Output([call], lineno=1)

"""Limits of a chat template's time and memory: it is a stranger's program.

A rendering has a budget of characters. Text that is written, values that are assigned or given to a
call, and each turn of a loop, macro or block are charged to it; what would make much out of little
(`*`, `%`, `center`, `join`, …) is charged before it is done. At each turn the time is looked at.

What is not charged at once is bounded by the template's own length: an expression makes at most
`_CHAIN` times its largest value before its parts are charged too. So a rendering holds at most a
few gigabytes, and ends some seconds after its time at the latest, however it is written.
"""

import functools
import re
import time
from collections.abc import Callable, Mapping
from types import (
    BuiltinMethodType,
    ClassMethodDescriptorType,
    MethodDescriptorType,
    MethodType,
    WrapperDescriptorType,
)
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

SECONDS = 10.0
"""Of a rendering: one takes milliseconds."""
CHARACTERS = 2**26
"""Of a rendering; `_A_CHARACTER` times the conversation's where that is more."""
LONGEST_SOURCE = 2**20  # characters; the longest in use have 30 thousand

_STEP = 2**12  # characters between two looks at the time
_LARGE = 2**16  # characters of a value after which the time is looked at always
_A_CHARACTER = 32  # charged for a character of the conversation, at most
_CHAIN = 16  # values that an expression joins before they are charged
_OBJECT = 8  # characters that a value counts for
_WIDEST = 9999  # of a format's fields
_LARGEST_NUMBER = 2**16  # bits
_LARGEST_COUNT = 10**5
_SMALL = 2**16  # characters of what filters take that need more than linear time
_PART = 256  # characters of a branch that are charged by themselves


class TemplateLimitError(TemplateError):
    """A template takes more time or memory than any needs."""


class Budget:
    """What a rendering may still take."""

    def __init__(self) -> None:
        self.start({})

    def start(self, variables: Mapping[str, Any]) -> None:
        """A new rendering, of these variables."""
        self._variables: Mapping[str, Any] | None = variables
        self._left = CHARACTERS
        self._step = _STEP
        self._look = CHARACTERS - _STEP  # what is left when the time is looked at again
        self._end = time.monotonic() + SECONDS
        self._used: float | None = None  # processor time when the end was reached

    def charge(self, count: int) -> None:
        """Charge so many characters; one more turn of a loop, macro or block is one.

        Raises:
            TemplateLimitError: there are not so many left, or no time.
        """
        self._left = left = self._left - count
        if left < self._look:
            self._check(count)

    def text(self, value: Any) -> str:
        """A value as it is written."""
        text = value if type(value) is str else str(value)
        self._left = left = self._left - len(text)
        if left < self._look:
            self._check(len(text))
        return text

    def checked(self, value: Any) -> Any:
        """A value that is kept, or goes into another one."""
        self.charge(len(value) if type(value) is str else self._weight(value))
        return value

    def grown(self, value: Any, before: Any) -> Any:
        """A value that takes the place of another one."""
        self.charge(1 + max(0, self._weight(value) - self._weight(before)))
        return value

    def _weight(self, value: Any) -> int:
        """A value's weight, or more than what is left."""
        found = weight(value, self._left)
        if found > self._left and self._grant():
            found = weight(value, self._left)
        return found

    def _grant(self) -> bool:
        """Give a long conversation more, once; whether it was given."""
        if self._variables is None:
            return False
        self._left += _A_CHARACTER * weight(list(self._variables.values()))
        self._variables = None
        return True

    def _check(self, count: int) -> None:
        if self._left < 0:
            self._grant()
        if self._left < 0:
            raise TemplateLimitError(f"makes more than {CHARACTERS} characters")

        # A process that was stopped, or waited for a processor, has more time.
        now = time.monotonic()
        if now > self._end:
            used = time.thread_time()
            if self._used is not None and used - self._used > SECONDS / 4:
                raise TemplateLimitError(f"takes longer than {SECONDS:.0f} seconds")
            self._used = used if self._used is None else self._used
            self._end = now + SECONDS / 4

        # Where values are large, each turn may take long.
        self._step = 0 if count > _LARGE else self._step
        self._look = self._left - self._step


def weight(value: Any, limit: int = 2 * CHARACTERS) -> int:
    """The size of a value in characters, with all that it holds; counted to `limit`.

    A value alone is as 8 characters: as much memory is taken by a place in a list.
    """
    stack = [value]
    total = 0
    while stack and total <= limit:
        one = stack.pop()
        total += _OBJECT
        if isinstance(one, (str, bytes)):
            total += len(one)
        elif type(one) in (list, tuple, set, frozenset):
            stack.extend(one)
        elif type(one) is dict:
            stack.extend(one)
            stack.extend(one.values())
        elif isinstance(one, Namespace):
            stack.append(one._Namespace__attrs)  # pyright: ignore[reportAttributeAccessIssue]
        elif isinstance(one, int):
            total += one.bit_length() // 8
    return total


# A template's program


class LimitedCode(CodeGenerator):
    """Jinja's, which writes values by `Budget.text`."""

    def _output_child_pre(self, node: nodes.Expr, frame: Frame, finalize: Any) -> None:
        self.write("environment.text(")


CHECKED = "eagle3fn_checked"
GROWN = "eagle3fn_grown"
"""Names of two filters: `Budget.checked` and `Budget.grown`."""

_GROWING = (nodes.Add, nodes.Concat, nodes.Filter, nodes.Call, nodes.List, nodes.Tuple, nodes.Dict)


class Limiter(NodeTransformer):
    """Puts the charges into a template's tree."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.body = [_tick(node.body), *node.body]
        return node

    visit_Macro = visit_CallBlock = visit_Block = visit_For  # type: ignore[assignment]

    def visit_If(self, node: nodes.If) -> nodes.Node:
        self.generic_visit(node)
        if _own_data(node.body) > _PART:
            node.body = [_tick(node.body), *node.body]
        if _own_data(node.else_) > _PART:
            node.else_ = [_tick(node.else_), *node.else_]
        return node

    def visit_Assign(self, node: nodes.Assign) -> nodes.Node:
        self.generic_visit(node)
        if _grows(node.node):
            node.node = _charged(node.node)
            if isinstance(node.target, nodes.NSRef):
                place = nodes.Name(node.target.name, "load", lineno=node.lineno)
                before = nodes.Getattr(place, node.target.attr, "load", lineno=node.lineno)
                node.node.name = GROWN
                node.node.args = [before]
        return node

    def visit_With(self, node: nodes.With) -> nodes.Node:
        self.generic_visit(node)
        node.values = [_charged(each) if _grows(each) else each for each in node.values]
        return node

    def visit_Call(self, node: nodes.Call) -> nodes.Node:
        self.generic_visit(node)
        node.args = [_charged(each) if _grows(each) else each for each in node.args]
        for each in node.kwargs:
            if _grows(each.value):
                each.value = _charged(each.value)
        return node

    def visit_Add(self, node: nodes.Node) -> nodes.Node:
        self.generic_visit(node)
        if _joined(node) > _CHAIN:
            _charge_parts(node)
        return node

    visit_Concat = visit_List = visit_Tuple = visit_Dict = visit_Add  # type: ignore[assignment]


def _tick(body: list[nodes.Node]) -> nodes.ExprStmt:
    call = f"charge({1 + _own_data(body)})"
    return nodes.ExprStmt(nodes.EnvironmentAttribute(call), lineno=1)


def _own_data(body: list[nodes.Node]) -> int:
    """Characters that a body writes by itself, without those of blocks in it."""
    outputs = [node for node in body if isinstance(node, nodes.Output)]
    texts = [node.data for out in outputs for node in out.find_all(nodes.TemplateData)]
    texts += [node.value for out in outputs for node in out.find_all(nodes.Const)]
    return sum(len(text) for text in texts if isinstance(text, str))


def _grows(node: nodes.Node) -> bool:
    """Whether an expression can be larger than what is charged already."""
    if isinstance(node, nodes.Call) and isinstance(node.node, nodes.Name):
        if node.node.name == "namespace":
            return False  # its arguments are charged
    return isinstance(node, _GROWING) or next(node.find_all(_GROWING), None) is not None


def _charged(node: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, CHECKED, [], [], None, None, lineno=node.lineno)


def _joined(node: nodes.Node) -> int:
    """How many values an expression joins, but those that are charged."""
    if isinstance(node, nodes.Filter) and node.name == CHECKED:
        return 1
    inner = list(node.iter_child_nodes())
    return max(1, sum(map(_joined, inner)))


def _charge_parts(node: nodes.Node) -> None:
    """Charge the parts of an expression, but constants."""
    if isinstance(node, nodes.BinExpr):
        node.left = _part(node.left)
        node.right = _part(node.right)
    elif isinstance(node, nodes.Concat):
        node.nodes = [_part(each) for each in node.nodes]
    elif isinstance(node, (nodes.List, nodes.Tuple)):
        node.items = [_part(each) for each in node.items]
    elif isinstance(node, nodes.Dict):
        for each in node.items:
            each.value = _part(each.value)


def _part(node: nodes.Expr) -> nodes.Expr:
    charged = isinstance(node, nodes.Filter) and node.name == CHECKED
    return node if charged or isinstance(node, nodes.Const) else _charged(node)


# Operators


def charge_operator(budget: Budget, operator: str, left: Any, right: Any) -> None:
    """Charge `left * right`, `left ** right` and `left % right` before they are computed."""
    if operator == "%":
        if isinstance(left, (str, bytes)):
            _charge_format(budget, left, "%", right)
    elif operator == "**":
        if isinstance(left, int) and isinstance(right, int):
            _check_bits(max(1, left.bit_length()) * abs(right))
    elif isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() + right.bit_length())
    else:
        for many, count in ((left, right), (right, left)):
            if isinstance(count, int):
                size = len(many) if isinstance(many, (str, bytes)) else weight(many)
                budget.charge(size * max(0, count))


def _check_bits(bits: int) -> None:
    if bits > _LARGEST_NUMBER:
        raise TemplateLimitError(f"makes a number of {bits} bits")


_WIDE = re.compile(r"\d{5}|\*|\{[^{}]*[:!][^{}]*\{")


def _charge_format(budget: Budget, text: Any, mark: str, *values: Any) -> None:
    """Charge a format: each field may write all values, in the widest field."""
    text = text.decode("latin-1") if isinstance(text, bytes) else text
    if _WIDE.search(text):
        raise TemplateLimitError(f"has a format with a field wider than {_WIDEST}")
    budget.charge(len(text) + text.count(mark) * weight(values))


# Filters


def limited_filters(budget: Budget, filters: Mapping[str, Any]) -> dict[str, Any]:
    """Those of Jinja's filters that make much out of little, charged before they are called."""
    charged = {name: _charging(budget, filters[name], charge) for name, charge in _FILTERS.items()}
    return {**charged, CHECKED: budget.checked, GROWN: budget.grown}


def _charging(budget: Budget, function: Any, charge: Callable[..., Any]) -> Any:
    """A filter that is charged first; `charge` may return another value for it to take."""
    first = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)
    def wrapped(*args: Any, **named: Any) -> Any:
        own, (value, *rest) = args[:first], args[first:]
        replaced = charge(budget, value, *rest, **named)
        return function(*own, value if replaced is None else replaced, *rest, **named)

    return wrapped


def _charge_width(budget: Budget, value: Any, width: Any = 80, *_: Any, **__: Any) -> None:
    budget.charge(width if isinstance(width, int) else 0)


def _charge_indent(budget: Budget, s: Any, width: Any = 4, *_: Any, **__: Any) -> None:
    wide = width if isinstance(width, int) else weight(width)
    text = str(s)
    budget.charge(len(text) + (1 + len(text.splitlines())) * max(0, wide))


def _charge_join(budget: Budget, value: Any, d: Any = "", *_: Any, **__: Any) -> Any:
    items = value if isinstance(value, (str, list, tuple)) else list(value)
    budget.charge(weight(items) + len(items) * weight(d))
    return items


def _charge_replace(budget: Budget, s: Any, old: Any = "", new: Any = "", *_: Any, **__: Any):
    text = str(s)
    budget.charge(len(text) + text.count(str(old)) * weight(new))


def _charge_filter_format(budget: Budget, value: Any, *args: Any, **named: Any) -> None:
    _charge_format(budget, str(value), "%", args, named)


def check_indent(indent: Any) -> None:
    """Refuse what no JSON is indented by.

    Raises:
        TemplateLimitError: it is more than a line has.
    """
    if (indent if isinstance(indent, int) else weight(indent)) > _WIDEST // 100:
        raise TemplateLimitError(f"indents JSON by more than {_WIDEST // 100}")


def _check_precision(budget: Budget, value: Any, precision: Any = 0, *_: Any, **__: Any) -> None:
    if isinstance(precision, int) and abs(precision) > _WIDEST // 100:
        raise TemplateLimitError(f"rounds to {precision} digits")


def _check_count(
    budget: Budget, value: Any, linecount: Any = 0, *_: Any, slices: Any = 0, **__: Any
) -> None:
    for count in (linecount, slices):
        if isinstance(count, int) and count > _LARGEST_COUNT:
            raise TemplateLimitError(f"makes {count} pieces")


def _check_small(budget: Budget, value: Any, *args: Any, **named: Any) -> None:
    numbers = [each for each in (*args, *named.values()) if isinstance(each, int)]
    if max(map(abs, numbers), default=0) > _WIDEST or weight((value, args, named)) > _SMALL:
        raise TemplateLimitError("gives a long text to a filter that takes long for it")


def _check_start(
    budget: Budget, iterable: Any, attribute: Any = None, start: Any = 0, *_: Any
) -> None:
    if not isinstance(start, (int, float)):
        raise TemplateLimitError("sums what are no numbers")


_FILTERS: dict[str, Callable[..., Any]] = {
    "center": _charge_width,
    "indent": _charge_indent,
    "join": _charge_join,
    "replace": _charge_replace,
    "format": _charge_filter_format,
    "round": _check_precision,
    "batch": _check_count,
    "slice": _check_count,
    "sum": _check_start,
    "pprint": _check_small,
    "striptags": _check_small,
    "urlize": _check_small,
    "wordwrap": _check_small,
    "xmlattr": _check_small,
}


# Methods of texts, lists and dicts

_PLAIN_METHODS = frozenset(
    "as_integer_ratio bit_count bit_length capitalize casefold copy count decode encode endswith "
    "find get hex index is_integer isalnum isalpha isascii isdecimal isdigit isidentifier islower "
    "isnumeric isprintable isspace istitle isupper items keys lower lstrip partition removeprefix "
    "removesuffix rfind rindex rpartition rsplit rstrip split splitlines startswith strip swapcase "
    "title upper values".split()
)


def _charge_tabs(budget: Budget, text: Any, tabsize: Any = 8) -> None:
    budget.charge(len(text) * max(1, tabsize if isinstance(tabsize, int) else 1))


_METHODS: dict[str, Callable[..., Any]] = {
    "center": _charge_width,
    "ljust": _charge_width,
    "rjust": _charge_width,
    "zfill": _charge_width,
    "expandtabs": _charge_tabs,
    "replace": _charge_replace,
}
_DESCRIPTORS = (MethodDescriptorType, WrapperDescriptorType, ClassMethodDescriptorType)


def is_method(function: Any) -> bool:
    """Whether a function is a method of a built-in type, or of a text.

    Raises:
        SecurityError: a method without the value that it is of.
    """
    kind = type(function)
    if kind in _DESCRIPTORS:
        raise SecurityError(f"{function.__name__} cannot be called so in a chat template")
    return kind is BuiltinMethodType or (kind is MethodType and isinstance(function.__self__, str))


def charge_method(
    budget: Budget, method: Any, args: tuple[Any, ...], named: dict[str, Any]
) -> None:
    """Charge a method of a built-in type before it is called.

    Raises:
        SecurityError: no method that templates need.
        TemplateLimitError: it would make too much.
    """
    name = method.__name__
    if name in _PLAIN_METHODS:
        return
    if name == "join":
        _charge_join(budget, *args, d=method.__self__)
    elif name in _METHODS:
        _METHODS[name](budget, method.__self__, *args, **named)
    else:
        raise SecurityError(f"{name} cannot be called in a chat template")


def limited_format(budget: Budget, wrapper: Callable[..., str], text: str) -> Callable[..., str]:
    """`text.format`, charged before it is called."""

    def wrapped(*args: Any, **named: Any) -> str:
        _charge_format(budget, text, "{", args, named)
        return wrapper(*args, **named)

    return wrapped

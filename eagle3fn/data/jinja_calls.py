"""What a template calls, charged to its budget before it is done: operators, filters, methods."""

import functools
import re
from collections.abc import Callable, Mapping
from types import (
    BuiltinMethodType,
    ClassMethodDescriptorType,
    MethodDescriptorType,
    MethodType,
    WrapperDescriptorType,
)
from typing import Any

from jinja2.exceptions import SecurityError

from eagle3fn.data.jinja_budget import Budget, TemplateLimitError, weight
from eagle3fn.data.jinja_tree import CHECKED, GROWN

_WIDEST = 9999  # of a format's fields
_DEEPEST = 99  # digits that are rounded to, and blanks that JSON is indented by
_LARGEST_NUMBER = 2**16  # bits
_LARGEST_COUNT = 10**5
_SMALL = 2**16  # characters of what filters take that need more than linear time

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
    if (indent if isinstance(indent, int) else weight(indent)) > _DEEPEST:
        raise TemplateLimitError(f"indents JSON by more than {_DEEPEST}")


def _check_precision(budget: Budget, value: Any, precision: Any = 0, *_: Any, **__: Any) -> None:
    if isinstance(precision, int) and abs(precision) > _DEEPEST:
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
    of_text = kind is MethodType and isinstance(function.__self__, str)
    return of_text or kind is BuiltinMethodType


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

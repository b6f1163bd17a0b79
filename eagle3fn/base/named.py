"""Settings that name a function: one of a table, or a user's own as "module:function"."""

import inspect
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, TypeVar

from eagle3fn.base.errors import UserError, is_out_of_memory

T = TypeVar("T")


def find(
    name: str, table: Mapping[str, T], setting: str, arguments: tuple[str, ...]
) -> T | Callable[..., Any]:
    """`table[name]`; or for "module:function" that function, its module imported.

    Args:
        name: the setting's value.
        table: the functions of this package, by name.
        setting: the setting's dotted name, for messages.
        arguments: of a user's function, by place.

    Raises:
        UserError: neither; or the module cannot be imported, or has no function of that name that
            takes the arguments.
    """
    if name in table:
        return table[name]

    given = f"{setting} = {name!r}"
    module_name, colon, function_name = name.partition(":")
    if not (module_name and colon and function_name):
        known = ", ".join(map(repr, table))
        raise UserError(f"{given}: must be one of {known}, or a function as 'module:function'")

    # A user's module can fail in any way: its own message is part of ours.
    try:
        module = import_module(module_name)
    except (Exception, SystemExit) as error:
        raise UserError(
            f"{given}: module {module_name!r} cannot be imported ({in_one_line(error)});"
            " mend it, or put its folder on PYTHONPATH"
        ) from error

    function = getattr(module, function_name, None)
    if not callable(function):
        raise UserError(
            f"{given}: {function_name!r} must be a function of module {module_name!r}; define it "
            "there, or name another"
        )
    check_arguments(function, arguments, given)
    return function


def call_own(function: Callable[..., T], arguments: tuple[Any, ...], given: str, wanted: str) -> T:
    """`function(*arguments)` of a user's function, whose errors become one sentence.

    A `UserError` is one already. Too little memory stays what it is: the function is not at fault.

    Args:
        function: a user's.
        arguments: by place.
        given: the sentence's subject: the setting and what was called.
        wanted: what the function must be, or what to do.

    Raises:
        UserError: the function raised something, or ended the program; it is the cause.
    """
    try:
        return function(*arguments)
    except (Exception, SystemExit) as error:
        if isinstance(error, UserError) or is_out_of_memory(error):
            raise
        raise UserError(f"{given} raised {in_one_line(error)}; {wanted}") from error


def in_one_line(error: BaseException) -> str:
    """An error's kind and message."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def check_arguments(function: Callable[..., Any], arguments: tuple[str, ...], given: str) -> None:
    """Check that a user's function can be called with these arguments, by place.

    Raises:
        UserError: it cannot; the message begins with `given`.
    """
    try:
        signature = inspect.signature(function)
    except ValueError:  # written in C: it has none
        return
    try:
        signature.bind(*arguments)
    except TypeError:
        raise UserError(
            f"{given}: must be a function of ({', '.join(arguments)}), not of {signature}"
        ) from None

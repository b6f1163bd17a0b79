"""Chat templates as Jinja programs, compiled as the transformers library compiles them.

They are run here, not by `apply_chat_template`: it copies all messages at each call, drops those
that are null, prints today's date, and changes with its version; features would change with it.
"""

import json
from datetime import datetime
from functools import cached_property
from typing import Any

from jinja2 import TemplateError, meta, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

# Templates that print the date would render another prompt on another day.
DATE = "2026-01-01"


class Program:
    """A compiled chat template.

    Args:
        source: its text.

    Raises:
        TemplateError: the text is no template.
    """

    def __init__(self, source: str) -> None:
        self._source = source
        self._template = _environment().from_string(source)
        # As a plain dict: it is copied at each call.
        self._template.globals = dict(self._template.globals)

    def __reduce__(self) -> tuple[Any, ...]:
        return Program, (self._source,)  # compiled again in another process

    @cached_property
    def arguments(self) -> set[str]:
        """Names of the variables that a caller can give a value."""
        return _arguments(_environment().parse(self._source))

    def render(self, variables: dict[str, Any]) -> str:
        """The text for `messages`, `tools`, `add_generation_prompt` and the template's own names.

        Raises:
            TemplateError: the template refuses them; other errors come from its expressions.
        """
        return self._template.render(variables)


def _environment() -> ImmutableSandboxedEnvironment:
    """What templates are written for: trimmed blocks, JSON that is not escaped, two functions."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = _fixed_date
    environment.globals["namespace"] = _Namespace
    return environment


def _arguments(tree: nodes.Template) -> set[str]:
    """Variables that are read before the template sets them, but those of its own.

    A variable that it also sets is an argument only if it asks whether there is a value.
    """
    own = {name.name for name in tree.find_all(nodes.Name) if name.ctx == "store"}
    asked = [test.node for test in tree.find_all(nodes.Test) if "defined" in test.name]
    asked += [each.node for each in tree.find_all(nodes.Filter) if each.name in ("default", "d")]
    names = {node.name for node in asked if isinstance(node, nodes.Name)}
    read = meta.find_undeclared_variables(tree)
    return {name for name in read if name not in own or name in names}


class _Generation(Extension):
    """Takes `{% generation %}` for a block without effect."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Namespace(Namespace):
    """Jinja's, without names that begin with an underscore: a template is a stranger's code."""

    def __init__(*args: Any, **values: Any) -> None:
        Namespace.__init__(*args, **values)
        for name in dict(*args[1:], **values):
            _check_name(name)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot have the name {name!r}")


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise(message: str) -> None:
    raise TemplateError(message)


def _fixed_date(form: str) -> str:
    return datetime.fromisoformat(DATE).strftime(form)

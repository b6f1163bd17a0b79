"""Chat templates as Jinja programs, compiled as the transformers library compiles them.

They are run here, not by `apply_chat_template`: it copies all messages at each call, drops those
that are null, prints today's date, and changes with its version; features would change with it.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from jinja2 import Template, TemplateError, TemplateSyntaxError, meta, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from eagle3fn.data.jinja_budget import LONGEST_SOURCE, Budget
from eagle3fn.data.jinja_calls import (
    charge_method,
    charge_operator,
    check_indent,
    is_method,
    limited_filters,
    limited_format,
)
from eagle3fn.data.jinja_tree import LimitedCode, limited

if TYPE_CHECKING:
    from eagle3fn.data.prefixes import PrefixProgram

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
        self._template = compiled(source)

    def __reduce__(self) -> tuple[Any, ...]:
        return Program, (self._source,)  # compiled again in another process

    @cached_property
    def arguments(self) -> set[str]:
        """Names of the variables that a caller can give a value."""
        return _arguments(parse(self._source))

    @cached_property
    def prefixes(self) -> "PrefixProgram":
        """Renders all beginnings of a conversation at once."""
        from eagle3fn.data.prefixes import PrefixProgram

        return PrefixProgram(self._source)

    def render(self, variables: dict[str, Any]) -> str:
        """The text for `messages`, `tools`, `add_generation_prompt` and the template's own names.

        Raises:
            TemplateLimitError: it takes too much time or memory.
            TemplateError: the template refuses them; other errors come from its expressions.
        """
        with rendering(self._template, variables) as parts:
            return "".join(parts)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's with limits, which reads what templates read most without asking whether they may."""

    code_generator_class = LimitedCode
    intercepted_binops = frozenset(["*", "**", "%"])

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.budget = Budget()
        self.charge = self.budget.charge  # the program calls these two by name
        self.text = self.budget.text
        self.filters.update(limited_filters(self.budget, self.filters))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_method(__obj):
            return super().call(__context, __obj, *args, **kwargs)
        for name in _OF_THE_PROGRAM:
            kwargs.pop(name, None)
        charge_method(__self.budget, __obj, args, kwargs)
        return __obj(*args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        charge_operator(self.budget, operator, left, right)
        return super().call_binop(context, operator, left, right)

    def call_filter(self, *args: Any, **options: Any) -> Any:
        return self.budget.checked(super().call_filter(*args, **options))  # of each of `map`

    def wrap_str_format(self, value: Any) -> Any:
        found = super().wrap_str_format(value)
        return found and limited_format(self.budget, found, value.__self__)

    def getattr(self, obj: Any, attribute: str) -> Any:
        kind = type(obj)
        if kind is dict and attribute not in _OF_DICTS:
            return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
        if kind in _HARMLESS and attribute[:1] != "_" and attribute not in _FORMATS:
            found = getattr(obj, attribute, _ABSENT)
            if found is not _ABSENT:
                return found
        return super().getattr(obj, attribute)


_ABSENT = object()
_OF_THE_PROGRAM = ("_loop_vars", "_block_vars")  # what compiled templates give to a call
_OF_DICTS = frozenset(dir(dict))
_FORMATS = ("format", "format_map")  # of strings: they read attributes of what they are given


def _environment() -> _Sandbox:
    """What templates are written for: trimmed blocks, JSON that is not escaped, two functions."""
    environment = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = partial(_to_json, environment.budget)
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = _fixed_date
    environment.globals["namespace"] = _Namespace
    del environment.globals["lipsum"]  # random words
    return environment


def parse(source: str) -> nodes.Template:
    """A template as a tree.

    Raises:
        TemplateError: the text is no template; other errors are Python's, of numbers that are too
            long and of expressions that are too deep.
    """
    if len(source) > LONGEST_SOURCE:
        raise TemplateSyntaxError(f"longer than {LONGEST_SOURCE} characters", 1)
    return _environment().parse(source)


def compiled(source: str | nodes.Template) -> Template:
    """A template as a program.

    Raises:
        TemplateError, or another error: as `parse`.
    """
    tree = parse(source) if isinstance(source, str) else source
    template = _environment().from_string(limited(tree))
    # As a plain dict: it is copied at each call.
    template.globals = dict(template.globals)
    return template


@contextmanager
def rendering(template: Template, variables: dict[str, Any]) -> Iterator[Iterator[str]]:
    """The pieces of text that a template writes, to be taken within the block.

    Raises:
        TemplateError: as `Program.render`.
    """
    budget: Budget = template.environment.budget  # pyright: ignore[reportAttributeAccessIssue]
    budget.start(variables)
    with budget.timed():
        yield template.root_render_func(template.new_context(variables))


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


# All that they have may be read, but names that begin with an underscore.
_HARMLESS = (str, _Namespace, LoopContext)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot have the name {name!r}")


def _to_json(
    budget: Budget,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    if indent is None and separators is None:
        return encoder.encode(value)
    check_indent(indent)
    return "".join(map(budget.text, encoder.iterencode(value)))


def _raise(message: str) -> None:
    raise TemplateError(message)


def _fixed_date(form: str) -> str:
    return datetime.fromisoformat(DATE).strftime(form)

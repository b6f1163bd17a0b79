"""How a command is described: its options in groups, and the parser made of all commands.

A command is one entry of a table, an option is defined once. The help, its groups and defaults, the
line of usage, the shells' completion and the pages on the command line are made from these.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from itertools import takewhile
from types import MappingProxyType
from typing import Any, NamedTuple, NoReturn

from eagle3fn.base.output import Result, print_error

GROUPS = (
    "input",
    "output",
    "target",
    "reading conversations",
    "draft",
    "training",
    "answers",
    "features",
    "serving engine",
    "running server",
    "speed",
    "other",
)
"""Titles of the groups of options, in the order of every command's help."""

STAGES = ("data", "training", "checking", "drafts", "this program")
"""Titles of the groups of commands, in the order of work."""


class Option(NamedTuple):
    """One option of a command."""

    flag: str

    group: str
    """One of `GROUPS`."""

    about: str
    """What it is, without its default."""

    metavar: str | None = None
    """What stands for its value in the help; None for a flag and for `choices`."""

    arguments: Mapping[str, Any] = MappingProxyType({})
    """Other arguments of `ArgumentParser.add_argument`."""

    default_text: str = ""
    """What holds where it is not given and has no `default`."""

    def changed(self, about: str = "", **changes: Any) -> "Option":
        """The same option with another description or other arguments, for one command."""
        default_text = changes.pop("default_text", self.default_text)
        arguments = {**self.arguments, **changes}
        return self._replace(
            about=about or self.about, arguments=arguments, default_text=default_text
        )

    @property
    def required(self) -> bool:
        """Whether the command cannot do without it."""
        return self.arguments.get("required", False)

    @property
    def usage(self) -> str:
        """The option as a line of usage has it."""
        value = self.metavar or "|".join(self.arguments.get("choices", ()))
        many = " …" if self.arguments.get("nargs") == "+" else ""
        return f"{self.flag} {value}{many}".rstrip()


def option(
    flag: str,
    group: str,
    metavar: str | None,
    about: str,
    *,
    default_text: str = "",
    **arguments: Any,
) -> Option:
    """An option; `arguments`: other arguments of `ArgumentParser.add_argument`."""
    return Option(flag, group, about, metavar, arguments, default_text)


class OneOf(NamedTuple):
    """Options of one group of which a command takes one at most, or exactly one."""

    options: tuple[Option, ...]
    required: bool = True

    @property
    def group(self) -> str:
        """The title that all of them stand under."""
        return self.options[0].group

    @property
    def usage(self) -> str:
        """The options as a line of usage has them."""
        return f"({' | '.join(one.usage for one in self.options)})"


class Command(NamedTuple):
    """One sub-command."""

    name: str

    stage: str
    """One of `STAGES`."""

    run: Callable[[Any], Result | None]
    """Takes the parsed options. None: the result is another process's to print."""

    about: str
    """What it does, in one line."""

    example: str
    """Its arguments in a call that works; the first word after `eagle3fn` is left out."""

    options: tuple[Option | OneOf, ...]

    arguments: tuple[dict[str, Any], ...] = ()
    """Arguments without a flag, as `ArgumentParser.add_argument` takes them."""

    goes_on: bool = False
    """Whether a call goes on where one before it was stopped."""


JSON = option(
    "--json",
    "other",
    None,
    "end with the result as one line of JSON on stdout, an error as one on stderr; all other "
    "lines go to stderr",
    action="store_true",
)

_HELP = option("--help", "other", None, "show this and end", action="help")


# The parser


class Parser(argparse.ArgumentParser):
    """A parser that answers a mistake with its own usage and the nearest name."""

    as_json = False
    """Whether the arguments ask for JSON, so that a mistake is answered so too."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's; a name that is none of this parser's is an error here, before others."""
        words: list[str] = list(args or ())
        self.as_json = JSON.flag in words
        self.check_names(words)
        found, unknown = super().parse_known_args(words, namespace)
        if unknown:
            self.error(f"{unknown[0]!r} belongs to no option")
        return found, unknown

    def check_names(self, words: list[str]) -> None:
        """Refuse an option that this parser does not have, with the nearest that it has."""
        for word in words:
            name = word.partition("=")[0]
            is_option = name.startswith("--") and len(name) > 2 and " " not in word
            if is_option and name not in self._option_string_actions:
                near = nearest(name, self._option_string_actions)
                self.error(f"unknown option {name}{near}")

    def error(self, message: str) -> NoReturn:
        """Print the usage and one line, and end with exit code 2."""
        if not self.as_json:
            self.print_usage(sys.stderr)
        mark = "" if message.endswith("?") else ";"
        line = f"{self.prog}: {message}{mark} {self.prog} --help lists all"
        print_error(line, 2, self.as_json)
        raise SystemExit(2)


def nearest(word: str, names: Iterable[str]) -> str:
    """A question for the nearest of some names; "" if none is near.

    >>> nearest("--limt", ["--limit", "--seed"]), nearest("--x", ["--limit"])
    ('; did you mean --limit?', '')
    """
    found = get_close_matches(word, list(names), n=1)
    return f"; did you mean {found[0]}?" if found else ""


class RootParser(Parser):
    """The parser of all commands; its help lists them in the order of work."""

    commands: tuple[Command, ...] = ()

    def check_names(self, words: list[str]) -> None:
        """Refuse an unknown command, or an unknown option before the command."""
        names = [command.name for command in self.commands]
        before = list(takewhile(lambda word: word.startswith("-"), words))
        super().check_names(before)
        word = next(iter(words[len(before) :]), names[0])
        if word not in names:
            self.error(f"unknown command {word!r}{nearest(word, names)}")

    def format_help(self) -> str:
        """The usage, what the program does, the commands of each stage, how to go on."""
        width = max(len(command.name) for command in self.commands)
        lines = [f"usage: {self.usage}", "", self.description or ""]
        for stage in STAGES:
            lines += ["", f"{stage}:"]
            for command in self.commands:
                if command.stage == stage:
                    lines.append(f"  {command.name:<{width}}  {command.about}")
        lines += ["", self.epilog or "", ""]
        return "\n".join(lines)


def parsers_of(root: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parser of each sub-command, by its name."""
    (found,) = (each for each in root._actions if isinstance(each, argparse._SubParsersAction))
    return dict(found.choices)


def add_command(subcommands: Any, command: Command) -> Parser:
    """Add a command's parser, its options in the groups' order."""
    options = (*command.options, JSON, _HELP)
    sub = subcommands.add_parser(
        command.name,
        help=command.about,
        description=f"{command.about[0].upper()}{command.about[1:]}.",
        epilog=f"example:\n  eagle3fn {command.name} {command.example}",
        usage=_usage(command),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    sub.set_defaults(run=command.run, goes_on=command.goes_on)

    for argument in command.arguments:
        given = dict(argument)
        sub.add_argument(given.pop("name"), **given)
    for title in GROUPS:
        in_group = [one for one in options if one.group == title]
        if not in_group:
            continue
        group = sub.add_argument_group(title)
        for one in in_group:
            _add(group, one)
    return sub


def _add(group: Any, one: Option | OneOf) -> None:
    """Add an option, or those of which one is taken."""
    if isinstance(one, OneOf):
        exclusive = group.add_mutually_exclusive_group(required=one.required)
        for each in one.options:
            _add(exclusive, each)
        return

    flags = ("-h", one.flag) if one is _HELP else (one.flag,)
    named = {} if one.metavar is None else {"metavar": one.metavar}
    group.add_argument(*flags, help=help_of(one), **named, **one.arguments)


def help_of(one: Option) -> str:
    """An option's description with its default, as argparse takes it.

    >>> help_of(option("--seed", "answers", "N", "of what is drawn", type=int, default=0))
    'of what is drawn (default: 0)'
    """
    default = one.arguments.get("default")
    default_text = one.default_text
    if not default_text and default not in (None, []):
        default_text = str(default)
    text = f"{one.about} (default: {default_text})" if default_text else one.about
    return text.replace("%", "%%")


def _usage(command: Command) -> str:
    """One line of usage: what the command needs."""
    words = ["|".join(argument["choices"]) for argument in command.arguments]
    words += [one.usage for one in command.options if one.required]
    return " ".join(["eagle3fn", command.name, *words, "[options]"]).replace("%", "%%")

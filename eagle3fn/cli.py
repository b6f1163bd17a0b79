"""`eagle3fn COMMAND`: the command line, of the tables and functions in `commands`."""

import sys
from typing import Any

from eagle3fn.base.output import json_line, only_the_result
from eagle3fn.base.program import called_as, exit_code
from eagle3fn.commands.data_grammar import DATA_COMMANDS
from eagle3fn.commands.draft_grammar import CHECKING_COMMANDS, DRAFT_COMMANDS
from eagle3fn.commands.grammar import Parser, RootParser, add_command
from eagle3fn.commands.itself import COMPLETION, add_version, show_version
from eagle3fn.commands.shared import check_places
from eagle3fn.commands.training_grammar import TRAINING_COMMANDS

COMMANDS = (
    *DATA_COMMANDS,
    *TRAINING_COMMANDS,
    *CHECKING_COMMANDS,
    *DRAFT_COMMANDS,
    COMPLETION,
)
"""All sub-commands, in the order of work."""

_ABOUT = (
    "Trains EAGLE-3 drafts: from conversations and a target to a draft that serving engines load."
)
_MORE = "eagle3fn COMMAND --help says more of one, with an example."


def main(arguments: list[str] | None = None) -> int:
    """Run a sub-command; returns its exit code, or 2 for bad input, with one line on stderr."""
    if arguments is None:
        arguments = sys.argv[1:]
    root = parser()
    if not arguments:
        root.print_help()
        return 0
    options = root.parse_args(arguments)
    if options.version:
        return exit_code("eagle3fn", lambda: show_version(options.version_as_json))
    if options.command is None:
        root.error("name a command")
    if options.version_as_json:
        root.error("--json stands after the command")

    options.arguments = arguments
    options.parser = root
    again = "nothing is half written; begin again with"
    if options.goes_on:
        again = "what is finished is kept; go on with"
    again += f" {called_as(arguments)}"
    return exit_code(f"eagle3fn {options.command}", lambda: _run(options), again, options.json)


def _run(options: Any) -> int:
    """Do what a sub-command does; no output of it is one of its inputs."""
    check_places(options)
    with only_the_result(options.json) as stream:
        result = options.run(options)
    if result is None:
        return 0
    if options.json and result.values is not None:
        print(json_line(result.values), file=stream)
    return result.exit_code


def parser() -> Parser:
    """The command line's grammar."""
    root = RootParser(
        prog="eagle3fn",
        usage="eagle3fn COMMAND [options]",
        description=_ABOUT,
        epilog=_MORE,
        allow_abbrev=False,
    )
    root.commands = COMMANDS
    add_version(root)
    subcommands = root.add_subparsers(
        dest="command", metavar="COMMAND", prog="eagle3fn", parser_class=Parser
    )
    for command in COMMANDS:
        add_command(subcommands, command)
    return root


if __name__ == "__main__":
    sys.exit(main())

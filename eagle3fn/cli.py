"""`eagle3fn COMMAND`: the command line, of the grammars and functions in `commands`."""

import argparse
import sys
from collections.abc import Callable
from typing import Any

from eagle3fn.base.program import called_as, exit_code
from eagle3fn.commands.data_grammar import add_data_commands
from eagle3fn.commands.draft_grammar import add_checking_commands, add_draft_commands
from eagle3fn.commands.shared import check_places
from eagle3fn.commands.training_grammar import add_training_commands


def main(arguments: list[str] | None = None) -> int:
    """Run a sub-command; returns its exit code, or 2 for bad input, with one line on stderr."""
    if arguments is None:
        arguments = sys.argv[1:]
    options = parser().parse_args(arguments)
    options.arguments = arguments
    again = "nothing is half written; begin again with"
    if options.command in GO_ON:
        again = "what is finished is kept; go on with"
    again += f" {called_as(arguments)}"
    return exit_code(f"eagle3fn {options.command}", lambda: _run(options), again)


def _run(options: Any) -> int | None:
    """Do what a sub-command does; no output of it is one of its inputs."""
    check_places(options)
    return options.run(options)


GO_ON = ("synthesize", "regenerate", "extract", "train")
"""Commands that go on where they were stopped."""


# The grammar

_ABOUT = (
    "Trains EAGLE-3 drafts: from conversations and a target to a draft that serving engines load. "
    "README.md and docs/data.md show the commands in order."
)


def parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    root = argparse.ArgumentParser(prog="eagle3fn", description=_ABOUT, allow_abbrev=False)
    subcommands = root.add_subparsers(dest="command", required=True)

    def command(name: str, run: Callable[[Any], int | None], about: str) -> argparse.ArgumentParser:
        sub = subcommands.add_parser(name, help=about, description=about, allow_abbrev=False)
        sub.set_defaults(run=run)
        return sub

    add_data_commands(command)
    add_training_commands(command)
    add_checking_commands(command)
    add_draft_commands(command)
    return root


if __name__ == "__main__":
    sys.exit(main())

"""What several commands share: a line to print, options as values, template and draft."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eagle3fn.base.draft_config import DraftConfig
    from eagle3fn.data.template import ChatTemplate


MAX_LENGTH = 2048
"""Tokens kept of a sample, where nobody says how many and the target takes as many."""

_OUTPUTS = ("out", "plain", "keep")
_INPUTS = (
    "conversations",
    "online",
    "prompts",
    "system",
    "exclude",
    "features",
    "vocab",
    "draft",
    "untrained",
    "config",
    "draft_config",
    "converter",
)
_JSON_VALUES = {"True": "true", "False": "false", "None": "null"}


def check_places(options: Any) -> None:
    """Refuse a command's outputs that are among what it reads, or are each other.

    Raises:
        UserError: as `base.places.check_apart`; an option is an empty text.
    """
    from eagle3fn.base.errors import UserError
    from eagle3fn.base.places import check_apart

    # It would be taken for an option that is not given.
    for name, given in vars(options).items():
        if name != "arguments" and "" in (given if isinstance(given, list) else [given]):
            raise UserError(f"{_flag(options, name)}: is empty; name one, or leave it out")

    check_apart(
        _given_paths(options, _OUTPUTS),
        _given_paths(options, _INPUTS),
        getattr(options, "target", None),
    )


def _flag(options: Any, name: str) -> str:
    """The option whose value has this name, as the user types it."""
    from eagle3fn.commands.grammar import parsers_of

    for action in parsers_of(options.parser)[options.command]._actions:
        if action.dest == name and action.option_strings:
            return action.option_strings[-1]
    return f"--{name.replace('_', '-')}"


def _given_paths(options: Any, names: tuple[str, ...]) -> dict[str, str]:
    """The paths that are given under these names, by option; of several, the others numbered."""
    found = {}
    for name in names:
        option = _flag(options, name)
        given = getattr(options, name, None)
        paths = given if isinstance(given, list) else [given]
        for number, path in enumerate(paths, 1):
            if path:
                found[option if number == 1 else f"{option} number {number}"] = path
    return found


def say(line: str | None) -> None:
    """Print a line, if there is one, before the first progress bar."""
    if line:
        print(line, flush=True)


def named_values(texts: list[str], option: str, example: str) -> dict[str, Any]:
    """`NAME=VALUE` of an option that is given once a name: JSON values, else texts.

    Raises:
        UserError: no NAME=VALUE, or a name that is given twice.
    """
    from eagle3fn.base.errors import UserError, printable
    from eagle3fn.base.read import parse_json

    values = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not name or not equals:
            raise UserError(f"{option} {printable(text)}: must be NAME=VALUE, such as {example}")
        if name in values:
            raise UserError(f"{option}: {printable(name)} is given twice; delete one of them")
        try:
            values[name] = parse_json(_JSON_VALUES.get(value) or value)
        except ValueError:
            values[name] = value
    return values


def template_arguments(options: Any) -> dict[str, Any]:
    """The chat template's arguments: JSON values, else texts."""
    from eagle3fn.data.turns import check_given

    arguments = named_values(options.template_arg, "--template-arg", "enable_thinking=false")
    check_given(arguments, "--template-arg")
    return arguments


def chat_template(options: Any, tokenizer: Any) -> "ChatTemplate":
    """The target's chat template, with the options' arguments."""
    from eagle3fn.data.target import stop_ids
    from eagle3fn.data.template import ChatTemplate

    stops = stop_ids(options.target, tokenizer)
    return ChatTemplate(tokenizer, stops, template_arguments(options))


def draft_shape(options: Any, tree: dict[str, Any], size: int | None = None) -> "DraftConfig":
    """The draft's shape: from `--draft-config`, or derived from the target's configuration."""
    from eagle3fn.base.draft_json import draft_config_from_json
    from eagle3fn.base.draft_keys import draft_config_from_target

    if options.draft_config is not None:
        return draft_config_from_json(options.draft_config)
    return draft_config_from_target(tree, options.target, size)


def choose_max_length(
    options: Any, positions: int | None, room: int = 0, main: bool = True
) -> None:
    """Set `--max-length` where it is not given, and say so if the target's limit is the reason.

    Args:
        options: the command's; `max_length` is set.
        positions: the target's limit; None: not known.
        room: tokens that an engine needs after a sample.
        main: whether this process prints.

    Raises:
        UserError: one that is given is larger than the limit.
    """
    from eagle3fn.data.sources import check_max_length

    if options.max_length is not None:
        check_max_length(options.max_length, positions)
        return
    options.max_length = MAX_LENGTH
    if positions is not None and positions - room < MAX_LENGTH:
        options.max_length = positions - room
        if main:
            say(f"--max-length is {options.max_length}: the target takes {positions} tokens")


def given_options(options: Any, names: tuple[str, ...]) -> list[str]:
    """Those of an option's names that are among a command's arguments."""
    words = {word.partition("=")[0] for word in options.arguments}
    return [name for name in names if name in words]

"""Configurations as TOML, read and written, and the overrides of a command line."""

import json
import re
import tomllib
from pathlib import Path
from typing import Any

from eagle3fn.base.errors import UserError, printable, shown
from eagle3fn.base.read import DEEPEST, check_depth, read_text

_LIMIT = 2**18  # bytes of a configuration: the parser takes quadratic time for some texts
_BETWEEN_KEYS = re.compile(r"[,=\[\]{}\n]")
# Texts and comments. An end that is missing is the end of the line, or of the file: so nothing is
# read twice.
_NO_KEYS = re.compile(
    r"""
    \"{3} (?: \\.? | [^\\] )*? (?: \"{3,5} | \Z )
    | '{3} .*? (?: '{3,5} | \Z )
    | \" (?: \\[^\n] | [^\"\\\n] )* \"?
    | ' [^'\n]* '?
    | \# [^\n]*
    """,
    re.VERBOSE | re.DOTALL,
)


def read_toml(path: str | Path) -> dict:
    """The nested dicts of a TOML file.

    Raises:
        UserError: the file is missing, no regular file, too large, or not TOML of numbers, texts,
            lists and tables; one line names it.
    """
    text = read_text(path, _LIMIT)
    try:
        return _parse(text)
    except ValueError as error:
        reason = printable(error, 200)
        raise UserError(f"{path}: not TOML ({reason}); mend it, or name another") from None


def _parse(text: str) -> dict[str, Any]:
    """The tables of a text.

    Raises:
        ValueError: it is not TOML, or holds what no configuration needs.
    """
    # A key of many parts takes quadratic time: it is refused unread.
    parts = _BETWEEN_KEYS.split(_NO_KEYS.sub("_", text))
    if any(part.count(".") >= DEEPEST for part in parts):
        raise ValueError(f"a key of more than {DEEPEST} parts")
    try:
        tree = tomllib.loads(text)
    except RecursionError:
        raise ValueError(f"nested more than {DEEPEST} deep") from None
    except tomllib.TOMLDecodeError:
        raise
    except ValueError:
        raise ValueError("a whole number of too many digits") from None
    check_depth(tree)
    _check_values(tree)
    return tree


def _check_values(tree: Any) -> None:
    """Refuse whole numbers that TOML has not, and dates."""
    if isinstance(tree, (dict, list)):
        for value in tree.values() if isinstance(tree, dict) else tree:
            _check_values(value)
    elif isinstance(tree, int) and not -(2**63) <= tree < 2**63:
        raise ValueError("a whole number beyond 64 bits")
    elif not isinstance(tree, (int, float, str)):
        raise ValueError(f"{tree}: a date or time, which no setting is")


def override(tree: dict, text: str) -> None:
    """Set one value of nested dicts, in place, from `section.key=value`.

    The value is read as TOML, or taken as a string where it is none: `train.device=cuda` and
    `train.device="cuda"` are the same.

    Raises:
        UserError: no section and key, a key of too many parts, the tree holds a value where the
            section should be, or a text that is not UTF-8.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"override {text!r}: is not UTF-8; write it so") from None
    name, equals, value = text.partition("=")
    *sections, key = name.strip().split(".")
    if not equals or not sections:
        raise UserError(
            f"override {text!r}: must read section.key=value, as in objective.ttt_length=5"
        )
    if len(sections) >= DEEPEST:
        raise UserError(
            f"override {shown(text)}: a key of more than {DEEPEST} parts; name a setting"
        )

    # Go down to the section, which is made if it is not there.
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise UserError(f"override {text!r}: {section} is a value, not a section")

    # What is no value in TOML, or more than one, is a text.
    value = value.strip()
    try:
        found = _parse(f"value = {value}")
    except ValueError:
        found = {}
    tree[key] = found["value"] if found.keys() == {"value"} else value


def as_override(name: str, value: Any) -> str:
    """What a user writes after `--set` to give a setting this value.

    >>> as_override("objective.kl_scale", 1.0), as_override("optimizer.matrices", "all")
    ('objective.kl_scale=1.0', 'optimizer.matrices=all')
    >>> print(as_override("optimizer.decay_roles", ("norm", "bias")))
    'optimizer.decay_roles=["norm", "bias"]'
    """
    if isinstance(value, str):
        return f"{name}={value}"
    text = f"{name}={_toml_value(value)}"
    return text if '"' not in text else f"'{text}'"


def to_toml(tree: dict[str, dict[str, Any]]) -> str:
    """A resolved configuration's dicts as TOML that `load_config` reads back to an equal value."""
    sections = []
    for section, values in tree.items():
        lines = [f"[{section}]"]
        lines += [f"{key} = {_toml_value(value)}" for key, value in values.items()]
        sections.append("\n".join(lines))
    return "\n\n".join(sections) + "\n"


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    if isinstance(value, dict):
        # An inline table. TOML has no null: a key without a value is left out.
        pairs = [
            f"{_quoted(key)} = {_toml_value(item)}"
            for key, item in value.items()
            if item is not None
        ]
        return "{" + ", ".join(pairs) + "}"
    if isinstance(value, str):
        return _quoted(value)
    if isinstance(value, (int, float)):
        return repr(value)
    raise UserError(f"{value!r}: TOML has no such value; leave it out of the configuration")


def _quoted(text: str) -> str:
    """A basic string. JSON's escapes are TOML's too, which has one more character to escape."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")

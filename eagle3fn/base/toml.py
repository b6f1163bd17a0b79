"""Configurations as TOML, read and written, and the overrides of a command line."""

import json
import tomllib
from pathlib import Path
from typing import Any

from eagle3fn.base.errors import UserError


def read_toml(path: str | Path) -> dict:
    """The nested dicts of a TOML file.

    Raises:
        UserError: the file is missing, or is not TOML.
    """
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; name a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not TOML ({error})") from None


def override(tree: dict, text: str) -> None:
    """Set one value of nested dicts, in place, from `section.key=value`.

    The value is read as TOML, or taken as a string where it is none: `train.device=cuda` and
    `train.device="cuda"` are the same.

    Raises:
        UserError: no section and key, or the tree holds a value where the section should be.
    """
    name, equals, value = text.partition("=")
    *sections, key = name.strip().split(".")
    if not equals or not sections:
        raise UserError(
            f"override {text!r}: must read section.key=value, as in objective.ttt_length=5"
        )

    # Go down to the section, which is made if it is not there.
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise UserError(f"override {text!r}: {section} is a value, not a section")

    try:
        tree[key] = tomllib.loads(f"value = {value.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        tree[key] = value.strip()


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
    return repr(value)


def _quoted(text: str) -> str:
    """A basic string. JSON's escapes are TOML's too."""
    return json.dumps(text, ensure_ascii=False)

"""Configurations as TOML, read and written, and the overrides of a command line."""

import tomllib
from pathlib import Path
from typing import Any

from eagle3fn.base.errors import UserError


def read_toml(path: str | Path) -> dict:
    """The nested dicts of a TOML file.

    Raises:
        UserError: there is none, or it is not TOML.
    """
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; name a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not TOML ({error})") from None


def override(tree: dict, text: str) -> None:
    """Set what `section.key=value` says, its value in TOML, or as a text.

    Raises:
        UserError: it says no section and key, or a value stands where the section should.
    """
    name, equals, value = text.partition("=")
    *sections, key = name.strip().split(".")
    if not equals or not sections:
        raise UserError(
            f"override {text!r}: must read section.key=value, as in objective.ttt_length=5"
        )
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
        lines = [f"{key} = {_toml_value(value)}" for key, value in values.items()]
        sections.append("\n".join([f"[{section}]", *lines]))
    return "\n\n".join(sections) + "\n"


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    if isinstance(value, dict):
        return (
            "{"
            + ", ".join(f'"{k}" = {_toml_value(v)}' for k, v in value.items() if v is not None)
            + "}"
        )
    return f'"{value}"' if isinstance(value, str) else repr(value)

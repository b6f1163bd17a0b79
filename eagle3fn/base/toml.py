"""A configuration as TOML."""

from typing import Any

from eagle3fn.base.config import Config, to_dict


def to_toml(config: Config) -> str:
    """The resolved configuration as TOML that `load_config` reads back to an equal value."""
    sections = []
    for section, values in to_dict(config).items():
        lines = [f"{key} = {_toml_value(value)}" for key, value in values.items()]
        sections.append("\n".join([f"[{section}]", *lines]))
    return "\n\n".join(sections) + "\n"


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f'"{k}" = {_toml_value(v)}' for k, v in value.items() if v is not None) + "}"
    return f'"{value}"' if isinstance(value, str) else repr(value)

"""Configuration: its sections together, read from TOML with dotted overrides.

Unknown keys are refused.
"""

import types
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from eagle3fn.base.draft_config import DraftConfig
from eagle3fn.base.errors import UserError, printable, shown
from eagle3fn.base.sections import (
    DataConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TrainConfig,
    require,
)
from eagle3fn.base.toml import as_override, override, read_toml


@dataclass(frozen=True)
class Config:
    """Everything a run depends on but its data."""

    draft: DraftConfig
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        """Refuse sections that don't go together."""
        require(
            self.train.reduce == "sum" or self.optimizer.accumulation == "fp32",
            "train.reduce",
            self.train.reduce,
            "'sum' with optimizer.accumulation = 'params', whose sums in the parameters' dtype "
            "differ from the ranks' in fp32",
        )
        window = self.draft.draft_window
        require(
            window is None or window >= self.objective.ttt_length,
            "draft.draft_window",
            window,
            f"at least objective.ttt_length = {self.objective.ttt_length}: a row attends to its "
            "own keys of every unroll step",
        )
        require(
            not self.train.patience or self.data.held_out > 0,
            "train.patience",
            self.train.patience,
            "0 where no samples are held out, by whose accepted length a run would end; set "
            "data.held_out above 0",
        )


def load_config(
    path: str | Path | None,
    overrides: list[str],
    draft: DraftConfig | None = None,
    defaults: dict[str, dict[str, Any]] | None = None,
) -> Config:
    """Read a TOML file (or none), apply `section.key=value` overrides, and check every key and
    type.

    `draft` fills the draft section and `defaults` the others, where neither the file nor an
    override names a key.

    Raises:
        UserError: unreadable file, unknown key, wrong type, value out of range, no draft section.
    """
    tree = {} if path is None else read_toml(path)
    for text in overrides:
        override(tree, text)
    if draft is not None:
        defaults = {**(defaults or {}), "draft": to_dict(draft)}

    for section, values in (defaults or {}).items():
        given = tree.get(section, {})
        if not isinstance(given, dict):
            raise UserError(f"{path}: {section} = {shown(given)}: must be a section, [{section}]")
        tree[section] = {**values, **given}

    if "draft" not in tree:
        raise UserError(
            "no [draft] section; add one, or name a target or a draft configuration to take it from"
        )
    return from_dict(Config, tree, str(path or "overrides"))


def from_dict(kind: Any, tree: dict, where: str, prefix: str = "") -> Any:
    """Build a frozen dataclass from nested dicts.

    Every key must be a field and every value of its type.

    Raises:
        UserError: names the dotted key, the file and what would be right.
    """
    hints = get_type_hints(kind)
    unknown = sorted(set(tree) - set(hints))
    if unknown:
        known = ", ".join(prefix + name for name in hints)
        key = prefix + printable(unknown[0])
        near = get_close_matches(unknown[0], list(hints), n=1)
        meant = f"; did you mean {prefix}{near[0]}?" if near else ""
        raise UserError(f"{where}: unknown key {key}{meant or ';'} known: {known}")

    values = {}
    for key, value in tree.items():
        values[key] = _convert(hints[key], value, where, prefix + key)

    # A field without a default must be given.
    for field_ in fields(kind):
        required = field_.default is MISSING and field_.default_factory is MISSING
        if required and field_.name not in values:
            raise UserError(f"{where}: {prefix}{field_.name} is missing")

    try:
        return kind(**values)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _convert(hint: Any, value: Any, where: str, name: str) -> Any:
    """The value as its field's type, or a UserError; choices are checked by their section."""
    origin = get_origin(hint)
    options = get_args(hint)

    # Nested: a section, one of several types, a tuple, a table.
    if is_dataclass(hint) and isinstance(value, dict):
        return from_dict(hint, value, where, name + ".")
    if origin is types.UnionType:
        return _convert_one_of(options, value, where, name)
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_convert(options[0], item, where, name) for item in value)
    if origin is Mapping and isinstance(value, dict):
        kind = options[1]
        return {key: _convert(kind, item, where, f"{name}.{key}") for key, item in value.items()}

    # Simple values; a whole number may be given for a float.
    if origin is Literal:
        return value
    if origin is dict and isinstance(value, dict):
        return value
    if hint is float and type(value) is int and abs(value) < 2**1023:
        return float(value)
    if isinstance(hint, type) and type(value) is hint:
        return value
    kind = getattr(hint, "__name__", hint)
    if origin is tuple:
        choices = get_args(options[0]) or (1,)
        example = value if value in choices else choices[0]
        kind = f"a list, such as {as_override(name, [example])}"
    raise UserError(f"{where}: {name} = {shown(value)}: must be {kind}")


def _convert_one_of(options: tuple[Any, ...], value: Any, where: str, name: str) -> Any:
    """A table as the table among the types, None as None, anything else as the first type."""
    if isinstance(value, dict):
        tables = [option for option in options if get_origin(option) in (Mapping, dict)]
        return _convert((tables or options)[0], value, where, name)
    if value is None and types.NoneType in options:
        return None
    if any(get_origin(option) is Mapping for option in options) and type(value) is not options[0]:
        kind = options[0].__name__
        raise UserError(f"{where}: {name} = {shown(value)}: must be {kind}, or a table")
    return _convert(options[0], value, where, name)


def to_dict(config: Any) -> dict:
    """Nested plain dicts of a config; None values are left out (TOML has none)."""
    tree = {}
    for field_ in fields(config):
        value = getattr(config, field_.name)
        if is_dataclass(value):
            tree[field_.name] = to_dict(value)
        elif value is not None:
            tree[field_.name] = value
    return tree


def with_steps(config: Config, steps: int) -> Config:
    """The same configuration with the number of optimizer steps filled in."""
    return replace(config, train=replace(config.train, steps=steps))

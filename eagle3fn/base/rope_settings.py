"""RoPE's settings in a configuration: where they are read, what is refused, and what is written."""

from collections.abc import Callable
from typing import Any

from eagle3fn.base.errors import UserError, printable, shown

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "mrope")
_PLAIN_TYPES = ("default", "mrope")  # text has one position a token: mrope rotates as the default

_NUMBERS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}
"""The numbers above 0 that a variant needs."""

_LARGEST = 1e18  # beyond it products of settings are no finite numbers

_NOT_TRAINED = ("partial_rotary_factor", "mrope_section", "mrope_interleaved")
"""A target's settings that the draft's layer does not follow: it rotates every dimension."""


def rope_of(tree: dict[str, Any]) -> dict[str, Any]:
    """RoPE's settings of a configuration: newer ones have `rope_parameters`.

    Some have one set for each kind of layer; the draft's layer attends to everything.

    Raises:
        UserError: they are not an object.
    """
    rope = tree.get("rope_parameters")
    if isinstance(rope, dict):
        rope = rope.get("full_attention", rope)
    if rope is not None and not isinstance(rope, dict):
        raise UserError(f"rope_parameters = {shown(rope)}: must be an object")
    return rope or {}


def scaling_of(tree: dict[str, Any]) -> dict[str, Any] | None:
    """The variant and its numbers, None for the default one."""
    rope = rope_of(tree)
    scaled = rope.get("rope_type", "default") != "default"
    scaling = tree.get("rope_scaling")
    if scaling is not None and scaling != {}:
        return scaling
    return rope if scaled else None


def theta_of(tree: dict[str, Any]) -> float:
    """The base of the frequencies, 10,000 where none is given.

    Raises:
        UserError: it is no number, or another one in `rope_parameters`.
    """
    given = [where["rope_theta"] for where in (tree, rope_of(tree)) if "rope_theta" in where]
    given = [value for value in given if value is not None]
    for value in given:
        if not _is_positive(value):
            raise UserError(f"rope_theta = {shown(value)}: must be a number above 0")
    if len(set(given)) > 1:
        raise UserError(
            f"rope_theta = {given[0]!r}, and {given[1]!r} in rope_parameters: must be the same; "
            "mend the one that is wrong"
        )
    return float(given[0]) if given else 10_000.0


def type_of(scaling: Any) -> str:
    """The variant's name, "default" without scaling."""
    scaling = scaling if isinstance(scaling, dict) else {}
    return scaling.get("rope_type", scaling.get("type", "default"))


def check_scaling(scaling: Any, theta: float, size: int) -> None:
    """Refuse a variant that is not computed here, or values that it cannot be computed with.

    Args:
        scaling: as a configuration has it.
        theta: the base of the frequencies.
        size: of a head, E.

    Raises:
        UserError: names the setting.
    """
    scaling = {} if scaling is None else scaling
    kind = type_of(scaling)
    if not isinstance(scaling, dict) or kind not in ROPE_TYPES:
        raise UserError(
            f"draft.rope_scaling = {shown(scaling)}: its rope_type must be one of "
            f"{', '.join(ROPE_TYPES)}"
        )
    if kind not in _PLAIN_TYPES and scaling.get("type", kind) != kind:
        raise _wrong("type", scaling["type"], f"must be rope_type's {kind!r}, or left out")
    for name, value in scaling.items():
        needed = name in _NUMBERS.get(kind, ())
        good, words = _VALUES.get(name, (_is_plain, "a number, a text or a list of numbers"))
        if (value is not None or needed) and not good(value):
            raise _wrong(name, value, f"must be {words}")
    for name in _NUMBERS.get(kind, ()):
        if scaling.get(name) is None:
            raise _wrong(name, None, f"{kind} needs a finite number above 0")

    # What some variants divide by.
    if kind == "yarn" and theta <= 1:
        raise UserError(f"draft.rope_theta = {theta!r}: must be above 1 for yarn")
    if kind == "dynamic" and size <= 2:
        raise UserError(f"draft.head_dim = {size}: must be above 2 for dynamic RoPE")


def _wrong(name: str, value: Any, words: str) -> UserError:
    return UserError(f"draft.rope_scaling.{printable(name)} = {shown(value)}: {words}")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < _LARGEST


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0


def _is_plain(value: Any) -> bool:
    """Whether a value can be kept in TOML."""
    if isinstance(value, list):
        return all(map(_is_number, value))
    return isinstance(value, (str, bool)) or _is_number(value)


_POSITIVE = (_is_positive, "a finite number above 0")
_AT_LEAST_0 = (lambda value: _is_number(value) and value >= 0, "a finite number, at least 0")
_VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "factor": _POSITIVE,
    "low_freq_factor": _POSITIVE,
    "high_freq_factor": _POSITIVE,
    "original_max_position_embeddings": _POSITIVE,
    "rope_theta": _POSITIVE,
    "beta_fast": _POSITIVE,
    "beta_slow": _POSITIVE,
    "attention_factor": _POSITIVE,
    "mscale": _AT_LEAST_0,
    "mscale_all_dim": _AT_LEAST_0,
    "truncate": (lambda value: isinstance(value, bool), "true or false"),
}
"""What a variant's values must be, as a test and in words; null is a value that is not given."""


def scaling_as_trained(scaling: dict[str, Any] | None, positions: int) -> dict[str, Any] | None:
    """The variant as engines must read it, so that they rotate as the draft was trained.

    What the training does not follow is left out, and YaRN's original length is written where it
    is that of `positions` (`max_position_embeddings`): vLLM has no default for it.
    """
    kind = type_of(scaling)
    if scaling is None or kind in _PLAIN_TYPES:
        return None
    written = {key: value for key, value in scaling.items() if key not in _NOT_TRAINED}
    if kind == "yarn" and not written.get("original_max_position_embeddings"):
        written["original_max_position_embeddings"] = positions
    return written


def same_scaling(one: dict[str, Any] | None, other: dict[str, Any] | None, positions: int) -> bool:
    """Whether two variants rotate alike, however they are written."""

    def plain(scaling: dict[str, Any] | None) -> dict[str, Any]:
        written = scaling_as_trained(scaling, positions) or {}
        names = ("type", "rope_type", "rope_theta")
        rest = {key: value for key, value in written.items() if key not in names}
        return {"kind": type_of(written), **rest}

    return plain(one) == plain(other)

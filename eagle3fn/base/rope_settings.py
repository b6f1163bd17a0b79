"""RoPE's settings in a configuration: where they are read, what is refused, and what is written."""

import math
from typing import Any

from eagle3fn.base.errors import UserError

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

_NOT_TRAINED = ("partial_rotary_factor", "mrope_section", "mrope_interleaved")
"""A target's settings that the draft's layer does not follow: it rotates every dimension."""


def rope_of(tree: dict[str, Any]) -> dict[str, Any]:
    """RoPE's settings of a configuration: newer ones have `rope_parameters`.

    Some have one set for each kind of layer; the draft's layer attends to everything.

    Raises:
        UserError: they are not an object.
    """
    rope = tree.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise UserError(f"rope_parameters = {rope!r}: must be an object")
    return rope.get("full_attention", rope)


def scaling_of(tree: dict[str, Any]) -> dict[str, Any] | None:
    """The variant and its numbers, None for the default one."""
    rope = rope_of(tree)
    scaled = rope.get("rope_type", "default") != "default"
    return tree.get("rope_scaling") or (rope if scaled else None)


def type_of(scaling: Any) -> str:
    """The variant's name, "default" without scaling."""
    scaling = scaling if isinstance(scaling, dict) else {}
    return scaling.get("rope_type", scaling.get("type", "default"))


def check_scaling(scaling: Any) -> None:
    """Refuse a variant that is not computed here, or whose numbers are missing.

    Raises:
        UserError: names the setting.
    """
    scaling = {} if scaling is None else scaling
    kind = type_of(scaling)
    if not isinstance(scaling, dict) or kind not in ROPE_TYPES:
        raise UserError(
            f"draft.rope_scaling = {scaling!r}: its rope_type must be one of "
            f"{', '.join(ROPE_TYPES)}"
        )
    for name in _NUMBERS.get(kind, ()):
        value = scaling.get(name)
        if not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise UserError(
                f"draft.rope_scaling.{name} = {value!r}: {kind} needs a finite number above 0"
            )


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

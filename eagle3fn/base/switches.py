"""Switches of other trainers' and engines' drafts: what changes the function and is not built here,
and what means something else in their files.

A configuration that turns one on describes another function than the draft of `model`, so it is
refused by name; read without a word it would give worse drafts, not an error.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from eagle3fn.base.draft_config import TAPS, switches
from eagle3fn.base.draft_keys import LAYER_TYPES, ORIGIN, OURS, TAP_COUNT, WINDOW, WITH_WINDOW
from eagle3fn.base.errors import UserError, printable, shown


class Switch(NamedTuple):
    """A key of a configuration, the values that leave the draft as it is here, and what it does."""

    name: str
    off: tuple[Any, ...]
    meaning: str  # of another value


_NORM_OUTPUT = "norm_output"
_NORMED_STATE = "the state that goes on to the next step is the normed one (EAGLE-3.1)"
_UNNORMED_HEAD = "false: the head reads the state before the final norm"

SWITCHES = (
    Switch("use_aux_hidden_state", (True,), "false: the draft reads no taps"),
    Switch("mlp_bias", (False,), "biases in the MLP"),
    Switch("hidden_act", ("silu", "swish"), "the MLP's activation; silu is built"),
    Switch("parallel_drafting", (False,), "several tokens are drafted in one run"),
    Switch("parallel_draft_step", (0, 1), "several tokens are drafted in one run"),
    Switch("use_input_layernorm_in_first_layer", (True,), "false: the embedding is not normed"),
    Switch("use_last_layernorm", (True,), "false: the head reads the state before the final norm"),
    Switch("use_mtp_layernorm", (False,), "norms of multi-token prediction"),
    Switch("logit_scale", (1,), "the logits are scaled"),
    Switch("quantization_config", (), "the weights are quantised"),
)
"""Read at the top of a configuration and under `eagle_config`; null is off for all of them."""

_PLAIN_KEYS = {TAPS, TAP_COUNT}  # of `eagle_config`, besides switches


def read_switches(tree: Mapping[str, Any], where: str, origin: str = "") -> dict[str, Any]:
    """A draft's configuration whose switches mean what they mean in ours; refused if one that is
    not built is on.

    Args:
        tree: the configuration.
        where: names it in errors.
        origin: "specforge", "eagle", "speculators", "hf", or "" where it was not said:
            `norm_output` has two meanings.

    Returns:
        The same keys, without `norm_output` where it does not mean ours.

    Raises:
        UserError: names the switch, its value and what it means.
    """
    tree = dict(tree)
    origin = origin or ("speculators" if "speculators_model_type" in tree else "")
    if not origin and tree.get(ORIGIN) == OURS:
        origin = "hf"
    eagle = tree.get("eagle_config") or {}
    if not isinstance(eagle, dict):
        raise UserError(
            f"{where}: eagle_config = {shown(eagle)}: must be an object; mend a copy of the file"
        )
    for prefix, keys in (("", tree), ("eagle_config.", eagle)):
        for switch in SWITCHES:
            value = keys.get(switch.name)
            if value is not None and value not in switch.off:
                raise _is_on(where, prefix + switch.name, value, switch.meaning)
        if keys.get(_NORM_OUTPUT) is not None:
            _check_norm_output(keys[_NORM_OUTPUT], where, prefix + _NORM_OUTPUT, origin)
    _check_window(tree, where)

    known = {switch.name for switch in SWITCHES} | {field.name for field in switches()}
    for key in sorted(eagle.keys() - known - _PLAIN_KEYS):
        raise UserError(
            f"{where}: eagle_config.{printable(key)} = {shown(eagle[key])}: not known here; take "
            "it out of a copy of the file if it leaves the draft's function as it is"
        )

    if origin == "specforge":
        tree.pop(_NORM_OUTPUT, None)
        if eagle:
            tree["eagle_config"] = {k: v for k, v in eagle.items() if k != _NORM_OUTPUT}
    return tree


def _check_norm_output(value: Any, where: str, name: str, origin: str) -> None:
    """`norm_output` is on by default at SpecForge, and another switch elsewhere, off by default."""
    if not isinstance(value, bool):
        raise UserError(f"{where}: {name} = {shown(value)}: must be true or false; mend it")
    if not origin:
        raise UserError(
            f"{where}: {name} = {value}: at vLLM, SGLang and speculators true means that "
            f"{_NORMED_STATE}, at SpecForge {_UNNORMED_HEAD}; say whose file it is with "
            "eagle3fn convert --draft … --from hf, or --from specforge"
        )
    if origin == "specforge" and not value:
        raise _is_on(where, name, value, f"at SpecForge {_UNNORMED_HEAD}")


def _check_window(tree: dict[str, Any], where: str) -> None:
    """Refuse attention of another kind, and a window of which it is not said whose it is."""
    kinds = tree.get(LAYER_TYPES) or []
    if not isinstance(kinds, list):
        raise UserError(
            f"{where}: {LAYER_TYPES} = {shown(kinds)}: must be a list; mend a copy of the file"
        )
    for kind in kinds:
        if kind not in ("full_attention", WITH_WINDOW):
            raise _is_on(where, LAYER_TYPES, kinds, "attention of another kind")

    window = tree.get(WINDOW)
    if tree.get("use_sliding_window") is False:
        window = None
    if WITH_WINDOW in kinds and not window:
        raise UserError(f"{where}: {LAYER_TYPES} = {shown(kinds)} without {WINDOW}; mend the file")
    if window and len(set(kinds)) != 1:
        raise UserError(
            f"{where}: {WINDOW} = {shown(window)}, {LAYER_TYPES} = {shown(kinds)}: all layers must "
            f"have the window, each as {WITH_WINDOW!r} in {LAYER_TYPES}, or none; mend a copy of "
            "the file"
        )


def _is_on(where: str, name: str, value: Any, meaning: str) -> UserError:
    return UserError(
        f"{where}: {name} = {shown(value)}: {meaning}; drafts with it are not supported, choose "
        "one without it"
    )

"""Switches of other trainers' and engines' drafts: what changes the function and is not built here.

A configuration that turns one on describes another function than the draft of `model`, so it is
refused by name; read without a word it would give worse drafts, not an error.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from eagle3fn.base.draft_config import TAPS, switches
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
    Switch("num_hidden_layers", (1,), "the number of decoder layers; one is built"),
    Switch("num_aux_hidden_states", (3,), "the number of taps; three are read"),
    Switch("use_aux_hidden_state", (True,), "false: the draft reads no taps"),
    Switch("norm_before_residual", (False,), "the layer's residual is the normed hidden state"),
    Switch("norm_before_fc", (False,), "one norm over all taps before the projection"),
    Switch("fc_norm", (False,), "a norm for each tap before the projection"),
    Switch("attention_bias", (False,), "biases in the attention's projections"),
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

_PLAIN_KEYS = {TAPS, _NORM_OUTPUT}  # of `eagle_config`, besides switches


def check_switches(tree: Mapping[str, Any], where: str, origin: str = "") -> None:
    """Refuse a draft's configuration with a switch that is on and not built.

    Args:
        tree: the configuration.
        where: names it in errors.
        origin: "specforge", "eagle", "speculators", "hf", or "" where it was not said:
            `norm_output` has two meanings.

    Raises:
        UserError: names the switch, its value and what it means.
    """
    origin = origin or ("speculators" if "speculators_model_type" in tree else "")
    eagle = tree.get("eagle_config") or {}
    windows = tree.get("layer_types") or []
    for name, value, kind in (("eagle_config", eagle, dict), ("layer_types", windows, list)):
        if not isinstance(value, kind):
            words = "an object" if kind is dict else "a list"
            raise UserError(
                f"{where}: {name} = {shown(value)}: must be {words}; mend a copy of the file"
            )
    built = {field.name for field in switches()}
    for prefix, keys in (("", tree), ("eagle_config.", eagle)):
        for switch in SWITCHES:
            value = keys.get(switch.name)
            if switch.name not in built and value is not None and value not in switch.off:
                raise _is_on(where, prefix + switch.name, value, switch.meaning)
        if _NORM_OUTPUT not in built and keys.get(_NORM_OUTPUT) is not None:
            _check_norm_output(keys[_NORM_OUTPUT], where, prefix + _NORM_OUTPUT, origin)

    # A window of attention, in the ways in which configurations name one.
    if tree.get("sliding_window") and tree.get("use_sliding_window") is not False:
        raise _is_on(where, "sliding_window", tree["sliding_window"], "a window of attention")
    if any(kind != "full_attention" for kind in windows):
        raise _is_on(where, "layer_types", windows, "attention of another kind")

    known = {switch.name for switch in SWITCHES} | _PLAIN_KEYS | built
    for key in sorted(eagle.keys() - known):
        raise UserError(
            f"{where}: eagle_config.{printable(key)} = {shown(eagle[key])}: not known here; take "
            "it out of a copy of the file if it leaves the draft's function as it is"
        )


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
    if origin != "specforge" and value:
        raise _is_on(where, name, value, _NORMED_STATE)


def _is_on(where: str, name: str, value: Any, meaning: str) -> UserError:
    return UserError(
        f"{where}: {name} = {shown(value)}: {meaning}; drafts with it are not supported, choose "
        "one without it"
    )

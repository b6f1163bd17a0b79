"""The draft's shape as `config.json`: read, written, and derived from a target's.

A field's key is its name; here is what is more than that.
"""

from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any

from eagle3fn.base.draft_config import (
    DEFAULT_TAPS,
    TAPS,
    DraftConfig,
    aux_layers,
    switches,
)
from eagle3fn.base.errors import UserError, shown
from eagle3fn.base.rope_settings import scaling_as_trained, scaling_of, theta_of, type_of

DEFAULT_DRAFT_VOCAB = 32_000
_VISION_KEYS = ("vision_config", "vision_tower", "image_token_id")

_KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "draft_vocab_size",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
    "rope_theta",
    "rope_scaling",
    "initializer_range",
)
"""Keys that are always written, in this order. A target has them too, `draft_vocab_size` apart."""

TAP_COUNT = "num_aux_hidden_states"
ORIGIN = "draft_trained_by"
OURS = "eagle3fn"
"""Written with `norm_output`, which means something else in SpecForge's files."""


def _given(tree: dict[str, Any], name: str, default: Callable[[], Any]) -> Any:
    """The value of a key, unless it is missing or null."""
    value = tree.get(name)
    return default() if value is None else value


def listed_taps(tree: dict[str, Any]) -> tuple[int, ...] | None:
    """The tapped layers that are listed, in the order of the list, None if none are.

    Engines differ in where they look: under `eagle_config` are the layers whose outputs are taken,
    at the top those whose inputs are, one higher.
    """
    eagle = _eagle_keys(tree)
    for place, keys in (("eagle_config.", eagle), ("", tree)):
        layers = keys.get(TAPS)
        numbers = isinstance(layers, list) and all(type(layer) is int for layer in layers)
        if layers is not None and not (layers and numbers):
            raise UserError(f"{place}{TAPS} = {shown(layers)}: must list layers by number; mend it")

    outputs = eagle.get(TAPS)
    inputs = tree.get(TAPS)
    below = None if inputs is None else [layer - 1 for layer in inputs]
    if None not in (outputs, below) and outputs != below:
        raise UserError(
            f"{TAPS} = {inputs} must be one above eagle_config's {outputs}; "
            "mend the one that is wrong"
        )

    # Their number is said too where it is not three.
    listed = below or outputs
    count = eagle.get(TAP_COUNT, tree.get(TAP_COUNT))
    found = DEFAULT_TAPS if listed is None else len(listed)
    if count is not None and count != found:
        raise UserError(
            f"{TAP_COUNT} = {shown(count)}, but {TAPS} lists {found if listed else 'none'}; mend "
            "the one that is wrong"
        )
    return None if listed is None else tuple(listed)


def taps_keys(layers: tuple[int, ...]) -> dict[str, Any]:
    """Taps as `config.json` has them, under both conventions: see `listed_taps`."""
    keys: dict[str, Any] = {
        "eagle_config": {TAPS: list(layers), "use_aux_hidden_state": True},
        TAPS: [layer + 1 for layer in layers],
    }
    if len(layers) != DEFAULT_TAPS:
        keys[TAP_COUNT] = len(layers)
    return keys


def _eagle_keys(tree: dict[str, Any]) -> dict[str, Any]:
    """The keys under `eagle_config`."""
    eagle = _given(tree, "eagle_config", dict)
    if not isinstance(eagle, dict):
        raise UserError(f"eagle_config = {shown(eagle)}: must be an object with {TAPS}")
    return eagle


# A window of attention: engines read it by layer.
WINDOW = "sliding_window"
LAYER_TYPES = "layer_types"
WITH_WINDOW = "sliding_attention"


def _window_of(tree: dict[str, Any]) -> Any:
    """The window of a draft's layers if `layer_types` says that all have it, else None."""
    kinds = _given(tree, LAYER_TYPES, list)
    if not isinstance(kinds, list) or not kinds or any(kind != WITH_WINDOW for kind in kinds):
        return None
    return tree.get(WINDOW)


# The layer with norms of queries and keys is Qwen3's, and engines know it by that name.
_LLAMA = {"architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama"}
_QWEN3 = {"architectures": ["Eagle3Qwen3ForCausalLM"], "model_type": "qwen3"}


def is_qwen3(tree: dict[str, Any]) -> bool:
    """Whether a draft's layer is Qwen3's."""
    names = tree.get("architectures")
    return isinstance(names, list) and any("Qwen3For" in str(name) for name in names)


def _window_keys(window: int, layers: int) -> dict[str, Any]:
    """A window as `config.json` has it: see `_window_of`."""
    return {
        WINDOW: window,
        "use_sliding_window": True,
        LAYER_TYPES: [WITH_WINDOW] * layers,
    }


_READ: dict[str, Callable[[dict[str, Any]], Any]] = {
    "num_key_value_heads": lambda tree: _given(
        tree, "num_key_value_heads", lambda: tree["num_attention_heads"]
    ),
    "head_dim": lambda tree: _given(
        tree, "head_dim", lambda: tree["hidden_size"] // tree["num_attention_heads"]
    ),
    "target_hidden_size": lambda tree: _given(
        tree, "target_hidden_size", lambda: tree["hidden_size"]
    ),
    "rope_theta": theta_of,
    "rope_scaling": scaling_of,
    "aux_layers": listed_taps,
    "draft_window": _window_of,
    "qk_norm": is_qwen3,
}
"""Fields that are more than the key of their name."""


def draft_config_from_keys(tree: dict[str, Any], where: str) -> DraftConfig:
    """The draft that these keys describe; a key that is not there leaves its field's default.

    `where` names the configuration in errors.

    Raises:
        UserError: a value is missing or impossible.
    """
    try:
        values = {}
        eagle = _eagle_keys(tree)
        own = {field.name for field in switches()}
        for field in fields(DraftConfig):
            name = field.name
            if name in own:
                # Null is off. Engines look under `eagle_config` first, and know two by other keys.
                value = _given(eagle, name, lambda key=name: tree.get(key))
                if value is None and name in _READ:
                    value = _READ[name](tree)
                values[name] = field.default if value is None else value
            elif name in _READ:
                values[name] = _READ[name](tree)
            elif name in tree or field.default is MISSING:
                values[name] = tree[name]
        return DraftConfig(**values)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    except KeyError as error:
        raise UserError(f"{where}: {error.args[0]} is missing from the configuration") from None
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise UserError(f"{where}: a size in the configuration is not a number ({error})") from None


def draft_config_from_target(
    tree: dict[str, Any], where: str, draft_vocab_size: int | None = None
) -> DraftConfig:
    """Derive the draft from a target's configuration: same sizes, heads, RoPE, epsilon; one layer.

    `where` names the configuration in errors. Without `draft_vocab_size` it is 32,000, or V if that
    is less. The draft's switches keep their defaults.

    Raises:
        UserError: a vision-language target, or a size is missing.
    """
    refuse_vision(tree, where)
    size = draft_vocab_size
    if size is None:
        whole = tree.get("vocab_size")
        size = min(DEFAULT_DRAFT_VOCAB, whole) if type(whole) is int else DEFAULT_DRAFT_VOCAB
    shared = {key: tree[key] for key in _KEYS if key in tree}
    return draft_config_from_keys(shared | {"draft_vocab_size": size}, where)


def refuse_vision(tree: dict[str, Any], where: str) -> None:
    """Raise a UserError if a target's configuration is a vision-language model's."""
    found = [key for key in _VISION_KEYS if tree.get(key) is not None]
    if found:
        kind = tree.get("model_type")
        raise UserError(
            f"{where}: model_type {kind!r} with {found[0]}: "
            "vision-language targets are not supported"
        )


def draft_config_to_json(config: DraftConfig, target_layers: int, dtype: str) -> dict[str, Any]:
    """The content of `config.json`: a Llama configuration with EAGLE-3's keys.

    Args:
        config: the draft's shape.
        target_layers: the target's number of decoder layers, which the default taps depend on.
        dtype: of the weights, as "bfloat16".
    """
    # RoPE under the newer key and the two older ones; scaling holds the variant's own values.
    scaling = scaling_as_trained(config.rope_scaling, config.max_position_embeddings)
    rope = {"rope_type": type_of(scaling), "rope_theta": config.rope_theta}
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    values |= {"rope_scaling": scaling, "rope_parameters": {**rope, **(scaling or {}), **rope}}

    tree: dict[str, Any] = {
        **(_QWEN3 if config.qk_norm else _LLAMA),
        "num_hidden_layers": config.num_hidden_layers,
        **{key: values[key] for key in _KEYS},
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "dtype": dtype,
        "torch_dtype": dtype,
    }

    if config.own_embedding:
        tree["target_hidden_size"] = config.target_hidden_size

    # The taps, always and under both conventions: an engine guesses where it finds none.
    tree |= taps_keys(aux_layers(config, target_layers))

    # Switches that are as engines assume are left out, unless they have a key already.
    for field in switches():
        name = field.name
        value = values[name]
        if value == field.default or name == "qk_norm":
            continue  # said by the architecture
        if name == "draft_window":
            tree |= _window_keys(value, config.num_hidden_layers)
        else:
            tree[name] = value
    if config.norm_output:
        tree[ORIGIN] = OURS
    return tree

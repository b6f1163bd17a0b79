"""The draft's shape: to and from a draft's `config.json`, or derived from the target's."""

import math
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any

from eagle3fn.base.errors import UserError, printable, shown
from eagle3fn.base.rope_settings import (
    check_scaling,
    scaling_as_trained,
    scaling_of,
    theta_of,
    type_of,
)

DEFAULT_DRAFT_VOCAB = 32_000
DEFAULT_TAPS = 3
MOST_LAYERS = 8
_MOST_TAPS = 16
_LARGEST_EPS = 1.0  # a norm's values have a mean square of about 1: more would divide by the eps
_VISION_KEYS = ("vision_config", "vision_tower", "image_token_id")


def _count(value: Any) -> bool:
    return type(value) is int and 1 <= value < 2**31


_KINDS = {
    int: (_count, "a whole number, at least 1 and below 2**31"),
    int | None: (
        lambda value: value is None or _count(value),
        "a whole number, at least 1 and below 2**31",
    ),
    float: (
        lambda value: type(value) in (int, float) and 0 < value < math.inf,
        "a finite number above 0",
    ),
    bool: (lambda value: type(value) is bool, "true or false"),
}
"""What a field of each type must be, as a test and in words."""


@dataclass(frozen=True)
class DraftConfig:
    """The draft's shape: one decoder layer, or more, and its switches.

    `aux_layers` are the target's tapped layers, different ones in ascending order, counted from 0;
    None means `1, L//2 - 1, L - 4` of the target's L layers.

    A field added at the end is a switch of the draft (`switches`), with a default that is off. A
    draft's `config.json` has it under its name, and two of them as engines know them (`_READ`).

    Attributes:
        norm_before_fc: one RMSNorm over all taps together before the projection.
        fc_norm: an RMSNorm for each tap before the projection, after `norm_before_fc`.
        norm_output: the hidden state that goes on to the next unroll step is the normed one, which
            the head reads too.
        norm_before_residual: the first layer's residual is its normed hidden state.
        attention_bias: biases in the four projections of attention.
        qk_norm: an RMSNorm over each query and key head before it is rotated, as in Qwen3.
        num_hidden_layers: decoder layers; those after the first read hidden states alone.
        draft_window: positions that a row attends to, its own among them; None: all before it.
        train_embedding: the embedding is the draft's own, trained and exported; of a draft of
            another width than its target it always is.
    """

    hidden_size: int  # H
    intermediate_size: int  # I
    num_attention_heads: int  # N
    num_key_value_heads: int  # J
    head_dim: int  # E
    vocab_size: int  # V
    draft_vocab_size: int  # D
    target_hidden_size: int  # Ht
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    rope_scaling: dict[str, Any] | None = None
    aux_layers: tuple[int, ...] | None = None
    initializer_range: float = 0.02

    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_output: bool = False
    norm_before_residual: bool = False
    attention_bias: bool = False
    qk_norm: bool = False
    num_hidden_layers: int = 1
    draft_window: int | None = None
    train_embedding: bool = False

    def __post_init__(self) -> None:
        """Refuse shapes that cannot be built."""
        # Each value alone.
        for field in fields(self):
            value = getattr(self, field.name)
            holds, words = _KINDS.get(field.type, (None, ""))
            if holds and not holds(value):
                raise UserError(f"draft.{field.name} = {shown(value)}: must be {words}")

        if self.rms_norm_eps > _LARGEST_EPS:
            raise UserError(
                f"draft.rms_norm_eps = {shown(self.rms_norm_eps)}: must be at most {_LARGEST_EPS:g}"
            )

        # Values that must go together.
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"draft.num_attention_heads = {self.num_attention_heads}: must be a multiple of "
                f"num_key_value_heads = {self.num_key_value_heads}"
            )
        if self.draft_vocab_size > self.vocab_size:
            raise UserError(
                f"draft.draft_vocab_size = {self.draft_vocab_size}: "
                f"must be at most vocab_size = {self.vocab_size}"
            )
        if self.head_dim % 2:
            raise UserError(
                f"draft.head_dim = {self.head_dim}: must be even, RoPE rotates features in pairs"
            )
        if self.aux_layers is not None:
            _check_taps(self.aux_layers)
        if self.num_hidden_layers > MOST_LAYERS:
            raise UserError(
                f"draft.num_hidden_layers = {self.num_hidden_layers}: must be at most "
                f"{MOST_LAYERS}; a draft of more decodes no faster than its target"
            )
        check_scaling(self.rope_scaling, self.rope_theta, self.head_dim)

    @property
    def taps(self) -> int:
        """How many of the target's layers are tapped."""
        return DEFAULT_TAPS if self.aux_layers is None else len(self.aux_layers)

    @property
    def tap_numbers(self) -> range:
        """The taps' numbers, from 0."""
        return range(self.taps)

    @property
    def later_layers(self) -> range:
        """The numbers of the layers after the first."""
        return range(1, self.num_hidden_layers)

    @property
    def rope_type(self) -> str:
        """The RoPE variant, "default" without scaling."""
        return type_of(self.rope_scaling)

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes of its tensors by shape letter."""
        return {
            "A": self.taps,
            "H": self.hidden_size,
            "Ht": self.target_hidden_size,
            "I": self.intermediate_size,
            "N": self.num_attention_heads,
            "J": self.num_key_value_heads,
            "E": self.head_dim,
            "V": self.vocab_size,
            "D": self.draft_vocab_size,
        }

    @property
    def other_width(self) -> bool:
        """Whether the target's hidden states and embedding have another width than the draft's."""
        return self.target_hidden_size != self.hidden_size

    @property
    def own_embedding(self) -> bool:
        """Whether the draft trains an embedding."""
        return self.train_embedding or self.other_width


# The configuration as `config.json`. A field's key is its name; here is what is more than that.

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

TAPS = "eagle_aux_hidden_state_layer_ids"
TAP_COUNT = "num_aux_hidden_states"
ORIGIN = "draft_trained_by"
OURS = "eagle3fn"
"""Written with `norm_output`, which means something else in SpecForge's files."""


def switches() -> list[Field[Any]]:
    """The fields that are the draft's alone, and change what it computes.

    They are read from a draft's `config.json`, at its top or under `eagle_config`, and written
    where they differ from their default. A target's key of that name is not read.
    """
    others = {*_KEYS, "target_hidden_size", "aux_layers"}
    return [field for field in fields(DraftConfig) if field.name not in others]


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
        layers = keys.get(TAPS) or None
        whole = isinstance(layers, list) and all(type(layer) is int for layer in layers)
        if layers is not None and not whole:
            raise UserError(f"{place}{TAPS} = {shown(layers)}: must list layers by number; mend it")

    outputs = eagle.get(TAPS) or None
    inputs = tree.get(TAPS) or None
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


# The tapped layers


def _check_taps(layers: tuple[int, ...]) -> None:
    """Refuse taps that engines would gather in another order, or once where they are twice."""
    if not 1 <= len(layers) <= _MOST_TAPS:
        raise UserError(
            f"draft.aux_layers = {printable(layers)}: must name 1 to {_MOST_TAPS} target layers"
        )
    if not all(0 <= layer < 2**31 for layer in layers):
        raise UserError(
            f"draft.aux_layers = {printable(layers)}: must be layers of a target, counted from 0"
        )
    if len(set(layers)) != len(layers):
        raise UserError(
            f"draft.aux_layers = {layers}: a layer is named twice, engines gather each once; "
            "name different layers, in ascending order"
        )
    if list(layers) != sorted(layers):
        raise UserError(
            f"draft.aux_layers = {layers}: must ascend, as engines gather them upwards; write "
            f"{sorted(layers)} and extract again, or sort those of a trained draft with "
            "eagle3fn convert --draft"
        )


def aux_layers(config: DraftConfig, target_layers: int) -> tuple[int, ...]:
    """The tapped decoder layers, counted from 0, of a target with `target_layers` layers.

    They are those that the configuration names, or `1, L//2 - 1, L - 4` of L layers.

    Raises:
        UserError: a named layer is outside the target, or the target is too shallow for the
            default, which is from 7 layers on three different ones.
    """
    count = target_layers
    if config.aux_layers is not None:
        if not all(0 <= layer < count for layer in config.aux_layers):
            raise UserError(
                f"draft.aux_layers = {config.aux_layers}: each must be in [0, {count}); "
                "name layers of the target with --set draft.aux_layers=[a,b,c]"
            )
        return config.aux_layers

    low, middle, high = 1, count // 2 - 1, count - 4
    if not 0 <= low < middle < high:
        raise UserError(
            f"draft.aux_layers: the default ones are {(low, middle, high)} for a target of {count} "
            f"layers, which engines cannot gather; {_shallow_remedy(count)}"
        )
    return low, middle, high


def _shallow_remedy(count: int) -> str:
    """What to do for a target of few layers: three taps that fit, if there are three layers.

    The last layer is left out where it can be: SGLang does not capture its output.
    """
    if count < 3:
        return "a draft needs a target of at least 3 layers"
    top = max(count - 2, 2)
    return (
        f"name others, such as --set draft.aux_layers=[0,{top // 2},{top}], and for extract the "
        f'same in a --draft-config JSON: "eagle_config": {{"{TAPS}": [0, {top // 2}, {top}]}}'
    )

"""The draft's shape: read from a draft's `config.json`, or derived from the target's."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eagle3fn.base.errors import UserError
from eagle3fn.base.files import read_json

DEFAULT_DRAFT_VOCAB = 32_000
ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "mrope")

_ROPE_NUMBERS = {
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
_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "draft_vocab_size",
    "target_hidden_size",
    "max_position_embeddings",
)
_VISION_KEYS = ("vision_config", "vision_tower", "image_token_id")


@dataclass(frozen=True)
class DraftConfig:
    """One decoder layer.

    `aux_layers` are the target's tapped layers, counted from 0; None means `1, L//2 - 1, L - 4` of
    the target's L layers.
    """

    hidden_size: int  # H
    intermediate_size: int
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

    def __post_init__(self) -> None:
        """Refuse shapes that cannot be built."""
        # Each value alone.
        for name in _SIZES:
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise UserError(f"draft.{name} = {value!r}: must be a whole number, at least 1")
        for name in ("rms_norm_eps", "rope_theta", "initializer_range"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise UserError(f"draft.{name} = {value!r}: must be a finite number above 0")

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
        if self.aux_layers is not None and len(self.aux_layers) != 3:
            raise UserError(f"draft.aux_layers = {self.aux_layers}: must name three target layers")
        self._check_rope()

    def _check_rope(self) -> None:
        scaling = {} if self.rope_scaling is None else self.rope_scaling
        if not isinstance(scaling, dict) or self.rope_type not in ROPE_TYPES:
            raise UserError(
                f"draft.rope_scaling = {scaling!r}: "
                f"its rope_type must be one of {', '.join(ROPE_TYPES)}"
            )
        for name in _ROPE_NUMBERS.get(self.rope_type, ()):
            value = scaling.get(name)
            if not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise UserError(
                    f"draft.rope_scaling.{name} = {value!r}: "
                    f"{self.rope_type} needs a number above 0"
                )

    @property
    def rope_type(self) -> str:
        """The RoPE variant, "default" without scaling."""
        scaling = self.rope_scaling if isinstance(self.rope_scaling, dict) else {}
        return scaling.get("rope_type", scaling.get("type", "default"))


def draft_config_from_json(path: str | Path) -> DraftConfig:
    """Read an EAGLE-3 draft's `config.json`, as training frameworks and exported drafts have it.

    Raises:
        UserError: unreadable, not an EAGLE-3 draft, or a size is missing or impossible.
    """
    tree = read_json(path)
    names = tree.get("architectures") if isinstance(tree, dict) else None
    if not isinstance(names, list) or not any("Eagle3" in str(name) for name in names):
        raise UserError(
            f"{path}: architectures = {names!r}: "
            'a draft configuration has ["LlamaForCausalLMEagle3"]'
        )
    if "draft_vocab_size" not in tree:
        raise UserError(f"{path}: draft_vocab_size is missing; name the draft vocabulary's size")
    return _build(
        tree,
        str(path),
        draft_vocab_size=tree["draft_vocab_size"],
        target_hidden_size=tree.get("target_hidden_size") or tree.get("hidden_size"),
        aux_layers=_listed_layers(tree, path),
    )


def _listed_layers(tree: dict[str, Any], path: str | Path) -> tuple[int, ...] | None:
    """The tapped layers that a draft's `config.json` lists, None if it lists none."""
    key = "eagle_aux_hidden_state_layer_ids"
    eagle = tree.get("eagle_config") or {}
    if isinstance(eagle, dict) and eagle.get(key) is None:
        return None

    layers = eagle[key] if isinstance(eagle, dict) else None
    if not isinstance(layers, list) or not all(type(layer) is int for layer in layers):
        raise UserError(f"{path}: eagle_config = {eagle!r}: {key} must list three layers")
    return tuple(layers)


def draft_config_from_target(
    tree: dict[str, Any], where: str, draft_vocab_size: int | None = None
) -> DraftConfig:
    """Derive the draft from a target's configuration: same sizes, heads, RoPE, epsilon; one layer.

    `where` names the configuration in errors. Without `draft_vocab_size` it is 32,000, or V if that
    is less.

    Raises:
        UserError: a vision-language target, or a size is missing.
    """
    refuse_vision(tree, where)
    size = draft_vocab_size or min(DEFAULT_DRAFT_VOCAB, tree.get("vocab_size", DEFAULT_DRAFT_VOCAB))
    return _build(
        tree,
        where,
        draft_vocab_size=size,
        target_hidden_size=tree.get("hidden_size"),
        aux_layers=None,
    )


def refuse_vision(tree: dict[str, Any], where: str) -> None:
    """Raise a UserError if a target's configuration is a vision-language model's."""
    found = [key for key in _VISION_KEYS if tree.get(key) is not None]
    if found:
        kind = tree.get("model_type")
        raise UserError(
            f"{where}: model_type {kind!r} with {found[0]}: "
            "vision-language targets are not supported"
        )


def _build(tree: dict[str, Any], where: str, **fixed: Any) -> DraftConfig:
    """A draft configuration from a Hugging Face one; `fixed` are the fields that differ."""
    # RoPE: newer configurations have `rope_parameters`, older ones `rope_theta` and `rope_scaling`.
    # Some have one set for each kind of layer; the draft's layer attends to everything.
    rope = tree.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{where}: rope_parameters = {rope!r}: must be an object")
    rope = rope.get("full_attention", rope)
    scaling = tree.get("rope_scaling")
    if not scaling and rope.get("rope_type", "default") != "default":
        scaling = rope

    try:
        heads = tree["num_attention_heads"]
        return DraftConfig(
            hidden_size=tree["hidden_size"],
            intermediate_size=tree["intermediate_size"],
            num_attention_heads=heads,
            num_key_value_heads=tree.get("num_key_value_heads") or heads,
            head_dim=tree.get("head_dim") or tree["hidden_size"] // heads,
            vocab_size=tree["vocab_size"],
            max_position_embeddings=tree["max_position_embeddings"],
            rms_norm_eps=tree.get("rms_norm_eps", 1e-6),
            rope_theta=float(tree.get("rope_theta") or rope.get("rope_theta") or 10_000.0),
            rope_scaling=scaling or None,
            initializer_range=tree.get("initializer_range", 0.02),
            **fixed,
        )
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    except KeyError as error:
        raise UserError(f"{where}: {error.args[0]} is missing from the configuration") from None
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{where}: a size in the configuration is not a number ({error})") from None


def aux_layers(config: DraftConfig, target_layers: int) -> tuple[int, int, int]:
    """The three tapped decoder layers, counted from 0, of a target with `target_layers` layers.

    Raises:
        UserError: a named layer is outside the target, or the target is too shallow for the
            default.
    """
    count = target_layers
    low, middle, high = config.aux_layers or (1, count // 2 - 1, count - 4)
    if not all(0 <= layer < count for layer in (low, middle, high)):
        raise UserError(
            f"draft.aux_layers = {(low, middle, high)}: each must be in [0, {count}); "
            "name three layers of the target with --set draft.aux_layers=[a,b,c]"
        )
    return low, middle, high

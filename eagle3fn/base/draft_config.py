"""The draft's shape: read from a SpecForge-style JSON or derived from the target's configuration."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eagle3fn.base.errors import UserError
from eagle3fn.base.files import read_json

DEFAULT_DRAFT_VOCAB = 32_000
ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "mrope")
_VLM_KEYS = ("vision_config", "vision_tower", "image_token_id")


@dataclass(frozen=True)
class DraftConfig:
    """One decoder layer. Sizes are features or rows; `aux_layers` None means `1, L//2 - 1, L - 4` of the target."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    draft_vocab_size: int
    target_hidden_size: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    rope_scaling: dict[str, Any] | None = None
    aux_layers: tuple[int, ...] | None = None
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        """Refuse shapes that cannot be built."""
        sizes = (n for n in self.__dataclass_fields__ if n.endswith(("size", "heads", "dim", "embeddings")))
        for name in sizes:
            if getattr(self, name) < 1:
                raise UserError(f"draft.{name} = {getattr(self, name)}: must be at least 1")
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"draft.num_attention_heads = {self.num_attention_heads}: must be a multiple of "
                f"num_key_value_heads = {self.num_key_value_heads}"
            )
        if self.draft_vocab_size > self.vocab_size:
            raise UserError(
                f"draft.draft_vocab_size = {self.draft_vocab_size}: must be at most vocab_size = {self.vocab_size}"
            )
        if self.head_dim % 2:
            raise UserError(f"draft.head_dim = {self.head_dim}: must be even, RoPE turns pairs")
        if self.aux_layers is not None and len(self.aux_layers) != 3:
            raise UserError(f"draft.aux_layers = {self.aux_layers}: must name three target layers")
        if self.rope_type not in ROPE_TYPES:
            raise UserError(f"draft.rope_scaling type {self.rope_type!r}: must be one of {', '.join(ROPE_TYPES)}")

    @property
    def rope_type(self) -> str:
        """The RoPE variant, "default" without scaling."""
        scaling = self.rope_scaling or {}
        return scaling.get("rope_type", scaling.get("type", "default"))


def draft_config_from_json(path: str | Path) -> DraftConfig:
    """Read a draft configuration as SpecForge's `configs/*.json` or an exported draft's `config.json` write it.

    Raises:
        UserError: unreadable, not an EAGLE-3 draft, or a size is missing or impossible.
    """
    tree = read_json(path)
    names = tree.get("architectures") or []
    if not any("Eagle3" in name for name in names):
        raise UserError(f"{path}: architectures = {names}: not an EAGLE-3 draft (LlamaForCausalLMEagle3)")
    if "draft_vocab_size" not in tree:
        raise UserError(f"{path}: draft_vocab_size is missing; name the draft vocabulary's size")
    eagle = tree.get("eagle_config") or {}
    layers = eagle.get("eagle_aux_hidden_state_layer_ids")
    return _build(
        tree,
        str(path),
        draft_vocab_size=tree["draft_vocab_size"],
        target_hidden_size=tree.get("target_hidden_size") or tree["hidden_size"],
        aux_layers=None if layers is None else tuple(layers),
    )


def refuse_vision(tree: dict[str, Any], where: str) -> None:
    """Raise a UserError if a target's configuration is a vision-language model's."""
    found = [key for key in _VLM_KEYS if tree.get(key) is not None]
    if found:
        kind = tree.get("model_type")
        raise UserError(f"{where}: model_type {kind!r} with {found[0]}: vision-language targets are not supported")


def draft_config_from_target(tree: dict[str, Any], where: str, draft_vocab_size: int | None = None) -> DraftConfig:
    """Derive the draft from a target's configuration: same sizes, heads, RoPE and epsilon, one layer.

    Raises:
        UserError: a vision-language target, or a size is missing.
    """
    refuse_vision(tree, where)
    size = draft_vocab_size or min(DEFAULT_DRAFT_VOCAB, tree.get("vocab_size", DEFAULT_DRAFT_VOCAB))
    return _build(tree, where, draft_vocab_size=size, target_hidden_size=tree.get("hidden_size"), aux_layers=None)


def _build(tree: dict[str, Any], where: str, **fixed: Any) -> DraftConfig:
    rope = tree.get("rope_parameters") or {}
    scaling = tree.get("rope_scaling") or (rope if rope.get("rope_type", "default") != "default" else None)
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
            rope_scaling=scaling,
            initializer_range=tree.get("initializer_range", 0.02),
            **fixed,
        )
    except KeyError as error:
        raise UserError(f"{where}: {error.args[0]} is missing from the configuration") from None
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def aux_layers(config: DraftConfig, target_layers: int) -> tuple[int, int, int]:
    """The three tapped decoder layers, counted from 0, of a target with `target_layers` layers.

    Raises:
        UserError: a named layer is outside the target, or the target is too shallow for the default.
    """
    count = target_layers
    low, middle, high = config.aux_layers or (1, count // 2 - 1, count - 4)
    if not all(0 <= layer < count for layer in (low, middle, high)):
        raise UserError(
            f"draft.aux_layers = {(low, middle, high)}: each must be in [0, {count}); "
            "name three layers of the target with --set draft.aux_layers=[a,b,c]"
        )
    return low, middle, high

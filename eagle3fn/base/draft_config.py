"""The draft's shape, its switches, and the target's layers that it taps."""

import math
from dataclasses import Field, dataclass, fields
from typing import Any

from eagle3fn.base.errors import UserError, printable, shown
from eagle3fn.base.rope_settings import check_scaling, type_of

DEFAULT_TAPS = 3
MOST_LAYERS = 8
TAPS = "eagle_aux_hidden_state_layer_ids"  # the taps' key in a draft's `config.json`
_MOST_TAPS = 16
_SHORTEST_LIMIT = 3  # tokens that a sample has at least
_RANGES = {
    # A norm's values have a mean square of about 1: more would divide by the epsilon.
    "rms_norm_eps": (0.0, 1.0),
    # Beyond these the angles, or the first weights, are no numbers.
    "rope_theta": (1.0, 1e30),
    "initializer_range": (0.0, 100.0),
    "max_position_embeddings": (_SHORTEST_LIMIT, 2**31 - 1),
}
"""Least and largest value of some settings; each is above 0, too."""


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

    A field added at the end is a switch of the draft (`switches`), with a default that is off. A
    draft's `config.json` has it under its name, and two of them as engines know them (`_READ`).

    Attributes:
        rms_norm_eps: epsilon of the norms, where the target names none.
        rope_theta: RoPE base, where the target names none.
        rope_scaling: RoPE variant, as the target's `config.json` has it: linear, dynamic, llama3,
            yarn or mrope; unset: default RoPE.
        aux_layers: the target's tapped layers, counted from 0, ascending; unset:
            `1, L//2 - 1, L - 4` of its `L` layers.
        initializer_range: standard deviation of drawn weights, where the target names none.
        norm_before_fc: one RMSNorm over all taps together before the projection.
        fc_norm: an RMSNorm for each tap before the projection, after `norm_before_fc`.
        norm_output: the hidden state that goes on to the next unroll step is the normed one, which
            the head reads too.
        norm_before_residual: the first layer's residual is its normed hidden state.
        attention_bias: biases in the four projections of attention.
        qk_norm: an RMSNorm over each query and key head before it is rotated, as in Qwen3.
        num_hidden_layers: decoder layers; those after the first read hidden states alone.
        draft_window: positions that a row attends to, its own among them; unset: all before it.
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

        for name, (least, most) in _RANGES.items():
            value = getattr(self, name)
            if not least <= value <= most:
                bound = f"at least {least:g}" if value < least else f"at most {most:g}"
                raise UserError(f"draft.{name} = {shown(value)}: must be {bound}")

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


def switches() -> list[Field[Any]]:
    """The fields after `initializer_range`: the draft's alone, which change what it computes.

    They are read from a draft's `config.json`, at its top or under `eagle_config`, and written
    where they differ from their default. A target's key of that name is not read.
    """
    every = list(fields(DraftConfig))
    names = [field.name for field in every]
    return every[names.index("initializer_range") + 1 :]


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
        f"name others, such as extract --aux-layers 0,{top // 2},{top} and train --set "
        f"draft.aux_layers=[0,{top // 2},{top}]"
    )

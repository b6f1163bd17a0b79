"""The draft's parameters: one row a weight, and what is made from the rows.

Starts, shapes, checks, exports, plans, the optimizer's roles, test cases and the search for a
difference are maps over `TABLE`: a new weight is a new row, and where the layer uses it.
"""

import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eagle3fn.base.draft_config import DraftConfig
from eagle3fn.base.errors import UserError
from eagle3fn.base.sections import Role
from eagle3fn.base.types import Frozen, Params

Initializer = Callable[[tuple[int, ...], float, torch.Generator], Tensor]
"""From shape and standard deviation, fp32 on the CPU."""


def normal(shape: tuple[int, ...], std: float, generator: torch.Generator) -> Tensor:
    """Drawn from normal(0, std)."""
    return torch.randn(shape, generator=generator, dtype=torch.float32) * std


def ones(shape: tuple[int, ...], std: float, generator: torch.Generator) -> Tensor:
    """All 1; nothing is drawn."""
    return torch.ones(shape, dtype=torch.float32)


def zeros(shape: tuple[int, ...], std: float, generator: torch.Generator) -> Tensor:
    """All 0; nothing is drawn."""
    return torch.zeros(shape, dtype=torch.float32)


class Weight(NamedTuple):
    """One row of the table."""

    name: str
    """As exported; of weights that a draft has several of, with {} for the number."""

    axes: str
    """The shape in letters (`DraftConfig.sizes`): "N·E 2·H"."""

    role: Role = "matrix"
    init: Initializer = normal

    before: str = "input"
    """What is computed between the weight that is used before this one and its own use."""

    only_if: str = ""
    """The property of `DraftConfig` on which it depends; empty: every draft has it."""

    numbers: str = ""
    """The property of `DraftConfig` that lists the numbers of its copies; empty: there is one."""

    def of(self, config: DraftConfig) -> "list[Weight]":
        """The row once for each such weight of a draft of this configuration."""
        if self.only_if and not getattr(config, self.only_if):
            return []
        if not self.numbers:
            return [self]
        numbers = getattr(config, self.numbers)
        return [self._replace(name=self.name.format(number)) for number in numbers]

    def shape(self, config: DraftConfig) -> tuple[int, ...]:
        """The shape in numbers."""
        sizes = config.sizes
        axes = [axis.split("·") for axis in self.axes.split()]
        return tuple(math.prod(sizes.get(part) or int(part) for part in axis) for axis in axes)


TABLE: list[Weight] = []
"""All weights, in the order in which the gradient norm is summed: its bits depend on it."""


def _row(name: str, axes: str, *columns: Any, **others: Any) -> str:
    """Append a row; returns the weight's name."""
    TABLE.append(Weight(name, axes, *columns, **others))
    return name


_SCALING = "scaling by the root mean square"
_ATTENTION = "attention: rotated queries and keys, scores, softmax, values"
_RESIDUAL = f"residual, {_SCALING}"
EMBED = _row("embed_tokens.weight", "V H", "embedding", only_if="own_embedding")


class Layer(NamedTuple):
    """The names of one decoder layer's weights."""

    number: int

    # Of the embedding in the first layer, of the hidden state in later ones.
    input_norm: str
    hidden_norm: str  # the first layer has it alone
    post_norm: str

    q: str
    k: str
    v: str
    o: str
    q_bias: str
    k_bias: str
    v_bias: str
    o_bias: str
    q_norm: str
    k_norm: str

    gate: str
    up: str
    down: str


def _names(prefix: str, number: int = 0) -> Layer:
    """The names below a prefix."""
    attention = f"{prefix}.self_attn"
    return Layer(
        number=number,
        input_norm=f"{prefix}.input_layernorm.weight",
        hidden_norm=f"{prefix}.hidden_norm.weight",
        post_norm=f"{prefix}.post_attention_layernorm.weight",
        q=f"{attention}.q_proj.weight",
        k=f"{attention}.k_proj.weight",
        v=f"{attention}.v_proj.weight",
        o=f"{attention}.o_proj.weight",
        q_bias=f"{attention}.q_proj.bias",
        k_bias=f"{attention}.k_proj.bias",
        v_bias=f"{attention}.v_proj.bias",
        o_bias=f"{attention}.o_proj.bias",
        q_norm=f"{attention}.q_norm.weight",
        k_norm=f"{attention}.k_norm.weight",
        gate=f"{prefix}.mlp.gate_proj.weight",
        up=f"{prefix}.mlp.up_proj.weight",
        down=f"{prefix}.mlp.down_proj.weight",
    )


FIRST = _names("midlayer")
_LATER = "layers.{}"


def layers(config: DraftConfig) -> list[Layer]:
    """The draft's layers, the first one first."""
    return [FIRST, *(_names(_LATER.format(number), number) for number in config.later_layers)]


# The first layer, projection and head, in the order of SpecForge's parameters.
Q = _row(FIRST.q, "N·E 2·H", "attention")
K = _row(FIRST.k, "J·E 2·H", "attention")
V = _row(FIRST.v, "J·E 2·H", "attention")
O = _row(FIRST.o, "H N·E", "attention", before=_ATTENTION)  # noqa: E741
GATE = _row(FIRST.gate, "I H")
UP = _row(FIRST.up, "I H")
DOWN = _row(FIRST.down, "H I", before="silu(gate) · up")
HIDDEN_NORM = _row(FIRST.hidden_norm, "H", "norm", ones, _SCALING)
INPUT_NORM = _row(FIRST.input_norm, "H", "norm", ones, _SCALING)
POST_NORM = _row(FIRST.post_norm, "H", "norm", ones, _RESIDUAL)
FC = _row("fc.weight", "H A·Ht", before="features")
NORM = _row("norm.weight", "H", "norm", ones, _RESIDUAL)
HEAD = _row("lm_head.weight", "D H", "head")

# Norms of the taps.
TAPS_NORM = _row("input_norm.weight", "A·Ht", "norm", ones, "features", only_if="norm_before_fc")
_row("fc_norm.{}.weight", "Ht", "norm", ones, "features", only_if="fc_norm", numbers="tap_numbers")


def tap_norm(tap: int) -> str:
    """The name of the norm of one tap, counted from 0."""
    return f"fc_norm.{tap}.weight"


# Layers after the first, which read hidden states alone.
_later_row = partial(_row, numbers="later_layers")
_later = _names(_LATER)

_later_row(_later.q, "N·E H", "attention")
_later_row(_later.k, "J·E H", "attention")
_later_row(_later.v, "J·E H", "attention")
_later_row(_later.o, "H N·E", "attention", before=_ATTENTION)
_later_row(_later.gate, "I H")
_later_row(_later.up, "I H")
_later_row(_later.down, "H I", before="silu(gate) · up")
_later_row(_later.input_norm, "H", "norm", ones, _RESIDUAL)
_later_row(_later.post_norm, "H", "norm", ones, _RESIDUAL)

# What switches add to every layer.
for _layer, _numbers in ((FIRST, ""), (_later, "later_layers")):
    _bias_row = partial(
        _row, role="bias", init=zeros, before="product", only_if="attention_bias", numbers=_numbers
    )
    _bias_row(_layer.q_bias, "N·E")
    _bias_row(_layer.k_bias, "J·E")
    _bias_row(_layer.v_bias, "J·E")
    _bias_row(_layer.o_bias, "H")

    _head_norm_row = partial(
        _row, role="norm", init=ones, before="projection", only_if="qk_norm", numbers=_numbers
    )
    _head_norm_row(_layer.q_norm, "E")
    _head_norm_row(_layer.k_norm, "E")


def row_of(name: str) -> Weight:
    """The row of a weight's name, with whatever number."""
    pattern = re.sub(r"\.\d+\.", ".{}.", name)
    return next(row for row in TABLE if row.name == pattern)


def weights(config: DraftConfig) -> dict[str, Weight]:
    """A draft's rows by name, in the table's order."""
    found = [weight for row in TABLE for weight in row.of(config)]
    return {weight.name: weight for weight in found}


def shapes(config: DraftConfig) -> dict[str, tuple[int, ...]]:
    """Name to shape, in the table's order."""
    return {name: weight.shape(config) for name, weight in weights(config).items()}


def roles(config: DraftConfig) -> dict[str, Role]:
    """Name to role, in the table's order."""
    return {name: weight.role for name, weight in weights(config).items()}


def init_params(
    config: DraftConfig, seed: int, dtype: torch.dtype = torch.bfloat16, device: str = "cpu"
) -> Params:
    """Matrices from normal(0, `initializer_range`), norms 1.

    Drawn in fp32 on the CPU from a generator of `seed`, then cast: a function of its arguments
    alone.
    """
    generator = torch.Generator().manual_seed(seed)
    params = {}
    for name, weight in weights(config).items():
        value = weight.init(weight.shape(config), config.initializer_range, generator)
        params[name] = value.to(device, dtype)
    return params


def start_from_target(params: Params, frozen: Frozen) -> Params:
    """The same parameters, but head, final norm, projection and embedding made from the target.

    The head takes the target's rows of the draft vocabulary; the projection passes the last tap
    through; the final norm is half the target's, because the untrained layer's logits would
    otherwise be confidently wrong (measured: bench/LOG.md). An embedding that is trained starts as
    the target's.

    Raises:
        UserError: the hidden sizes differ, so there is nothing to take, or `frozen.target_norm` is
            missing.
    """
    fc = params[FC]
    h = len(fc)
    width = frozen.target_head.shape[1]
    if width != h:
        raise UserError(
            f"train.init = 'target': the draft's hidden size {h} is not the target's {width}; "
            "use --set train.init=random"
        )
    if frozen.target_norm is None:
        raise UserError(
            "train.init = 'target': frozen.target_norm is None; give the weight of the target's "
            "final norm, or set train.init='random'"
        )

    # (H, A·H): zero for the first taps, the identity for the last.
    passing = torch.zeros_like(fc)
    passing[:, -h:].fill_diagonal_(1)
    started = params | {
        FC: passing,
        HEAD: frozen.target_head[frozen.t2d].to(params[HEAD]),
        NORM: frozen.target_norm.to(params[NORM]) * 0.5,
    }
    if EMBED in params and frozen.embed_tokens is not None:
        started[EMBED] = frozen.embed_tokens.to(params[EMBED], copy=True)
    return started


def check_params(params: Params, config: DraftConfig, where: str = "params") -> None:
    """Refuse parameters that are not this draft's.

    Raises:
        UserError: a name is missing or unknown, or a shape or dtype differs; it names the leaf.
    """
    table = shapes(config)
    for name in sorted(table.keys() ^ params.keys()):
        fault = "missing" if name in table else "not a parameter of this draft"
        raise UserError(f"{where}: {name} is {fault}")
    for name, shape in table.items():
        found = tuple(params[name].shape)
        if found != shape:
            raise UserError(f"{where}: {name} has shape {found}, the configuration says {shape}")
    kinds = {str(value.dtype) for value in params.values()}
    if len(kinds) > 1:
        raise UserError(f"{where}: leaves of several dtypes {sorted(kinds)}; cast them to one")

"""The draft's parameters: one row a weight, and what is made from the rows.

Starts, shapes, checks, exports, plans, the optimizer's roles, test cases and the search for a
difference are maps over `TABLE`: a new weight is a new row, and where the layer uses it.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eagle3fn.base.config import Role
from eagle3fn.base.draft_config import DraftConfig
from eagle3fn.base.errors import UserError
from eagle3fn.base.types import Frozen, Params

Initializer = Callable[[tuple[int, ...], float, torch.Generator], Tensor]
"""From shape and standard deviation, fp32 on the CPU."""


def normal(shape: tuple[int, ...], std: float, generator: torch.Generator) -> Tensor:
    """Drawn from normal(0, std)."""
    return torch.randn(shape, generator=generator, dtype=torch.float32) * std


def ones(shape: tuple[int, ...], std: float, generator: torch.Generator) -> Tensor:
    """All 1; nothing is drawn."""
    return torch.ones(shape, dtype=torch.float32)


class Weight(NamedTuple):
    """One row of the table."""

    name: str
    """As exported."""

    axes: str
    """The shape in letters (`DraftConfig.sizes`): "N·E 2·H"."""

    role: Role = "matrix"
    init: Initializer = normal

    before: str = "input"
    """What is computed between the weight that is used before this one and its own use."""

    only_if: str = ""
    """The property of `DraftConfig` on which it depends; empty: every draft has it."""

    def needed(self, config: DraftConfig) -> bool:
        """Whether a draft of this configuration has it."""
        return not self.only_if or bool(getattr(config, self.only_if))

    def shape(self, config: DraftConfig) -> tuple[int, ...]:
        """The shape in numbers."""
        sizes = config.sizes
        axes = [axis.split("·") for axis in self.axes.split()]
        return tuple(math.prod(sizes.get(part) or int(part) for part in axis) for axis in axes)


TABLE: list[Weight] = []
"""All weights, in the order in which the gradient norm is summed: its bits depend on it."""


def _row(name: str, axes: str, *columns: Any, **others: Any) -> str:
    """Append a row; returns the weight's name."""
    TABLE.append(Weight(f"{name}.weight", axes, *columns, **others))
    return TABLE[-1].name


_SCALING = "scaling by the root mean square"
_ATTENTION = "attention: rotated queries and keys, scores, softmax, values"

EMBED = _row("embed_tokens", "V H", "embedding", only_if="own_embedding")
Q = _row("midlayer.self_attn.q_proj", "N·E 2·H", "attention")
K = _row("midlayer.self_attn.k_proj", "J·E 2·H", "attention")
V = _row("midlayer.self_attn.v_proj", "J·E 2·H", "attention")
O = _row("midlayer.self_attn.o_proj", "H N·E", "attention", before=_ATTENTION)  # noqa: E741
GATE = _row("midlayer.mlp.gate_proj", "I H")
UP = _row("midlayer.mlp.up_proj", "I H")
DOWN = _row("midlayer.mlp.down_proj", "H I", before="silu(gate) · up")
HIDDEN_NORM = _row("midlayer.hidden_norm", "H", "norm", ones, _SCALING)
INPUT_NORM = _row("midlayer.input_layernorm", "H", "norm", ones, _SCALING)
POST_NORM = _row("midlayer.post_attention_layernorm", "H", "norm", ones, f"residual, {_SCALING}")
FC = _row("fc", "H 3·Ht", before="features")
NORM = _row("norm", "H", "norm", ones, f"residual, {_SCALING}")
HEAD = _row("lm_head", "D H", "head")


def weights(config: DraftConfig) -> dict[str, Weight]:
    """A draft's rows by name, in the table's order."""
    return {weight.name: weight for weight in TABLE if weight.needed(config)}


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
    """The same parameters, but head, final norm and projection made from the target.

    The head takes the target's rows of the draft vocabulary; the projection passes the last tap
    through; the final norm is half the target's, because the untrained layer's logits would
    otherwise be confidently wrong (measured: bench/LOG.md).

    Raises:
        UserError: the hidden sizes differ, so there is nothing to take, or `frozen.target_norm` is
            missing.
    """
    fc = params[FC]
    h, width = fc.shape
    if width != 3 * h:
        raise UserError(
            f"train.init = 'target': the draft's hidden size {h} is not the target's {width // 3}; "
            "use --set train.init=random"
        )
    if frozen.target_norm is None:
        raise UserError(
            "train.init = 'target': frozen.target_norm is None; give the weight of the target's "
            "final norm, or set train.init='random'"
        )

    # (H, 3·H): zero for the first two taps, the identity for the last.
    passing = torch.zeros_like(fc)
    passing[:, 2 * h :].fill_diagonal_(1)
    return params | {
        FC: passing,
        HEAD: frozen.target_head[frozen.t2d].to(params[HEAD]),
        NORM: frozen.target_norm.to(params[NORM]) * 0.5,
    }


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

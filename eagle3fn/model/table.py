"""The draft's parameters: one table of exported names, shapes and initialisation."""

import math

import torch
from torch import Tensor

from eagle3fn.base.draft_config import DraftConfig
from eagle3fn.base.errors import UserError
from eagle3fn.base.types import Frozen, Params

Q = "midlayer.self_attn.q_proj.weight"
K = "midlayer.self_attn.k_proj.weight"
V = "midlayer.self_attn.v_proj.weight"
O = "midlayer.self_attn.o_proj.weight"  # noqa: E741
GATE = "midlayer.mlp.gate_proj.weight"
UP = "midlayer.mlp.up_proj.weight"
DOWN = "midlayer.mlp.down_proj.weight"
HIDDEN_NORM = "midlayer.hidden_norm.weight"
INPUT_NORM = "midlayer.input_layernorm.weight"
POST_NORM = "midlayer.post_attention_layernorm.weight"
FC = "fc.weight"
NORM = "norm.weight"
HEAD = "lm_head.weight"
EMBED = "embed_tokens.weight"


def shapes(config: DraftConfig) -> dict[str, tuple[int, ...]]:
    """Name to shape, in the order in which the gradient norm is summed (objective, section 7).

    `embed_tokens.weight` `(V, H)` is there only if the target's hidden size differs, so that the draft trains its own.
    """
    h, i = config.hidden_size, config.intermediate_size
    q, kv = (
        config.num_attention_heads * config.head_dim,
        config.num_key_value_heads * config.head_dim,
    )
    table: dict[str, tuple[int, ...]] = (
        {EMBED: (config.vocab_size, h)} if config.target_hidden_size != h else {}
    )
    return table | {
        Q: (q, 2 * h),
        K: (kv, 2 * h),
        V: (kv, 2 * h),
        O: (h, q),
        GATE: (i, h),
        UP: (i, h),
        DOWN: (h, i),
        HIDDEN_NORM: (h,),
        INPUT_NORM: (h,),
        POST_NORM: (h,),
        FC: (h, 3 * config.target_hidden_size),
        NORM: (h,),
        HEAD: (config.draft_vocab_size, h),
    }


def init_params(
    config: DraftConfig,
    seed: int,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
    init: str = "random",
) -> Params:
    """Matrices from normal(0, `initializer_range`), norms 1; drawn in fp32 on the CPU, then cast.

    `init` "legacy" draws as the old tool's module does under the same seed: see `_draw_legacy`.
    """
    generator = torch.Generator().manual_seed(seed)
    if init == "legacy":
        drawn = _draw_legacy(config, generator)
    else:
        drawn = {
            name: _draw(shape, config.initializer_range, generator)
            for name, shape in shapes(config).items()
        }
    return {name: value.to(device, dtype) for name, value in drawn.items()}


def _draw_legacy(config: DraftConfig, generator: torch.Generator) -> Params:
    """As the layers of `torch.nn` start: the embedding from normal(0, 1), then matrices uniform in ±1/√fan_in.

    The embedding is drawn first, also where it is the target's and the draw is thrown away.
    """
    embedding = torch.empty(config.vocab_size, config.hidden_size).normal_(generator=generator)
    drawn = {EMBED: embedding}
    for name, shape in shapes(config).items():
        if len(shape) == 1:
            drawn[name] = torch.ones(shape)
        elif name != EMBED:
            drawn[name] = torch.nn.init.kaiming_uniform_(
                torch.empty(shape), math.sqrt(5), generator=generator
            )
    return {name: drawn[name] for name in shapes(config)}


def _draw(shape: tuple[int, ...], scale: float, generator: torch.Generator) -> Tensor:
    return torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) * scale


def start_from_target(params: Params, frozen: Frozen, norm: Tensor) -> Params:
    """The same parameters, but head, final norm and projection made from the target; `norm` is `(Ht,)`.

    The head takes the target's rows; the projection passes the last tap through; the final norm is half the
    target's, because the untrained layer's logits would otherwise be confidently wrong (measured: bench/LOG.md).

    Raises:
        UserError: the hidden sizes differ, so there is nothing to take.
    """
    h, width = params[FC].shape
    if width != 3 * h:
        raise UserError(
            f"train.init = 'target': the draft's hidden size {h} is not the target's {width // 3}; "
            "use --set train.init=random"
        )
    passing = torch.cat([torch.zeros(h, 2 * h), torch.eye(h)], dim=1)
    return params | {
        FC: passing.to(params[FC]),
        HEAD: frozen.target_head[frozen.t2d].to(params[HEAD]),
        NORM: norm.to(params[NORM]) * 0.5,
    }


def check_params(params: Params, config: DraftConfig, where: str = "params") -> None:
    """Refuse parameters that are not this draft's.

    Raises:
        UserError: a name is missing or unknown, or a shape or dtype differs; it names the leaf.
    """
    table = shapes(config)
    for name in sorted(table.keys() ^ params.keys()):
        raise UserError(
            f"{where}: {name} is {'missing' if name in table else 'not a parameter of this draft'}"
        )
    for name, shape in table.items():
        if tuple(params[name].shape) != shape:
            raise UserError(
                f"{where}: {name} has shape {tuple(params[name].shape)}, the configuration says {shape}"
            )
    kinds = {str(value.dtype) for value in params.values()}
    if len(kinds) > 1:
        raise UserError(f"{where}: leaves of several dtypes {sorted(kinds)}; cast them to one")

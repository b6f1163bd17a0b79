"""The draft's parameters: one table of exported names, shapes and initialisation."""

import torch

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
    """Name to shape, in the order in which the gradient norm is summed.

    `embed_tokens.weight` `(V, H)` is there only if the target's hidden size differs, so that the
    draft trains its own.
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


def roles(config: DraftConfig) -> dict[str, str]:
    """Name to role: "matrix", "norm", "embedding" or "head"."""
    special = {EMBED: "embedding", HEAD: "head"}
    return {
        name: special.get(name, "norm" if len(shape) == 1 else "matrix")
        for name, shape in shapes(config).items()
    }


def init_params(
    config: DraftConfig, seed: int, dtype: torch.dtype = torch.bfloat16, device: str = "cpu"
) -> Params:
    """Matrices from normal(0, `initializer_range`), norms 1.

    Drawn in fp32 on the CPU from a generator of `seed`, then cast: a function of its arguments
    alone.
    """
    generator = torch.Generator().manual_seed(seed)
    params = {}
    for name, shape in shapes(config).items():
        if len(shape) == 1:
            value = torch.ones(shape, dtype=torch.float32)
        else:
            value = torch.randn(shape, generator=generator, dtype=torch.float32)
            value = value * config.initializer_range
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
    h, width = params[FC].shape
    if width != 3 * h:
        raise UserError(
            f"train.init = 'target': the draft's hidden size {h} is not the target's {width // 3}; "
            "use --set train.init=random"
        )
    if frozen.target_norm is None:
        raise UserError(
            "train.init = 'target': frozen.target_norm is None; give the weight of the target's "
            "final norm, "
            "or set train.init='random'"
        )

    # (H, 3·H): zero for the first two taps, the identity for the last.
    fc = params[FC]
    zeros = torch.zeros(h, 2 * h, dtype=fc.dtype, device=fc.device)
    passing = torch.cat([zeros, torch.eye(h, dtype=fc.dtype, device=fc.device)], dim=1)
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
        raise UserError(
            f"{where}: {name} is {'missing' if name in table else 'not a parameter of this draft'}"
        )
    for name, shape in table.items():
        if tuple(params[name].shape) != shape:
            raise UserError(
                f"{where}: {name} has shape {tuple(params[name].shape)}, the configuration says "
                f"{shape}"
            )
    kinds = {str(value.dtype) for value in params.values()}
    if len(kinds) > 1:
        raise UserError(f"{where}: leaves of several dtypes {sorted(kinds)}; cast them to one")

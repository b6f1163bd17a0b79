"""The draft's one decoder layer as functions of its parameters. `(params, config, tensors) → tensors`."""

import torch
import torch.nn.functional as F
from torch import Tensor

from eagle3fn.base.draft_config import DraftConfig
from eagle3fn.base.types import Frozen, Params
from eagle3fn.model import table
from eagle3fn.model.rope import rotate


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    """The dtype of norms, softmax and losses: fp32, or fp64 where that is the compute dtype."""
    return torch.promote_types(dtype, torch.float32)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last axis: fp32 inside, cast back, then times `weight`."""
    wide = x.to(at_least_fp32(x.dtype))
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def embed(params: Params, frozen: Frozen, input_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Embeddings `(B, S, H)` of `input_ids` `(B, S)`: the target's, or the draft's own where it trains them."""
    weight = params[table.EMBED] if frozen.embed_tokens is None else frozen.embed_tokens
    return F.embedding(input_ids, weight).to(dtype)


def project(params: Params, aux_hidden: Tensor) -> Tensor:
    """The three taps `(B, S, 3·Ht)` to the draft's hidden `(B, S, H)`."""
    weight = params[table.FC]
    return F.linear(aux_hidden.to(weight.dtype), weight)


def qkv(
    params: Params,
    config: DraftConfig,
    embeds: Tensor,
    hidden: Tensor,
    cos: Tensor,
    sin: Tensor,
    q=True,
    kv=True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Turned queries `(B, N, S, E)` and keys, and values `(B, J, S, E)`, of embeddings and hidden `(B, S, H)`.

    With `q` or `kv` False these are left out: an empty tensor stands in their place.
    """
    eps = config.rms_norm_eps
    left = rms_norm(embeds, params[table.INPUT_NORM], eps)
    x = torch.cat([left, rms_norm(hidden, params[table.HIDDEN_NORM], eps)], dim=-1)

    def heads(name: str, count: int) -> Tensor:
        return F.linear(x, params[name]).view(*x.shape[:2], count, config.head_dim).transpose(1, 2)

    empty = x.new_empty(0)
    j = config.num_key_value_heads
    query = rotate(heads(table.Q, config.num_attention_heads), cos, sin) if q else empty
    return (
        (query, rotate(heads(table.K, j), cos, sin), heads(table.V, j))
        if kv
        else (query, empty, empty)
    )


def repeat_heads(x: Tensor, groups: int) -> Tensor:
    """Key-value heads `(B, J, S, E)` once for each query head: `(B, J·groups, S, E)`."""
    b, j, s, e = x.shape
    return (
        x if groups == 1 else x[:, :, None].expand(b, j, groups, s, e).reshape(b, j * groups, s, e)
    )


def finish_layer(params: Params, config: DraftConfig, hidden: Tensor, attended: Tensor) -> Tensor:
    """Behind attention: `attended` `(B, N, S, E)` through o_proj, the residuals and the SwiGLU MLP; `(B, S, H)`."""
    b, n, s, e = attended.shape
    hidden = hidden + F.linear(attended.transpose(1, 2).reshape(b, s, n * e), params[table.O])
    x = rms_norm(hidden, params[table.POST_NORM], config.rms_norm_eps)
    inner = F.silu(F.linear(x, params[table.GATE])) * F.linear(x, params[table.UP])
    return hidden + F.linear(inner, params[table.DOWN])


def logits(params: Params, config: DraftConfig, hidden: Tensor) -> Tensor:
    """Draft logits `(B, S, D)` of hidden `(B, S, H)`."""
    return F.linear(rms_norm(hidden, params[table.NORM], config.rms_norm_eps), params[table.HEAD])

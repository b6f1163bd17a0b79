"""The draft's one decoder layer as functions of its parameters: `(params, config, tensors) →
tensors`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from eagle3fn.base.draft_config import DraftConfig
from eagle3fn.base.dtypes import wide
from eagle3fn.base.types import Frozen, Params
from eagle3fn.model import table
from eagle3fn.model.rope import rotate


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last axis, `weight · x / √(mean(x²) + eps)`.

    In at least fp32 up to the product with `weight`, which is made in the dtype of `x`.
    """
    normed = wide(x)
    normed = normed * torch.rsqrt(normed.pow(2).mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


def embed(params: Params, frozen: Frozen, input_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Embeddings `(B, S, H)` of `input_ids` `(B, S)`: the target's, or the draft's own where it
    trains them.
    """
    weight = params[table.EMBED] if frozen.embed_tokens is None else frozen.embed_tokens
    return F.embedding(input_ids, weight).to(dtype)


def project(params: Params, aux_hidden: Tensor) -> Tensor:
    """The three taps `(B, S, 3·Ht)` to the draft's hidden state `(B, S, H)`."""
    weight = params[table.FC]
    return F.linear(aux_hidden.to(weight.dtype), weight)


def qkv(
    params: Params,
    config: DraftConfig,
    embeds: Tensor,
    hidden: Tensor,
    cos: Tensor,
    sin: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated queries `(B, N, S, E)`, rotated keys and values `(B, J, S, E)`, of embeddings and
    hidden `(B, S, H)`.
    """
    # The layer reads the next token's embedding and the hidden state, each normed: (B, S, 2·H).
    embeds = rms_norm(embeds, params[table.INPUT_NORM], config.rms_norm_eps)
    hidden = rms_norm(hidden, params[table.HIDDEN_NORM], config.rms_norm_eps)
    x = torch.cat([embeds, hidden], dim=-1)

    def heads(name: str, count: int) -> Tensor:
        projected = F.linear(x, params[name])
        return projected.view(*x.shape[:2], count, config.head_dim).transpose(1, 2)

    query = rotate(heads(table.Q, config.num_attention_heads), cos, sin)
    key = rotate(heads(table.K, config.num_key_value_heads), cos, sin)
    value = heads(table.V, config.num_key_value_heads)
    return query, key, value


def repeat_heads(x: Tensor, groups: int) -> Tensor:
    """Key-value heads `(B, J, S, E)` once for each query head: `(B, J·groups, S, E)`."""
    if groups == 1:
        return x
    b, j, s, e = x.shape
    return x[:, :, None].expand(b, j, groups, s, e).reshape(b, j * groups, s, e)


def finish_layer(params: Params, config: DraftConfig, hidden: Tensor, attended: Tensor) -> Tensor:
    """After attention: `attended` `(B, N, S, E)` through o_proj, the residuals and the SwiGLU MLP.

    `(B, S, H)`.

    `h = hidden + W_o · attended`, then `h + W_down · (silu(W_gate · x) · W_up · x)` with `x =
    norm(h)`.
    """
    # Attention's output and the first residual.
    b, n, s, e = attended.shape
    rows = attended.transpose(1, 2).reshape(b, s, n * e)
    hidden = hidden + F.linear(rows, params[table.O])

    # The MLP and the second residual.
    x = rms_norm(hidden, params[table.POST_NORM], config.rms_norm_eps)
    inner = F.silu(F.linear(x, params[table.GATE])) * F.linear(x, params[table.UP])
    return hidden + F.linear(inner, params[table.DOWN])


def logits(params: Params, config: DraftConfig, hidden: Tensor) -> Tensor:
    """Draft logits `(B, S, D)` of hidden `(B, S, H)`."""
    return F.linear(rms_norm(hidden, params[table.NORM], config.rms_norm_eps), params[table.HEAD])

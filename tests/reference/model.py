"""The draft as `nn.Module`s: one decoder layer between a projection and a head.

Names and order of the parameters are the exported ones. Shape letters: `B` batch, `S` sequence, `H`
draft hidden, `Ht` target hidden, `N` heads, `J` key-value heads, `E` head size, `V` target
vocabulary, `D` draft vocabulary.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from eagle3fn.base.draft_config import DraftConfig

_BEYOND = 20
"""Positions past the longest sequence: the unroll's last steps reach them."""


def at_least_fp32(x: Tensor) -> Tensor:
    """fp64 stays; everything smaller becomes fp32."""
    return x if x.dtype == torch.float64 else x.float()


def bias_mask(attention_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to the scores of step 0: `(B, 1, S, S)` from an attention mask `(B, S)`.

    0 where a query sees a key; the most negative finite number of `dtype` for a later key, and once
    more for a padded one. A key that is both overflows to -inf.
    """
    rows, length = attention_mask.shape
    device = attention_mask.device
    lowest = torch.finfo(dtype).min

    later = torch.ones(length, length, dtype=torch.bool, device=device).triu(1)
    causal = torch.zeros(length, length, dtype=dtype, device=device).masked_fill(later, lowest)

    absent = (attention_mask == 0)[:, None, None, :].expand(rows, 1, length, length)
    zeros = torch.zeros(rows, 1, length, length, dtype=dtype, device=device)
    return zeros.masked_fill(absent, lowest) + causal


class RMSNorm(nn.Module):
    """`weight · x / sqrt(mean(x²) + eps)`: fp32 inside, cast back before the weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = at_least_fp32(x)
        scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * scaled.to(x.dtype)


class Rotary:
    """Default RoPE: pair `(j, j + E/2)` of a head is rotated by `position / θ^(2j/E)`.

    The tables are fp32 and cast to the activations' dtype.
    """

    def __init__(self, config: DraftConfig) -> None:
        assert config.rope_type == "default", "the reference has default RoPE alone"
        exponent = torch.arange(0, config.head_dim, 2).float() / config.head_dim  # (E/2,)
        positions = torch.arange(config.max_position_embeddings + _BEYOND).float()
        angle = positions[:, None] * (1.0 / config.rope_theta**exponent)[None, :]
        table = torch.cat([angle, angle], dim=-1)  # (positions, E)
        self.cos = table.cos()
        self.sin = table.sin()

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate `(B, heads, S, E)` by `(B or 1, S)` positions."""
        cos = self.cos.to(x)[positions][:, None]
        sin = self.sin.to(x)[positions][:, None]

        # SpecForge's order of operations: which gradient of `x` comes first decides how their sum
        # is laid out in memory, and with it a card's bits.
        straight = x * cos
        half = x.shape[-1] // 2
        left = x[..., :half]
        right = x[..., half:]
        return straight + torch.cat([-right, left], dim=-1) * sin


class Attention(nn.Module):
    """Attention of one unroll step over the keys of all steps so far."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.kv_heads = config.num_key_value_heads
        self.head_dim = config.head_dim
        size = config.hidden_size
        self.q_proj = nn.Linear(2 * size, self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(2 * size, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(2 * size, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, size, bias=False)
        self.rotary = Rotary(config)

    def split(self, x: Tensor, heads: int) -> Tensor:
        """`(B, S, heads·E)` to `(B, heads, S, E)`."""
        return x.view(*x.shape[:2], heads, self.head_dim).transpose(1, 2)

    def grouped(self, x: Tensor) -> Tensor:
        """Key-value heads `(B, J, S, E)` once for each query head: `(B, N, S, E)`.

        A single query head a key stays a view: its layout is part of SpecForge's bits.
        """
        times = self.heads // self.kv_heads
        if times == 1:
            return x
        return x.unsqueeze(2).expand(-1, -1, times, -1, -1).flatten(1, 2)

    def forward(
        self, x: Tensor, positions: Tensor, mask: Tensor, past: list[tuple[Tensor, Tensor]]
    ) -> Tensor:
        """One unroll step; appends its keys and values to `past`.

        A query at row `t` sees the keys of step 0 at rows `0 … t`, and of every later step, this
        one included, the key at row `t` alone. One softmax over all of them.

        Args:
            x: embedding and hidden state side by side, `(B, S, 2·H)`.
            positions: of step 0, `(B or 1, S)`; step `i` is `i` positions further.
            mask: `bias_mask`, `(B, 1, S, S)`.
            past: keys and values `(B, N, S, E)` of the steps before.

        Returns:
            `(B, S, H)`.
        """
        # Queries, keys and values of this step.
        shifted = positions + len(past)
        query = self.rotary.rotate(self.split(self.q_proj(x), self.heads), shifted)
        key = self.rotary.rotate(self.split(self.k_proj(x), self.kv_heads), shifted)
        value = self.split(self.v_proj(x), self.kv_heads)
        past.append((self.grouped(key), self.grouped(value)))

        # Scores: S columns of step 0, then one column a later step.
        length = x.shape[1]
        root = math.sqrt(self.head_dim)
        (block_key, block_value), *later = past
        scores = query @ block_key.transpose(2, 3) / root + mask  # (B, N, S, S)
        for step_key, _ in later:
            column = (query * step_key).sum(-1) / root  # (B, N, S)
            scores = torch.cat([scores, column.unsqueeze(-1)], dim=-1)

        # One softmax, at least fp32.
        wide = torch.float64 if scores.dtype == torch.float64 else torch.float32
        weights = functional.softmax(scores, dim=-1, dtype=wide).to(query.dtype)

        # The values, weighted; (B, N, S, E).
        out = weights[..., :length] @ block_value
        for index, (_, step_value) in enumerate(later):
            out = out + weights[..., length + index].unsqueeze(-1) * step_value
        return self.o_proj(out.transpose(1, 2).reshape(*x.shape[:2], self.heads * self.head_dim))


class MLP(nn.Module):
    """SwiGLU: `W_down (silu(W_gate x) · W_up x)`."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """The decoder layer: attention and MLP, each with its residual."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        embedded: Tensor,
        hidden: Tensor,
        positions: Tensor,
        mask: Tensor,
        past: list[tuple[Tensor, Tensor]],
    ) -> Tensor:
        """Embeddings and hidden states `(B, S, H)` to the next hidden states."""
        # The norms run in SpecForge's order: autograd adds gradients in the order of the graph.
        normed = self.hidden_norm(hidden)
        both = torch.cat([self.input_layernorm(embedded), normed], dim=-1)

        hidden = hidden + self.self_attn(both, positions, mask, past)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class Draft(nn.Module):
    """The draft with its vocabulary map: `t2d` `(V,)` bool, `d2t` `(D,)` offsets.

    It reads the target's embedding `(V, H)`, which is not trained. A draft of another width than
    its target's is given none and trains its own.
    """

    t2d: Tensor
    d2t: Tensor

    def __init__(
        self, config: DraftConfig, embed_tokens: Tensor | None, t2d: Tensor, d2t: Tensor
    ) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if embed_tokens is not None:
            frozen = embed_tokens.detach().clone()
            self.embed_tokens.weight = nn.Parameter(frozen, requires_grad=False)
        self.midlayer = Layer(config)
        self.fc = nn.Linear(config.taps * config.target_hidden_size, config.hidden_size, bias=False)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False)
        self.register_buffer("t2d", t2d)
        self.register_buffer("d2t", d2t)

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states `(B, S, H)` to logits over the draft vocabulary, `(B, S, D)`."""
        return self.lm_head(self.norm(hidden))

    def trainable(self) -> dict[str, nn.Parameter]:
        """The trained leaves, in `named_parameters()` order."""
        return {name: leaf for name, leaf in self.named_parameters() if leaf.requires_grad}

    def load(self, params: dict[str, Tensor]) -> "Draft":
        """Take copies of `params`, their dtype included; names must match exactly."""
        leaves = self.trainable()
        assert set(leaves) == set(params), set(leaves) ^ set(params)
        for name, leaf in leaves.items():
            assert leaf.shape == params[name].shape, name
            place, _, last = name.rpartition(".")
            setattr(self.get_submodule(place), last, nn.Parameter(params[name].detach().clone()))
        return self

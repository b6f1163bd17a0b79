"""The one-layer draft as modules; parameter names and their order are the exported ones."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from eagle3fn.base.draft_config import DraftConfig


def at_least_fp32(x: Tensor) -> Tensor:
    """fp64 stays, everything smaller becomes fp32."""
    return x if x.dtype == torch.float64 else x.float()


def bias_mask(attention_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive `(B, 1, S, S)`: the most negative finite value once for "later", once for "padding"; both overflow."""
    rows, length = attention_mask.shape
    lowest = torch.finfo(dtype).min
    device = attention_mask.device
    later = torch.ones(length, length, dtype=torch.bool, device=device).triu(1)
    causal = torch.zeros(length, length, dtype=dtype, device=device).masked_fill(later, lowest)
    absent = (attention_mask == 0)[:, None, None, :].expand(rows, 1, length, length)
    zeros = torch.zeros(rows, 1, length, length, dtype=dtype, device=device)
    return zeros.masked_fill(absent, lowest) + causal


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = at_least_fp32(x)
        scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * scaled.to(x.dtype)


class Rotary:
    """Default RoPE: fp32 tables, cast to the activation dtype."""

    def __init__(self, config: DraftConfig) -> None:
        assert config.rope_type == "default", "the reference states default RoPE alone"
        exponent = torch.arange(0, config.head_dim, 2).float() / config.head_dim
        positions = torch.arange(config.max_position_embeddings + 20).float()
        angle = positions[:, None] * (1.0 / config.rope_theta**exponent)[None, :]
        table = torch.cat([angle, angle], dim=-1)
        self.cos, self.sin = table.cos(), table.sin()

    def turn(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate `(B, heads, S, E)` by `(B or 1, S)` positions."""
        cos = self.cos.to(x)[positions][:, None]
        sin = self.sin.to(x)[positions][:, None]
        # SpecForge's order: which gradient of `x` comes first decides how their sum lies in memory, and a card's bits.
        upright = x * cos
        half = x.shape[-1] // 2
        left, right = x[..., :half], x[..., half:]
        return upright + torch.cat([-right, left], dim=-1) * sin


class Attention(nn.Module):
    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        size = config.hidden_size
        self.q_proj = nn.Linear(2 * size, self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(2 * size, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(2 * size, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, size, bias=False)
        self.rotary = Rotary(config)

    def split(self, x: Tensor, heads: int) -> Tensor:
        return x.view(*x.shape[:2], heads, self.head_dim).transpose(1, 2)

    def grouped(self, x: Tensor) -> Tensor:
        """Repeat key-value heads; a single one stays a view, and its layout is part of the old tool's bits."""
        times = self.heads // self.kv_heads
        return x if times == 1 else x.unsqueeze(2).expand(-1, -1, times, -1, -1).flatten(1, 2)

    def forward(
        self, x: Tensor, positions: Tensor, mask: Tensor, past: list[tuple[Tensor, Tensor]]
    ) -> Tensor:
        """One unroll step; appends its keys and values to `past`, whose first entry is the causal block."""
        shifted = positions + len(past)
        query = self.rotary.turn(self.split(self.q_proj(x), self.heads), shifted)
        key = self.rotary.turn(self.split(self.k_proj(x), self.kv_heads), shifted)
        value = self.split(self.v_proj(x), self.kv_heads)
        past.append((self.grouped(key), self.grouped(value)))

        length, root = x.shape[1], math.sqrt(self.head_dim)
        (block_key, block_value), *extra = past
        scores = query @ block_key.transpose(2, 3) / root + mask
        for step_keys, _ in extra:
            column = (query * step_keys).sum(-1) / root
            scores = torch.cat([scores, column.unsqueeze(-1)], dim=-1)
        wide = torch.float64 if scores.dtype == torch.float64 else torch.float32
        weights = functional.softmax(scores, dim=-1, dtype=wide).to(query.dtype)
        out = weights[..., :length] @ block_value
        for index, (_, step_values) in enumerate(extra):
            out = out + weights[..., length + index].unsqueeze(-1) * step_values
        return self.o_proj(out.transpose(1, 2).reshape(*x.shape[:2], self.heads * self.head_dim))


class MLP(nn.Module):
    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
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
        # The norms run in the old tool's order: autograd adds gradients in the order of the graph.
        normed = self.hidden_norm(hidden)
        both = torch.cat([self.input_layernorm(embedded), normed], dim=-1)
        hidden = hidden + self.self_attn(both, positions, mask, past)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class Draft(nn.Module):
    """The draft with its vocabulary map. A draft of another width than its target's trains its own embedding."""

    t2d: Tensor
    d2t: Tensor

    def __init__(
        self, config: DraftConfig, embed_tokens: Tensor | None, t2d: Tensor, d2t: Tensor
    ) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if embed_tokens is not None:
            self.embed_tokens.weight = nn.Parameter(
                embed_tokens.detach().clone(), requires_grad=False
            )
        self.midlayer = Layer(config)
        self.fc = nn.Linear(3 * config.target_hidden_size, config.hidden_size, bias=False)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False)
        self.register_buffer("t2d", t2d)
        self.register_buffer("d2t", d2t)

    def logits(self, hidden: Tensor) -> Tensor:
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

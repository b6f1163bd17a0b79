"""The draft at inference: committed rows with the target's features, then a chain on its own hidden states.

Row `t` takes the features of token `t` and the embedding of token `t + 1`, stands at RoPE position `t`, and speaks
about token `t + 2`. A drafted row takes the hidden state of the row before it in place of features. A committed row
replaces the drafted row of its position. That is the training unroll read along its diagonals.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from eagle3fn.base.errors import UserError
from eagle3fn.model import layers
from eagle3fn.model.rope import rope_table
from eagle3fn.model.table import EMBED, FC
from eagle3fn.use.export import Draft


class Drafter:
    """One sequence's draft: its key-value cache, preallocated for `length` rows, and its place in it."""

    def __init__(self, draft: Draft, length: int, embed_tokens: Tensor) -> None:
        """`embed_tokens` `(V, H)` is used unless the draft brings or trains its own."""
        config, weight = draft.config, draft.params[FC]
        own = draft.params.get(EMBED, draft.embed_tokens)
        self.config, self.params = config, draft.params
        self.embed_tokens = embed_tokens if own is None else own
        if self.embed_tokens.shape != (config.vocab_size, config.hidden_size):
            raise UserError(
                f"draft: embed_tokens has shape {tuple(self.embed_tokens.shape)}, the draft needs "
                f"{(config.vocab_size, config.hidden_size)}; use the target the draft was trained for"
            )
        self.target_ids = draft.vocab.d2t + torch.arange(
            config.draft_vocab_size, device=weight.device
        )
        self.cos, self.sin = rope_table(config, length, weight.dtype, weight.device)
        room = (2, 1, config.num_key_value_heads, length, config.head_dim)
        self.keys, self.values = torch.empty(room, dtype=weight.dtype, device=weight.device)
        self.committed = 0

    def commit(self, aux: Tensor, tokens: Tensor) -> Tensor:
        """Append rows of features `(1, R, 3·Ht)` and of the tokens after them `(1, R)`; the last hidden `(1, 1, H)`."""
        hidden = self._rows(layers.project(self.params, aux), tokens, self.committed)
        self.committed += tokens.shape[1]
        return hidden

    def extend(self, hidden: Tensor, token: Tensor, step: int) -> Tensor:
        """The chain's row `step` >= 1 behind the committed ones, from the row before and the drafted token `(1, 1)`."""
        return self._rows(hidden, token, self.committed + step - 1)

    def logits(self, hidden: Tensor) -> Tensor:
        """Draft logits `(1, 1, D)` of a row's hidden."""
        return layers.logits(self.params, self.config, hidden)

    def draft(self, aux: Tensor, tokens: Tensor, count: int) -> Tensor:
        """Commit rows, then draft `count` >= 1 tokens greedily; target ids `(1, count)`."""
        hidden = self.commit(aux, tokens)
        said: list[Tensor] = []
        for step in range(1, count + 1):
            said.append(self.target_ids[self.logits(hidden).argmax(-1)])
            if step < count:
                hidden = self.extend(hidden, said[-1], step)
        return torch.cat(said, dim=1)

    def _rows(self, hidden: Tensor, tokens: Tensor, start: int) -> Tensor:
        """Store keys and values of consecutive rows from position `start`; only the last row's output is computed."""
        end = start + tokens.shape[1]
        embeds = F.embedding(tokens, self.embed_tokens).to(hidden.dtype)
        q, k, v = layers.qkv(
            self.params, self.config, embeds, hidden, self.cos[start:end], self.sin[start:end]
        )
        self.keys[:, :, start:end] = k
        self.values[:, :, start:end] = v
        attended = F.scaled_dot_product_attention(
            q[:, :, -1:], self.keys[:, :, :end], self.values[:, :, :end], enable_gqa=True
        )
        return layers.finish_layer(self.params, self.config, hidden[:, -1:], attended)

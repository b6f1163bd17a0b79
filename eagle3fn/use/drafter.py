"""The draft at inference, on one sequence.

Row `t` takes the features of token `t` and the embedding of token `t + 1`, has RoPE position `t`,
and predicts token `t + 2`. There are two kinds of rows:

- a committed row takes the target's features;
- a drafted row takes the hidden state of the row before it in their place.

A committed row replaces the drafted row of its position. So a committed row and the drafted rows
after it compute what the unroll's steps compute in training (EAGLE-3, https://arxiv.org/abs/2503.01840).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from eagle3fn.base.errors import UserError
from eagle3fn.model import table
from eagle3fn.model.plain import PLAIN, heads, logits
from eagle3fn.model.rope import rope_table
from eagle3fn.model.table import EMBED, FC
from eagle3fn.model.unroll import carried, project, residual, rotated
from eagle3fn.model.visibility import visible
from eagle3fn.use.export import Draft


def likeliest(logits: Tensor) -> Tensor:
    """The draft id of the highest logit, `(1, 1, D)` to `(1, 1)`."""
    return logits.argmax(-1)


class Drafter:
    """The draft with its key-value cache of one sequence, preallocated for `length` rows."""

    def __init__(self, draft: Draft, length: int, embed_tokens: Tensor) -> None:
        """`embed_tokens` `(V, H)` are the target's; they serve a draft that has none of its own.

        Raises:
            UserError: the embedding's shape is not the draft's `(V, H)`.
        """
        self.config = draft.config
        self.params = draft.params
        weight = draft.params[FC]

        # The draft's embedding: trained, else shipped with the export, else the target's.
        own = draft.params.get(EMBED, draft.embed_tokens)
        self.embed_tokens = embed_tokens if own is None else own
        expected = (self.config.vocab_size, self.config.hidden_size)
        if self.embed_tokens.shape != expected:
            raise UserError(
                f"draft: embed_tokens has shape {tuple(self.embed_tokens.shape)}, the draft needs "
                f"{expected}; use the target the draft was trained for"
            )

        # Target id of every draft id: (D,)
        draft_ids = torch.arange(self.config.draft_vocab_size, device=weight.device)
        self.target_ids = draft.vocab.d2t + draft_ids

        # RoPE tables (length, E), and each layer's keys and values (1, J, length, E)
        self.cos, self.sin = rope_table(self.config, length, weight.dtype, weight.device)
        self.layers = table.layers(self.config)
        shape = (1, self.config.num_key_value_heads, length, self.config.head_dim)
        caches = (len(self.layers), 2, *shape)
        self.caches = torch.empty(caches, dtype=weight.dtype, device=weight.device)
        self.committed = 0  # rows of the cache that hold the target's features

    def commit(self, aux: Tensor, tokens: Tensor) -> Tensor:
        """Append committed rows.

        Args:
            aux: the target's features of the rows, `(1, R, A·Ht)`.
            tokens: the token after each row, `(1, R)`.

        Returns:
            The last row's hidden state, `(1, 1, H)`.
        """
        features = project(self.params, self.config, aux, PLAIN)
        hidden = self._rows(features, tokens, self.committed)
        self.committed += tokens.shape[1]
        return hidden

    def extend(self, hidden: Tensor, token: Tensor, step: int) -> Tensor:
        """Compute the drafted row number `step` >= 1 after the committed rows.

        `hidden` `(1, 1, H)` is the row's before it, `token` `(1, 1)` the token which that row
        predicted. Returns the row's hidden state `(1, 1, H)`.
        """
        hidden = carried(self.params, self.config, hidden, PLAIN)
        return self._rows(hidden, token, self.committed + step - 1, step)

    def logits(self, hidden: Tensor) -> Tensor:
        """Draft logits `(1, 1, D)` of a row's hidden state `(1, 1, H)`."""
        return logits(self.params, self.config, hidden)

    def draft(
        self,
        aux: Tensor,
        tokens: Tensor,
        count: int,
        pick: Callable[[Tensor], Tensor] = likeliest,
    ) -> Tensor:
        """Commit rows as `commit` does, then draft `count` >= 1 tokens.

        `pick` chooses a draft id `(1, 1)` by draft logits `(1, 1, D)`; greedily by default.

        Returns target ids `(1, count)`.
        """
        hidden = self.commit(aux, tokens)
        drafted: list[Tensor] = []
        for step in range(1, count + 1):
            draft_id = pick(self.logits(hidden))  # (1, 1)
            drafted.append(self.target_ids[draft_id])

            # Nothing reads the hidden state after the last token.
            if step < count:
                hidden = self.extend(hidden, drafted[-1], step)
        return torch.cat(drafted, dim=1)

    def _rows(self, hidden: Tensor, tokens: Tensor, start: int, step: int = 0) -> Tensor:
        """Store keys and values of the rows at positions `start` …; return the last row's output.

        `hidden` is `(1, R, H)`, `tokens` `(1, R)`; `step` >= 1 is a drafted row's number. Only the
        last row predicts; those before it are needed up to the last layer's keys.
        """
        embeds = F.embedding(tokens, self.embed_tokens).to(hidden.dtype)  # (1, R, H)
        for layer in self.layers:
            read = None if layer.number else embeds
            last_only = layer is self.layers[-1]
            hidden = self._layer(layer, read, hidden, start, step, last_only)
        return hidden

    def _layer(
        self,
        layer: table.Layer,
        embeds: Tensor | None,
        hidden: Tensor,
        start: int,
        step: int,
        last_only: bool,
    ) -> Tensor:
        """One layer of `_rows`; the output of all rows `(1, R, H)`, or of the last one alone."""
        config, params = self.config, self.params
        end = start + hidden.shape[1]
        angles = self.cos[start:end], self.sin[start:end]
        hidden = residual(params, config, layer, hidden, PLAIN)

        # Keys and values of all rows go into the cache.
        query, key, value = heads(params, config, layer, embeds, hidden)
        query = rotated(params, config, layer.q_norm, query, angles, PLAIN)
        keys, values = self.caches[layer.number]
        keys[:, :, start:end] = rotated(params, config, layer.k_norm, key, angles, PLAIN)
        values[:, :, start:end] = value

        # The rows that predict, or that later layers read.
        if last_only:
            hidden = hidden[:, -1:]
            query = query[:, :, -1:]
        seen = self._seen(end - query.shape[2], end, step)
        attended = F.scaled_dot_product_attention(
            query, keys[:, :, :end], values[:, :, :end], attn_mask=seen, enable_gqa=True
        )  # (1, N, r, E)
        out = PLAIN.output(params, layer, hidden, attended)
        return PLAIN.mlp(params, layer, out, config.rms_norm_eps)

    def _seen(self, start: int, end: int, step: int) -> Tensor | None:
        """Which of the cache's first rows the rows `start … end - 1` attend to, `(r, end)` bool;
        None: all of them.

        Those are the committed rows that they see, and all drafted ones up to themselves, which are
        their own keys of the unroll's later steps.
        """
        if end - start == 1 and self.config.draft_window is None:
            return None
        row = torch.arange(start, end, device=self.caches.device)[:, None]  # (r, 1)
        column = torch.arange(end, device=row.device)
        seen = column <= row
        first = visible(self.config, row - step, step).first
        if first is not None:
            seen &= column >= torch.minimum(torch.as_tensor(first), row - step + 1)
        return seen

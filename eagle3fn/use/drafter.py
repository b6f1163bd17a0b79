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
from eagle3fn.model.unroll import project, rotated
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

        # RoPE tables (length, E) and the cache (1, J, length, E)
        self.cos, self.sin = rope_table(self.config, length, weight.dtype, weight.device)
        shape = (2, 1, self.config.num_key_value_heads, length, self.config.head_dim)
        self.keys, self.values = torch.empty(shape, dtype=weight.dtype, device=weight.device)
        self.committed = 0  # rows of the cache that hold the target's features

    def commit(self, aux: Tensor, tokens: Tensor) -> Tensor:
        """Append committed rows.

        Args:
            aux: the target's features of the rows, `(1, R, 3·Ht)`.
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

        `hidden` is `(1, R, H)`, `tokens` `(1, R)`; `step` >= 1 is a drafted row's number. Earlier
        rows' outputs are not needed: they attend to nothing that changes, and only the last row
        predicts.
        """
        end = start + tokens.shape[1]
        embeds = F.embedding(tokens, self.embed_tokens).to(hidden.dtype)  # (1, R, H)
        angles = self.cos[start:end], self.sin[start:end]

        # Keys and values of all rows go into the cache.
        query, key, value = heads(self.params, self.config, embeds, hidden)
        query = rotated(self.params, self.config, table.Q, query, angles, PLAIN)
        self.keys[:, :, start:end] = rotated(self.params, self.config, table.K, key, angles, PLAIN)
        self.values[:, :, start:end] = value

        # The last row attends to the committed rows that it sees, and to all drafted ones up to
        # itself: they are its own keys of the unroll's later steps.
        place = end - 1 - step
        first = visible(self.config, place, step).first
        seen = slice(0 if first is None else min(max(int(first), 0), place + 1), end)
        attended = F.scaled_dot_product_attention(
            query[:, :, -1:], self.keys[:, :, seen], self.values[:, :, seen], enable_gqa=True
        )  # (1, N, 1, E)
        out = PLAIN.output(self.params, hidden[:, -1:], attended)
        return PLAIN.mlp(self.params, out, self.config.rms_norm_eps)

"""Greedy speculative decoding of one sequence: the draft proposes, the target verifies, no token changes."""

from collections.abc import Collection
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eagle3fn.base.draft_config import aux_layers
from eagle3fn.base.errors import UserError
from eagle3fn.data.target import cache_name, empty_cache
from eagle3fn.use.drafter import Drafter
from eagle3fn.use.export import Draft
from eagle3fn.use.taps import Taps


class Decoded(NamedTuple):
    """One decoded answer and what it took. Lists have one count for each draft position.

    `tokens` starts with the prefill's token and ends with the first end token, if one came. Behind an end token
    nothing counts: neither as emitted, nor as accepted or reached.
    """

    tokens: list[int]
    verifications: int
    accepted_by_position: list[int]  # drafted token emitted
    reached_by_position: list[
        int
    ]  # all earlier drafted tokens accepted: accepted / reached is the conditional rate
    drafted_by_position: list[int]
    seconds: float  # all of it, prefill included
    prefill_seconds: float

    @property
    def accepted_length(self) -> float:
        """Tokens emitted for each verification, the bonus token counted and the prefill's not; 0 without any."""
        return (len(self.tokens) - 1) / self.verifications if self.verifications else 0.0


class _Tally:
    """Counts over the rounds."""

    def __init__(self, draft_length: int) -> None:
        self.verifications = 0
        self.accepted, self.reached, self.drafted = ([0] * draft_length for _ in range(3))

    def add(self, drafted: int, accepted: int, emitted: int) -> None:
        """One round: `accepted` drafted tokens were right, `emitted` tokens came out before the end."""
        self.verifications += 1
        for i in range(drafted):
            self.drafted[i] += 1
            self.reached[i] += i <= accepted and i < emitted
            self.accepted[i] += i < accepted and i < emitted


@torch.inference_mode()
def speculate(
    model: Any,
    draft: Draft | None,
    input_ids: Tensor,
    draft_length: int,
    max_new: int,
    end_tokens: Collection[int],
) -> Decoded:
    """Decode greedily behind `input_ids` `(1, P)`; the tokens are those of plain greedy decoding.

    Args:
        model: a causal LM of transformers.
        draft: None only if `draft_length` is 0.
        input_ids: the prompt.
        draft_length: tokens drafted a round, fewer where fewer are wanted; 0 decodes plainly by the same loop.
        max_new: at most so many tokens, the prefill's included.
        end_tokens: decoding stops behind the first of these.

    Raises:
        UserError: an empty prompt, one beyond the position limit, or a draft of another target.
    """
    check_request(model, draft, input_ids, draft_length, max_new)
    begin = perf_counter()
    tally, ends = _Tally(draft_length), frozenset(end_tokens)
    with Target(model, draft if draft_length else None) as target:
        token = target.read(input_ids, keep=1)
        following = torch.cat([input_ids[:, 1:], token], dim=1)
        tokens = token[0].tolist()
        prefill_seconds = perf_counter() - begin
        chain = None
        if draft is not None and draft_length:
            room = input_ids.shape[1] + max_new
            chain = Drafter(draft, room, model.get_input_embeddings().weight)
        while len(tokens) < max_new and tokens[-1] not in ends:
            count = min(draft_length, max_new - len(tokens) - 1)
            block = token
            if chain is not None and count:
                block = torch.cat(
                    [token, chain.draft(target.features(following.shape[1]), following, count)],
                    dim=1,
                )
            said = target.read(block)
            truth = said[0].tolist()
            accepted = common_prefix(block[0, 1:].tolist(), truth)
            target.forget(count - accepted)
            following, token = said[:, : accepted + 1], said[:, accepted : accepted + 1]
            new = until_end(truth[: accepted + 1], ends)
            tally.add(count, accepted, len(new))
            tokens += new
    counts = tally.accepted, tally.reached, tally.drafted
    return Decoded(tokens, tally.verifications, *counts, perf_counter() - begin, prefill_seconds)


class Target:
    """The target with its key-value cache and, if a draft is given, the taps it reads, while the context is open."""

    def __init__(self, model: Any, draft: Draft | None) -> None:
        self.model, self.cache, self.cache_name = model, empty_cache(), cache_name(model)
        count = model.config.get_text_config().num_hidden_layers
        chosen = () if draft is None else aux_layers(draft.config, count)
        self.taps = Taps(model, chosen)

    def __enter__(self) -> "Target":
        self.taps.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.taps.close()

    def read(self, ids: Tensor, keep: int = 0) -> Tensor:
        """Run over `ids` `(1, R)` behind the cache; the token after each row, or after the last `keep`."""
        cache = {self.cache_name: self.cache}
        out = self.model(input_ids=ids, use_cache=True, logits_to_keep=keep, **cache)
        return out.logits.argmax(-1)

    def features(self, rows: int) -> Tensor:
        """Taps `(1, rows, 3·Ht)` of the first `rows` rows of the last `read`."""
        return self.taps.rows(rows)

    def forget(self, rows: int) -> None:
        """Drop the last `rows` rows from the cache."""
        if rows:
            self.cache.crop(-rows)


def common_prefix(drafted: list[int], truth: list[int]) -> int:
    """How many drafted tokens the target would have said itself."""
    wrong = (
        i for i, (left, right) in enumerate(zip(drafted, truth, strict=False)) if left != right
    )
    return next(wrong, len(drafted))


def until_end(tokens: list[int], ends: Collection[int]) -> list[int]:
    """Tokens up to and with the first end token."""
    stop = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: stop + 1]


def check_request(
    model: Any, draft: Draft | None, input_ids: Tensor, draft_length: int, max_new: int
) -> None:
    """Refuse what cannot be decoded.

    Raises:
        UserError: names the value, its constraint and the remedy.
    """
    if input_ids.ndim != 2 or input_ids.shape[0] != 1 or input_ids.shape[1] < 1:
        raise UserError(
            f"input_ids has shape {tuple(input_ids.shape)}; it must be one prompt of at least one token"
        )
    if draft_length < 0 or max_new < 1:
        raise UserError(
            f"draft_length = {draft_length}, max_new = {max_new}: must be at least 0 and 1"
        )
    if draft_length and draft is None:
        raise UserError(f"draft_length = {draft_length} needs a draft; give one, or draft_length 0")
    text = model.config.get_text_config()
    limits = [
        getattr(text, "max_position_embeddings", None),
        draft.config.max_position_embeddings if draft else None,
    ]
    limit, wanted = min((n for n in limits if n), default=None), input_ids.shape[1] + max_new
    if limit is not None and wanted > limit:
        raise UserError(
            f"prompt of {input_ids.shape[1]} tokens and max_new = {max_new}: beyond max_position_embeddings = {limit}; "
            "shorten the prompt or lower max_new"
        )
    if draft is not None:
        check_pair(draft, text, "draft", "the target")


def check_pair(draft: Draft, text: Any, where: str, target: str) -> None:
    """Refuse a draft of another target: vocabulary and hidden size must agree.

    Raises:
        UserError: names both and the size that differs.
    """
    pairs = (
        ("vocab_size", draft.config.vocab_size),
        ("hidden_size", draft.config.target_hidden_size),
    )
    for name, value in pairs:
        if getattr(text, name) != value:
            raise UserError(
                f"{where}: made for a target of {name} {value}, but {target} has {getattr(text, name)}; "
                "use the target the draft was trained for"
            )
    aux_layers(draft.config, text.num_hidden_layers)

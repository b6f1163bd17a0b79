"""Speculative decoding of one sequence: the draft proposes tokens, the target verifies them.

Greedily the tokens are those of plain greedy decoding with the target. At a temperature they are
drawn, and their distribution is the target's (`use.sampling`).
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eagle3fn.base.draft_config import DraftConfig, aux_layers
from eagle3fn.base.errors import UserError
from eagle3fn.base.sampling import GREEDY, Sampling, check_sampling
from eagle3fn.data.decoder import decoder
from eagle3fn.data.hooks import layer_outputs
from eagle3fn.data.target import cache_name, empty_cache
from eagle3fn.use.choosers import chooser
from eagle3fn.use.drafter import Drafter
from eagle3fn.use.export import Draft


class Round(NamedTuple):
    """One round of speculative decoding."""

    drafted: list[int]  # what the draft proposed
    accepted: int  # of these
    emitted: int  # tokens that came out: the accepted ones and the bonus token, or up to an end


class Decoded(NamedTuple):
    """One decoded answer and what it took. Lists have one count for each draft position.

    `tokens` starts with the prefill's token and ends with the first end token, if one came. Tokens
    after an end token count nowhere: neither as emitted, nor as accepted or reached.

    The conditional acceptance rate of position `i` is
    `accepted_by_position[i] / reached_by_position[i]`.
    """

    tokens: list[int]
    verifications: int  # runs of the target after the prefill
    accepted_by_position: list[int]  # the drafted token was emitted
    reached_by_position: list[int]  # all earlier drafted tokens were emitted
    drafted_by_position: list[int]
    seconds: float  # in all, prefill included
    prefill_seconds: float
    rounds: Sequence[Round] = ()  # one for each verification

    # Of sampling alone.
    expected_by_position: Sequence[float] = ()  # accepted tokens expected of those reached
    variance_by_position: Sequence[float] = ()  # of that number
    chances: Sequence[float] = ()  # of each token, the target's probability before top-p

    @property
    def accepted_length(self) -> float:
        """Tokens emitted per verification, without the prefill's token; 0 without verifications.

        The bonus token of each verification counts, so the value is at least 1.
        """
        if not self.verifications:
            return 0.0
        return (len(self.tokens) - 1) / self.verifications


class _Tally:
    """Counts over the rounds, by draft position."""

    def __init__(self, draft_length: int) -> None:
        self.verifications = 0
        self.accepted = [0] * draft_length
        self.reached = [0] * draft_length
        self.drafted = [0] * draft_length
        self.expected = [0.0] * draft_length
        self.variance = [0.0] * draft_length

    def add(self, drafted: int, accepted: int, emitted: int, overlaps: list[float]) -> None:
        """Count one round: `accepted` of `drafted` tokens were kept, `emitted` tokens came out.

        `overlaps` are the chances of the drafted tokens' places to be accepted; none if greedy.
        """
        self.verifications += 1
        for position in range(drafted):
            self.drafted[position] += 1

            # An end token may cut the round short; what comes after it does not count.
            if position >= emitted:
                continue
            if position <= accepted:
                self.reached[position] += 1
                if overlaps:
                    chance = overlaps[position]
                    self.expected[position] += chance
                    self.variance[position] += chance * (1 - chance)
            if position < accepted:
                self.accepted[position] += 1


@torch.inference_mode()
def speculate(
    model: Any,
    draft: Draft | None,
    input_ids: Tensor,
    draft_length: int,
    max_new: int,
    end_tokens: Collection[int],
    sampling: Sampling = GREEDY,
) -> Decoded:
    """Decode after `input_ids` `(1, P)` as the target would: its greedy tokens, or draws of it.

    Each round drafts up to `draft_length` tokens and verifies them in one run of the target. With
    `a` drafted tokens accepted, the round emits `a + 1` tokens: these and one of the target's, the
    bonus token. Greedily a drafted token is accepted if it is the target's own; at a temperature
    by `use.sampling.verify`.

    Args:
        model: a causal LM of transformers.
        draft: None only if `draft_length` is 0.
        input_ids: the prompt, int64.
        draft_length: tokens drafted in a round, fewer near `max_new`; 0 decodes plainly by the
            same loop.
        max_new: at most so many tokens, the prefill's included.
        end_tokens: decoding stops after the first of these.
        sampling: at a temperature above 0 the tokens are a function of its seed and the arguments
            above, and of no other call.

    Raises:
        UserError: an empty prompt, one beyond the position limit, or a draft of another target.
    """
    check_request(model, draft, input_ids, draft_length, max_new)
    check_sampling(sampling)
    begin = perf_counter()
    chooses = chooser(sampling)
    nothing = input_ids[:, :0]
    tally = _Tally(draft_length)
    rounds = []
    end_ids = frozenset(end_tokens)

    with open_target(model, draft if draft_length else None) as target:
        # Prefill: the target reads the prompt, which gives the first token.
        chosen = chooses.choose(nothing, target.logits(input_ids, keep=1))
        token = chosen.tokens  # (1, 1)

        # Rows that the target has read and the draft has not. Row t needs the token after it.
        next_tokens = torch.cat([input_ids[:, 1:], token], dim=1)  # (1, P)
        tokens = token[0].tolist()
        chances = chosen.chances
        prefill_seconds = perf_counter() - begin

        drafter = None
        if draft is not None and draft_length:
            capacity = input_ids.shape[1] + max_new
            drafter = Drafter(draft, capacity, model.get_input_embeddings().weight)

        while len(tokens) < max_new and tokens[-1] not in end_ids:
            # Draft. One place is left for the bonus token, so the last round may draft nothing.
            count = min(draft_length, max_new - len(tokens) - 1)
            drafted = nothing
            if drafter is not None and count:
                aux = target.features(next_tokens.shape[1])
                drafted = chooses.draft(drafter, aux, next_tokens, count)

            # Verify. One run gives the target's logits after every row of the block: the newest
            # token, then the drafted ones.
            block = torch.cat([token, drafted], dim=1)  # (1, 1 + count)
            chosen = chooses.choose(drafted, target.logits(block))

            # Keep the newest token and the accepted ones; the last choice is the bonus token.
            next_tokens = chosen.tokens  # (1, accepted + 1)
            accepted = next_tokens.shape[1] - 1
            target.forget(count - accepted)
            token = next_tokens[:, accepted:]

            # Emit and count.
            emitted = until_end(next_tokens[0].tolist(), end_ids)
            tally.add(count, accepted, len(emitted), chosen.overlaps)
            rounds.append((drafted, accepted, len(emitted)))
            tokens += emitted
            chances = chances + chosen.chances[: len(emitted)]

    seconds = perf_counter() - begin
    return Decoded(
        tokens=tokens,
        verifications=tally.verifications,
        accepted_by_position=tally.accepted,
        reached_by_position=tally.reached,
        drafted_by_position=tally.drafted,
        seconds=seconds,
        prefill_seconds=prefill_seconds,
        rounds=[Round(drafted[0].tolist(), *counts) for drafted, *counts in rounds],
        expected_by_position=tally.expected,
        variance_by_position=tally.variance,
        chances=chances,
    )


class Target:
    """The target on one sequence, with its key-value cache."""

    def __init__(self, model: Any, outputs: list[Tensor]) -> None:
        """`outputs` holds the tapped layers' outputs of the model's latest call."""
        self.model = model
        self.cache = empty_cache()
        self.cache_name = cache_name(model)
        self.outputs = outputs

    def read(self, ids: Tensor, keep: int = 0) -> Tensor:
        """Read as `logits` does; returns the target's greedy token after each row, `(1, R)`."""
        return self.logits(ids, keep).argmax(-1)

    def logits(self, ids: Tensor, keep: int = 0) -> Tensor:
        """Read `ids` `(1, R)` after what the cache holds.

        Returns the logits after each row, `(1, R, V)`; with `keep` only after the last `keep` rows,
        `(1, keep, V)`.
        """
        cache = {self.cache_name: self.cache}
        out = self.model(input_ids=ids, use_cache=True, logits_to_keep=keep, **cache)
        return out.logits

    def features(self, rows: int) -> Tensor:
        """Features `(1, rows, 3·Ht)` of the first `rows` rows of the last `read`."""
        return torch.cat([output[:, :rows] for output in self.outputs], dim=-1)

    def forget(self, rows: int) -> None:
        """Drop the last `rows` rows from the cache."""
        if rows:
            self.cache.crop(-rows)


@contextmanager
def open_target(model: Any, draft: Draft | None) -> Iterator[Target]:
    """Yield the target with an empty cache; the layers that `draft` needs are tapped meanwhile."""
    tapped = []
    if draft is not None:
        layers = decoder(model).layers
        count = model.config.get_text_config().num_hidden_layers
        tapped = [layers[index] for index in aux_layers(draft.config, count)]
    with layer_outputs(tapped) as outputs:
        yield Target(model, outputs)


def until_end(tokens: list[int], end_ids: Collection[int]) -> list[int]:
    """Tokens up to and with the first end token."""
    for position, token in enumerate(tokens):
        if token in end_ids:
            return tokens[: position + 1]
    return tokens


def check_request(
    model: Any, draft: Draft | None, input_ids: Tensor, draft_length: int, max_new: int
) -> None:
    """Refuse what cannot be decoded.

    Raises:
        UserError: names the value, its constraint and the remedy.
    """
    if input_ids.ndim != 2 or input_ids.shape[0] != 1 or input_ids.shape[1] < 1:
        raise UserError(
            f"input_ids has shape {tuple(input_ids.shape)}; "
            "it must be one prompt of at least one token"
        )
    if draft_length < 0 or max_new < 1:
        raise UserError(
            f"draft_length = {draft_length}, max_new = {max_new}: must be at least 0 and 1"
        )
    if draft_length and draft is None:
        raise UserError(f"draft_length = {draft_length} needs a draft; give one, or draft_length 0")

    # Both models must have positions for the prompt and all new tokens.
    text = model.config.get_text_config()
    limits = [getattr(text, "max_position_embeddings", None)]
    if draft is not None:
        limits.append(draft.config.max_position_embeddings)
    known = [limit for limit in limits if limit]
    size = input_ids.shape[1]
    if known and size + max_new > min(known):
        raise UserError(
            f"prompt of {size} tokens and max_new = {max_new}: beyond "
            f"max_position_embeddings = {min(known)}; shorten the prompt or lower max_new"
        )

    if draft is not None:
        check_pair(draft.config, text, "draft", "the target")


def check_pair(config: DraftConfig, text: Any, where: str, target: str) -> None:
    """Refuse a draft of another target: vocabulary, hidden size and tapped layers must fit.

    `config` is the draft's, `text` the target's text configuration; `where` and `target` name the
    two in the message.

    Raises:
        UserError: names both and the size that differs.
    """
    expected = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.target_hidden_size,
    }
    for name, value in expected.items():
        found = getattr(text, name)
        if found != value:
            raise UserError(
                f"{where}: made for a target of {name} {value}, but {target} has {found}; "
                "use the target the draft was trained for"
            )
    aux_layers(config, text.num_hidden_layers)

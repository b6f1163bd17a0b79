"""Hidden states of token ids as an engine gives them, and what can be seen of a row by itself.

Engines have given states of zeros, of NaN, of too few tokens and of other requests, and a draft
trained on them looks as if it learned. So every row is checked.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor


class Score(NamedTuple):
    """The token that the engine gives the highest probability after a place."""

    place: int  # of the last token that it has read
    token: int
    log_prob: float | None  # None: the engine does not tell


class Row(NamedTuple):
    """The states of one row of `S` tokens."""

    token_ids: Tensor  # (S,) int64, as the engine has them
    aux: Tensor  # (S, 3, Ht), the outputs of the tapped layers
    last: Tensor  # (S, Ht), before or after the final norm: `HiddenStates.normed`
    scores: list[Score]  # empty, unless they were asked for


class HiddenStates(Protocol):
    """An engine that computes hidden states of a target; it has the target or loads it.

    Attributes:
        title: the engine's name and version, for messages.
        record: what distinguishes its features from another engine's, JSON values.
        dtype: what it computes in.
        normed: whether `Row.last` comes after the target's final norm.
        remedy: what to do where its states are wrong; ends an error.
    """

    title: str
    remedy: str
    record: dict[str, Any]
    dtype: torch.dtype
    normed: bool

    def rows(self, rows: Sequence[Sequence[int]], scores: bool) -> Iterator[Row]:
        """The states of rows of token ids, in their order.

        Args:
            rows: token ids, at least one in each.
            scores: whether the rows come with scores.

        Raises:
            UserError: the engine failed, or its answer is no such row.
        """
        ...


class Writing(NamedTuple):
    """How an engine writes on after prompts."""

    stops: list[int]  # a row ends with the first of these tokens
    max_new: int  # at most so many tokens
    temperature: float  # of the softmax; 0 is greedy
    top_p: float  # nucleus mass
    seed: int  # of this request: with the prompts it decides what is drawn
    batch_tokens: int  # tokens in one run, for an engine that leaves that to who asks


@runtime_checkable
class Writer(Protocol):
    """An engine that also writes on, and gives the states of what it wrote."""

    def write(self, prompts: Sequence[Sequence[int]], writing: Writing) -> Iterator[Row]:
        """Rows that begin with the prompts, in their order, and go on with what was written.

        A row ends before the first token of which there is no state. It has no scores.

        Args:
            prompts: token ids, at least one in each.
            writing: how the tokens are drawn.

        Raises:
            UserError: as `HiddenStates.rows`.
        """
        ...


def row_fault(
    row: Row, ids: Tensor, hidden_size: int, dtype: torch.dtype, zeros: int = 0
) -> str | None:
    """What is wrong with a row by itself, in words; None if nothing is seen.

    Args:
        row: as the engine gave it.
        ids: the tokens that it was asked for, `(S,)`.
        hidden_size: the target's, Ht.
        dtype: what the engine computes in.
        zeros: how many tokens at the beginning have an embedding of zeros: their states may be
            zero, for they read nothing else.
    """
    if not torch.equal(row.token_ids, ids):
        return _ids_fault(row.token_ids, ids)
    expected = {
        "tapped states": (row.aux, (len(ids), 3, hidden_size)),
        "last states": (row.last, (len(ids), hidden_size)),
    }
    for name, (states, shape) in expected.items():
        if tuple(states.shape) != shape:
            return f"its {name} have shape {tuple(states.shape)}, not {shape}"
        if states.dtype != dtype:
            return f"its {name} are {_name(states.dtype)}, not {_name(dtype)}"
        if not states.isfinite().all():
            return f"its {name} are not finite"
        zero = (states == 0).all(-1).reshape(len(ids), -1).any(-1)[zeros:]
        if zero.any():
            return f"its {name} are all zero at {int(zero.sum())} of {len(ids)} tokens"
    return None


def written_fault(written: Sequence[int], writing: Writing, vocab_size: int) -> str | None:
    """What is wrong with the tokens after a prompt, in words; None if nothing is seen.

    Args:
        written: as the engine gave them.
        writing: how it was asked for them.
        vocab_size: the target's.
    """
    if len(written) > writing.max_new:
        return f"{len(written)} tokens were written, not at most {writing.max_new}"
    beyond = [token for token in written if not 0 <= token < vocab_size]
    if beyond:
        return f"token {beyond[0]} was written, which is not in [0, {vocab_size})"
    if set(written[:-1]) & set(writing.stops):
        return "it goes on after a stop token"
    return None


def _ids_fault(found: Tensor, ids: Tensor) -> str:
    if len(found) != len(ids):
        return f"its states are of {len(found)} tokens, not of {len(ids)}"
    place = int((found != ids).nonzero()[0])
    return f"its token {place} is {int(found[place])}, not {int(ids[place])}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

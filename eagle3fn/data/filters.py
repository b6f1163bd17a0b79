"""Which written conversations are worth training on: own words, and none of them twice.

Judged are the texts alone, so another bound does not ask the target again.
"""

import unicodedata
from collections.abc import Sequence
from typing import Any

from eagle3fn.data.grams import GRAM_SIZE, Grams, grams, words
from eagle3fn.data.row_values import text_of

MOST_REPEATED = 0.5
"""The share of a turn's 8-grams that may be repetitions.

Of the demo's 1,748 conversations, which were written without this bound, 67 are above it.
"""
MOST_SHARED = 0.5
"""The share of a conversation's 13-grams that may be in those kept before it."""

# Why a conversation is dropped.
EXCLUDED = f"share {GRAM_SIZE} words with the excluded texts"
REPETITIVE = "repeat themselves"
SAME_USER = "begin with the user turn of another one"
NEAR_COPY = "repeat what others say"

_REPEATED_SIZE = 8  # words


def repeated_share(text: str) -> float:
    """The share of a text's 8-grams that were in it before; 0 of fewer than 8 words.

    `1 - distinct / all`. Letters of scripts without blanks count as words (`grams.words`).

    >>> repeated_share("one two three four five six seven eight nine")
    0.0
    >>> repeated_share("again and " * 9)
    0.8181818181818181
    """
    found = words(text)
    count = len(found) - _REPEATED_SIZE + 1
    if count < 1:
        return 0.0
    distinct = {tuple(found[start : start + _REPEATED_SIZE]) for start in range(count)}
    return 1 - len(distinct) / count


def normalised(text: str) -> str:
    """A text by which alike ones are found: NFKC, without case, blanks as one."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


class Sieve:
    """Judges conversations one after another, each by itself and by those kept before it.

    Of a conversation that is kept, the hashes of its 13-grams are: some 20 kB for each.

    Args:
        forbidden: 13-grams that no turn may have.
        most_repeated: the share of a turn's 8-grams that may be repetitions.
        most_shared: the share of a conversation's 13-grams that may be in those kept before.
    """

    def __init__(
        self,
        forbidden: Grams,
        most_repeated: float = MOST_REPEATED,
        most_shared: float = MOST_SHARED,
    ) -> None:
        self.forbidden = forbidden
        self.most_repeated = most_repeated
        self.most_shared = most_shared
        self._users: set[str] = set()
        self._seen: set[int] = set()

    def reason_against(self, turns: Sequence[dict[str, Any]]) -> str | None:
        """Why a conversation is to be dropped; None if it is kept, and later ones compared."""
        texts = [text_of(turn["content"]) for turn in turns]
        if self.forbidden and any(grams(text) & self.forbidden for text in texts):
            return EXCLUDED

        # What is drawn from a list, as system texts are, repeats nobody.
        own = [text for turn, text in zip(turns, texts, strict=True) if turn["role"] != "system"]
        if any(repeated_share(text) > self.most_repeated for text in own):
            return REPETITIVE
        user = normalised(own[0])
        if user in self._users:
            return SAME_USER
        said = {hash(gram) for text in own for gram in grams(text)}
        if said and len(said & self._seen) > self.most_shared * len(said):
            return NEAR_COPY

        self._users.add(user)
        self._seen |= said
        return None

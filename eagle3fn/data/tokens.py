"""Texts to ids: of a prompt as an engine reads it, of an answer as the target writes it."""

import re
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

from eagle3fn.data.ends import Ends
from eagle3fn.data.template import ChatTemplate

_LONG = 4000  # characters
# Texts to put before a continuation, so that its beginning is tokenized like a middle.
_LEADS = ("", "\n", ".", "]")


class Tokens:
    """Texts to ids, as an engine makes them of a prompt, and as the target writes them."""

    def __init__(self, template: ChatTemplate) -> None:
        self.tokenizer = template.tokenizer
        self.ends = Ends(template)
        self.special = self.ends.special
        self.cuts = {token.content for token in self.tokenizer.added_tokens_decoder.values()}
        self._text_tokens = self.ends.text_tokens
        self._cuts = _any_of(list(self.special))
        self._pieces: dict[str, list[int]] = {}  # of the prompt before

    def prompt(self, text: str) -> list[int]:
        """Ids of a rendered prompt: special tokens are read as such.

        Where a conversation has a sample for each answer, prompts begin alike. So of a long one
        only those pieces are encoded that the prompt before had not.
        """
        if len(text) < _LONG or not self._fast:
            return self._encode(text)
        marks = self._added.finditer(text)
        begins = [match.start() for match in marks if match[0] in self._begin_pieces]
        if not begins:
            return self._encode(text)
        bounds = dict.fromkeys([0, *begins, len(text)])
        pieces = [text[begin:end] for begin, end in pairwise(bounds)]
        known = self._pieces
        self._pieces = {piece: known.get(piece) or self._encode(piece) for piece in pieces}
        return [number for piece in pieces for number in self._pieces[piece]]

    @cached_property
    def _added(self) -> re.Pattern[str]:
        return _any_of([each.content for each in self.tokenizer.added_tokens_decoder.values()])

    @cached_property
    def _begin_pieces(self) -> set[str]:
        """Special tokens that change nothing before them: a text can be taken apart there."""
        return {
            token.content
            for token in self.tokenizer.added_tokens_decoder.values()
            if token.special and not (token.lstrip or token.single_word or token.normalized)
        }

    def document(self, text: str) -> list[int]:
        """Ids of a plain text, with what the tokenizer puts before it."""
        return self.tokenizer(text).input_ids

    def answer(self, text: str, literal: Sequence[tuple[int, int]]) -> list[int]:
        """Ids of what the target writes, tokenized apart from the prompt.

        Args:
            text: all of it, without the stop token.
            literal: pieces of it, from begin to end, in which a special token is text; one that
                the template wrote is the token, and so are `<think>` and its like.
        """
        is_text = set(self._text_tokens)
        ids: list[int] = []
        begin = 0
        spelled = False
        cuts = []
        for match in self._cuts.finditer(text):
            if match[0] in is_text and any(b <= match.start() < e for b, e in literal):
                spelled = True
            else:
                cuts.append(match)
        if not spelled:
            return self._continuation(text)

        for match in cuts:
            ids += self._continuation(text[begin : match.start()], as_text=True)
            ids.append(self.special[match[0]])
            begin = match.end()
        return ids + self._continuation(text[begin:], as_text=True)

    def text(self, ids: list[int]) -> str:
        """What an engine returns of written ids: without special tokens, but with tags."""
        left_out = {self.special[token] for token in self._text_tokens}
        kept = [number for number in ids if number not in left_out]
        return self.tokenizer.decode(kept, skip_special_tokens=False)

    def _continuation(self, text: str, as_text: bool = False) -> list[int]:
        """Ids of a text that goes on after another one: without a blank put before it."""
        for lead in self._leads:
            before = self._encode(lead) if lead else []
            ids = self._encode(lead + text, as_text)
            if ids[: len(before)] == before:
                return ids[len(before) :]
        return self._encode(text, as_text)

    @cached_property
    def _leads(self) -> tuple[str, ...]:
        """Texts to put before a continuation: none, where a text's beginning is like its middle."""
        line = self._encode("\n")
        alike = all(self._encode("\n" + text) == line + self._encode(text) for text in ("x", " x"))
        return ("",) if alike else _LEADS[1:]

    def _encode(self, text: str, as_text: bool = False) -> list[int]:
        if not text:
            return []
        if self._fast:
            self._fast.encode_special_tokens = as_text
            return self._fast.encode(text, add_special_tokens=False).ids
        options = {"split_special_tokens": True} if as_text else {}
        return self.tokenizer(text, add_special_tokens=False, **options).input_ids

    @cached_property
    def _fast(self) -> Any:
        """The tokenizer's core, which is twice as fast alone; None if it is another one."""
        from tokenizers import Tokenizer

        core = getattr(self.tokenizer, "backend_tokenizer", None)
        if not isinstance(core, Tokenizer):
            return None
        core = Tokenizer.from_str(core.to_str())  # of its own: it is set up here
        core.no_truncation()
        core.no_padding()
        marks = "".join(self.special)
        same = all(
            core.encode(text, add_special_tokens=False).ids
            == self.tokenizer(text, add_special_tokens=False).input_ids
            for text in (marks, f"one {marks}\n\n two", " 3")
        )
        return core if same else None


def _any_of(tokens: list[str]) -> re.Pattern[str]:
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

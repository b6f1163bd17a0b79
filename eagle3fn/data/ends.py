"""The tokens that end an answer, and which special tokens are text where an answer says them."""

import re
from collections.abc import Sequence
from functools import cached_property

from eagle3fn.base.errors import UserError
from eagle3fn.data.probes import ANSWER, CALL_VALUE, PARTS, SAID, asked, called, reply
from eagle3fn.data.template import ChatTemplate

_TAG = re.compile(r"</?(\w+)>")


class Ends:
    """How a target's answers end.

    Args:
        template: its chat template, with its stop tokens.
    """

    def __init__(self, template: ChatTemplate) -> None:
        self.template = template

    @cached_property
    def special(self) -> dict[str, int]:
        """The tokenizer's special tokens, by their texts."""
        return {
            token.content: number
            for number, token in self.template.tokenizer.added_tokens_decoder.items()
            if token.special
        }

    @cached_property
    def text_tokens(self) -> list[str]:
        """The special tokens that are text where an answer says them.

        `<think>` and its like are written by the target as tokens, whatever the tokenizer calls
        them.
        """
        known = {token.content for token in self.template.tokenizer.added_tokens_decoder.values()}
        ends = {*self.template.stops, *(self.template.tokenizer.special_tokens_map or {}).values()}
        return [token for token in self.special if token in ends or not _is_tag(token, known)]

    def stop_in(self, text: str, literal: Sequence[tuple[int, int]] = ()) -> tuple[int, str] | None:
        """Place and text of the token in `text` that ends an answer.

        One that lies in a piece of `literal`, from begin to end, ends nothing.
        """
        place = self._first(list(self.template.stops), text, literal)
        if not place and self._end_mark:
            return self._first([self._end_mark], text, literal)
        return place

    def _first(
        self, marks: list[str], text: str, literal: Sequence[tuple[int, int]]
    ) -> tuple[int, str] | None:
        found = [
            (match.start(), -len(mark), mark)
            for mark in marks
            for match in re.finditer(re.escape(mark), text)
            if not any(begin <= match.start() < end for begin, end in literal)
        ]
        return (min(found)[0], min(found)[2]) if found else None

    @cached_property
    def answer_stop(self) -> str:
        """What the target writes last in an answer without tool calls."""
        found = self.stop_in(self.template.probe(asked()).rpartition(ANSWER)[2])
        return found[1] if found else self.stop_after(calls=False)

    def stop_id(self, stop: str) -> int:
        """The id of a text that `stop_in` or `stop_after` gave."""
        return self.template.stops[stop] if stop in self.template.stops else self.special[stop]

    def stop_after(self, calls: bool) -> str:
        """What the target writes last where the template writes no end: the mark of the next turn
        if it is one of its stop tokens, else its own end.

        Args:
            calls: the answer ends with tool calls.

        Raises:
            UserError: the target has no stop token.
        """
        mark = self._mark_after_calls if calls else self._mark_after_answer
        if mark:
            return mark
        if self._end_mark:
            return self._end_mark
        if not self.template.stops:
            raise UserError(
                f"{self.template.name}: no eos token, and its chat template writes none after an "
                "answer; write eos_token_id into generation_config.json"
            )
        return next(iter(self.template.stops))

    @cached_property
    def _end_mark(self) -> str | None:
        """A special token that the template writes right after an answer, and no stop token is."""
        text = self.template.probe(asked()).rpartition(ANSWER)[2]
        if any(stop in text for stop in self.template.stops):
            return None
        marks = [mark for mark in self.special if text.lstrip().startswith(mark)]
        return max(marks, key=len, default=None)

    @cached_property
    def _mark_after_answer(self) -> str | None:
        text = self.template.probe([*asked(), {"role": "user", "content": PARTS[0]}])
        return self._first_stop(text.partition(ANSWER)[2].partition(PARTS[0])[0])

    @cached_property
    def _mark_after_calls(self) -> str | None:
        text = self.template.probe([*called(self.template.call_style), reply()])
        return self._first_stop(text.rpartition(CALL_VALUE)[2].partition(SAID)[0])

    def _first_stop(self, text: str) -> str | None:
        found = self._first(list(self.template.stops), text, ())
        return found[1] if found else None


def _is_tag(token: str, known: set[str]) -> bool:
    """Whether a token is one of a pair, as `<think>` and `</think>`."""
    match = _TAG.fullmatch(token)
    return bool(match) and {f"<{match[1]}>", f"</{match[1]}>"} <= known

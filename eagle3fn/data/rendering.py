"""A conversation as the chat template renders it, up to one of its turns."""

from typing import Any

from eagle3fn.data.prefixes import Prefixes
from eagle3fn.data.probes import ANSWER
from eagle3fn.data.template import ChatTemplate
from eagle3fn.data.turns import Conversation, Turn

_LONG = 12  # messages from which on all beginnings are rendered at once


class Rendering:
    """A conversation, rendered up to one of its turns.

    Args:
        template: the target's.
        conversation: the turns, tools and arguments.
        where: names the row in errors.
    """

    def __init__(self, template: ChatTemplate, conversation: Conversation, where: str) -> None:
        self.template = template
        self.messages = [template.message(turn) for turn in conversation.turns]
        arguments = {**template.arguments, **conversation.arguments}
        self.options = {**arguments, "tools": conversation.tools or None}
        self.where = where
        # Of a long conversation all beginnings, with a prompt after them and without.
        self._beginnings: dict[bool, Prefixes | None] = {}

    def prompt(self, turns: int) -> str:
        """What an engine gives the target before it answers: the first `turns` turns."""
        return self._beginning(turns, add_generation_prompt=True)

    def through(self, turns: int, other: Turn | None = None) -> str:
        """The first `turns` turns, the last of them as it is written, without a further prompt.

        `other` comes in place of the last of them.
        """
        *before, last = self.messages[:turns]
        message = self.template.message(other) if other else last
        written = self.template.without_doubled_lines(message)
        if written is last:
            return self._beginning(turns, add_generation_prompt=False)
        return self._text([*before, written], add_generation_prompt=False)

    def _beginning(self, turns: int, add_generation_prompt: bool) -> str:
        if len(self.messages) >= _LONG:
            if add_generation_prompt not in self._beginnings:
                self._beginnings[add_generation_prompt] = self.template.prefixes(
                    self.messages, **self.options, add_generation_prompt=add_generation_prompt
                )
            beginnings = self._beginnings[add_generation_prompt]
            text = beginnings and beginnings.of(turns)
            if text is not None:
                return text
        return self._text(self.messages[:turns], add_generation_prompt=add_generation_prompt)

    def before_answer(self, turns: int) -> str:
        """The first `turns` turns as they are shown once they are answered, up to the answer."""
        answer = {"role": "assistant", "content": self.template.content(ANSWER)}
        text = self._text([*self.messages[:turns], answer], add_generation_prompt=False)
        return text.rpartition(ANSWER)[0]

    def _text(self, messages: list[dict[str, Any]], **options: Any) -> str:
        return self.template.render(messages, self.where, **self.options, **options)

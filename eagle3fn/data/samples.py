"""Conversations to training samples: what an engine's target reads and writes.

A sample is the prompt's ids, as the chat template renders the turns before an answer with the
generation prompt, and then the ids that the target writes: the answer and one stop token.
Supervised are exactly the written ids. Prompt and answer are tokenized apart. A further answer
shares the sample if its own prompt begins with these very ids; otherwise it has a sample of its
own. What follows the last supervised token within the maximal length is left out: no loss reads it.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from eagle3fn.base.errors import UserError
from eagle3fn.data.rendered import is_in
from eagle3fn.data.rendering import Rendering
from eagle3fn.data.row_values import text_of
from eagle3fn.data.template import ChatTemplate
from eagle3fn.data.tokens import Tokens
from eagle3fn.data.turns import Conversation, Turn
from eagle3fn.data.written import EMPTY, Answer, Answers, not_rendered

# Why an answer or a row gives no sample.
NO_ANSWER = "have no assistant turn"
NOT_TRAINED = "are not trained, by weight or train"
NO_QUESTION = "begin with an answer"
TOO_LONG = "have no supervised token within the maximal length"

# What is worth a look in an answer that is in a sample.
EMPTY_THOUGHT = (
    "begin with an empty thought that the template writes; without thinking, give "
    "--template-arg enable_thinking=false"
)


_EMPTY_THOUGHT = re.compile(r"\s*<([\w:.-]+)>\s*</\1>")


class Encoded(NamedTuple):
    """A sample's tokens and mask."""

    id: str
    input_ids: Tensor  # (S,) int64
    token_mask: Tensor  # (S,) int64, 1 on what the target writes


class Samples(NamedTuple):
    """What a row gives."""

    samples: list[Encoded]
    dropped: list[str]  # reasons, one an answer that is not among them
    notes: list[str] = []  # noqa: RUF012  what is worth a look, one an answer
    cut: int = 0  # supervised tokens of `samples` beyond the maximal length


class SampleMaker:
    """Makes samples by a target's tokenizer and chat template.

    Args:
        template: the target's.
        max_length: tokens that a sample is cut to.
    """

    def __init__(self, template: ChatTemplate, max_length: int) -> None:
        self.template = template
        self.max_length = max_length
        self.tokens = Tokens(template)

    def samples(self, name: str, conversation: Conversation, where: str) -> Samples:
        """The samples of a row, in the order of its answers.

        The first is called `name`; further ones have the number of their first answer's turn after
        it, as in `name:4`.

        Raises:
            UserError: the template refuses the turns, or does not render something that they say;
                `where` names the row.
        """
        if conversation.text is not None:
            return self._plain(name, conversation.text)
        if conversation.arguments:
            self.template.check_arguments(conversation.arguments, where)

        made: list[Encoded] = []
        dropped: list[str] = []
        notes: list[str] = []
        lost = 0
        for number, ids, mask in self._sequences(conversation, where, dropped, notes):
            full_name = f"{name}:{number + 1}" if made else name
            end = needed_tokens(mask[: self.max_length])
            made.append(_encoded(full_name, ids[:end], mask[:end]))
            lost += sum(mask[self.max_length :])
        # The reason of a row that gives nothing is the first: one that is not the row's own choice.
        return Samples(made, dropped + _not_trained(conversation), notes, lost)

    def _plain(self, name: str, text: str) -> Samples:
        """A text without turns: every token is supervised but the first, which has no prompt."""
        ids = self.tokens.document(text)
        kept = ids[: self.max_length]
        if len(kept) < 2:
            return Samples([], [EMPTY])
        sample = _encoded(name, kept, [0] + [1] * (len(kept) - 1))
        return Samples([sample], [], cut=len(ids) - len(kept))

    def _sequences(
        self, conversation: Conversation, where: str, dropped: list[str], notes: list[str]
    ) -> Iterator[tuple[int, list[int], list[int]]]:
        """For each sample the number of its first answer's turn, ids and mask, not yet cut."""
        rendering = Rendering(self.template, conversation, where)
        answers = Answers(self.tokens.ends, conversation, rendering)
        sequence: _Sequence | None = None
        seen = 0  # turns that were looked for in a prompt
        shown = _Shown(conversation.turns, self.tokens)
        for place, number in enumerate(conversation.supervised):
            if number == 0:
                dropped.append(NO_QUESTION)
                continue

            # The prompt: it goes on after the last answer, or begins a sample.
            prompt = rendering.prompt(number)
            self._check_shown(conversation, seen, number, prompt, where)
            seen = number
            if not (sequence and sequence.go_on(prompt, self.tokens)):
                if sequence and sequence.first is not None:
                    yield sequence.first, sequence.ids, sequence.mask
                sequence = _Sequence(prompt, self.tokens)
            if len(sequence.ids) >= self.max_length:
                # A later prompt can be shorter, without the thoughts of this one; not without what
                # every prompt shows.
                dropped.append(TOO_LONG)
                if shown.tokens(number) >= self.max_length:
                    dropped += [TOO_LONG] * (len(conversation.supervised) - place - 1)
                    break
                continue

            # The answer.
            answer = answers.answer(number, prompt)
            if isinstance(answer, str):
                dropped.append(answer)
                continue
            said = text_of(conversation.turns[number]["content"])
            ids = self.tokens.answer(answer.text, answer.literal)
            if _EMPTY_THOUGHT.match(answer.text) and not _EMPTY_THOUGHT.match(said):
                notes.append(EMPTY_THOUGHT)
            sequence.answered(number, answer, ids, self.tokens.ends.stop_id(answer.stop))

        if sequence and sequence.first is not None:
            yield sequence.first, sequence.ids, sequence.mask

    # What is rendered

    def _check_shown(
        self, conversation: Conversation, start: int, stop: int, prompt: str, where: str
    ) -> None:
        """Refuse turns or tools that the prompt does not show.

        That a text is in the prompt says little where another turn has the same one. So it is also
        asked whether the template shows tools, calls and the turn's role at all. The texts of
        answers are not looked for: a template may drop the thoughts of earlier ones.
        """
        name = f"the chat template of {self.template.name}"
        for number, turn in enumerate(conversation.turns[start:stop], start):
            content = turn["content"]
            texts = [content] if isinstance(content, str) else content
            if turn["role"] != "assistant" and any(text.strip() for text in texts):
                shown = all(is_in(text, prompt) for text in texts)
                if turn["role"] != "user":
                    shown = shown and self.template.has_role(turn["role"], number == 0)
                if not shown:
                    raise UserError(
                        f"{where}: turn {number + 1}: {name} does not render the text of role "
                        f"{turn['role']}; write it into a turn of another role"
                    )
            for call in turn.get("tool_calls", []):
                if call["function"]["name"] not in prompt or not self.template.has_calls:
                    raise not_rendered(f"{where}: turn {number + 1}", name, call)
        for tool in conversation.tools if start == 0 else ():
            if tool["function"]["name"] not in prompt or not self.template.has_tools:
                raise UserError(
                    f"{where}: tools: {name} does not render {tool['function']['name']}; "
                    "delete tools, or take a target that has them"
                )


class _Sequence:
    """A sample that grows by prompts and answers.

    The tokenizer cuts at a stop token in any case. So to see whether a longer prompt has the ids
    of this sample, only the text since the last such cut is tokenized again.
    """

    def __init__(self, prompt: str, tokens: Tokens) -> None:
        self.first: int | None = None  # the first answer's turn
        self.text = prompt
        self.ids = tokens.prompt(prompt)
        self.mask = [0] * len(self.ids)
        # Text and ids since the last cut, whose token they begin with; at first, all.
        self._segment = prompt
        self._segment_ids = list(self.ids)
        self._cut: tuple[str, int] | None = None  # the stop token of the answer added last

    def answered(self, number: int, answer: Answer, ids: list[int], stop_id: int) -> None:
        """Add what the target wrote as turn `number`, and its stop token."""
        self.first = number if self.first is None else self.first
        ids = [*ids, stop_id]
        self._segment += answer.text + answer.stop
        self._segment_ids += ids
        self._cut = (answer.stop, stop_id)

        self.text += answer.text + answer.stop
        self.ids += ids
        self.mask += [1] * len(ids)

    def go_on(self, prompt: str, tokens: Tokens) -> bool:
        """Add what `prompt` has after this sample; False if it does not begin with its ids."""
        if not prompt.startswith(self.text):
            return False
        added = prompt[len(self.text) :]
        ids = tokens.prompt(self._segment + added)
        known = len(self._segment_ids)
        if ids[:known] != self._segment_ids:
            return False

        added_ids = ids[known:]
        if self._cut and self._cut[0] in tokens.cuts:
            self._segment = self._cut[0]
            self._segment_ids = [self._cut[1]]
        self._segment += added
        self._segment_ids += added_ids
        self._cut = None

        self.text = prompt
        self.ids += added_ids
        self.mask += [0] * len(added_ids)
        return True


class _Shown:
    """Counts the tokens of turns that every later prompt shows: all but thoughts."""

    def __init__(self, turns: list[Turn], tokens: Tokens) -> None:
        self._turns = turns
        self._encode = tokens.prompt
        self._counted = 0  # turns
        self._tokens = 0

    def tokens(self, turns: int) -> int:
        """Tokens of the first `turns` turns, none of them counted that may be left out."""
        for turn in self._turns[self._counted : turns]:
            if turn["role"] != "assistant":
                self._tokens += len(self._encode(text_of(turn["content"]).strip()))
        self._counted = max(self._counted, turns)
        return self._tokens


def needed_tokens(mask: list[int]) -> int:
    """How many tokens of a sample training needs: up to the one after the last supervised one.

    Attention looks back alone. SpecForge's mask trains one row later than ours, so that one stays.
    """
    last = max((place for place, written in enumerate(mask) if written), default=-1)
    return min(last + 2, len(mask)) if last >= 0 else len(mask)


def _encoded(name: str, ids: list[int], mask: list[int]) -> Encoded:
    return Encoded(
        name, torch.tensor(ids, dtype=torch.int64), torch.tensor(mask, dtype=torch.int64)
    )


def _not_trained(conversation: Conversation) -> list[str]:
    """A reason for each answer that the row does not train, or that it has none."""
    answers = sum(turn["role"] == "assistant" for turn in conversation.turns)
    return [NOT_TRAINED] * (answers - len(conversation.supervised)) if answers else [NO_ANSWER]

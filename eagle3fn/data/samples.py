"""Conversations to training samples: what an engine's target reads and writes.

A sample is the prompt's ids, as the chat template renders the turns before an answer with the
generation prompt, and then the ids that the target writes: the answer and one stop token.
Supervised are exactly the written ids. Prompt and answer are tokenized apart. A further answer
shares the sample if its own prompt begins with these very ids; otherwise it has a sample of its
own.
"""

import json
import re
from collections.abc import Iterator
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eagle3fn.base.errors import UserError
from eagle3fn.data.template import ChatTemplate, Rendering
from eagle3fn.data.turns import Conversation, Turn, text_of

# Why an answer or a row gives no sample.
NO_ANSWER = "have no assistant turn"
NOT_TRAINED = "have weight 0 on every assistant turn"
NO_QUESTION = "begin with an answer"
EMPTY = "have an empty answer"
TOO_LONG = "have no supervised token within the maximal length"
NO_THOUGHT = "answer without a thought, where the prompt opens one"

_TAG = re.compile(r"</?(\w+)>")
_BLANK = re.compile(r"\s+")
_LEADS = ("", "\n", ".", "]")


class Encoded(NamedTuple):
    """A sample's tokens and mask."""

    id: str
    input_ids: Tensor  # (S,) int64
    token_mask: Tensor  # (S,) int64, 1 on what the target writes


class Samples(NamedTuple):
    """What a row gives."""

    samples: list[Encoded]
    dropped: list[str]  # reasons, one an answer that is not among them


class Answer(NamedTuple):
    """What the target writes after a prompt."""

    text: str
    stop: str  # the token after it


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

        made = []
        dropped = [] if conversation.supervised else [_why_none(conversation)]
        for number, ids, mask in self._sequences(conversation, where, dropped):
            full_name = f"{name}:{number + 1}" if made else name
            sample = _encoded(full_name, ids[: self.max_length], mask[: self.max_length])
            if sample.token_mask.any():
                made.append(sample)  # else its reasons are among `dropped`
        return Samples(made, dropped)

    def _plain(self, name: str, text: str) -> Samples:
        """A text without turns: every token is supervised but the first, which has no prompt."""
        ids = self.tokens.document(text)[: self.max_length]
        if len(ids) < 2:
            return Samples([], [EMPTY])
        return Samples([_encoded(name, ids, [0] + [1] * (len(ids) - 1))], [])

    def _sequences(
        self, conversation: Conversation, where: str, dropped: list[str]
    ) -> Iterator[tuple[int, list[int], list[int]]]:
        """For each sample the number of its first answer's turn, ids and mask, not yet cut."""
        rendering = self.template.rendering(conversation, where)
        sequence: _Sequence | None = None
        seen = 0  # turns that were looked for in a prompt
        for place, number in enumerate(conversation.supervised):
            if number == 0:
                dropped.append(NO_QUESTION)
                continue

            # The prompt: it goes on after the last answer, or begins a sample.
            prompt = rendering.prompt(number)
            self._check_shown(conversation, seen, number, prompt, where)
            seen = number
            if not (sequence and sequence.go_on(prompt, self.tokens)):
                if sequence:
                    yield sequence.first, sequence.ids, sequence.mask
                sequence = _Sequence(number, prompt, self.tokens)
            if len(sequence.ids) >= self.max_length:
                # Every later prompt is longer.
                dropped += [TOO_LONG] * (len(conversation.supervised) - place)
                break

            # The answer.
            answer = self._answer(conversation, rendering, number, prompt)
            if isinstance(answer, str):
                dropped.append(answer)
                continue
            own = _own_texts(conversation.turns[number])
            ids = self.tokens.answer(answer.text, own, f"{where}: turn {number + 1}")
            sequence.answered(answer, ids, self.template.stop_id(answer.stop))

        if sequence:
            yield sequence.first, sequence.ids, sequence.mask

    # What is rendered

    def _check_shown(
        self, conversation: Conversation, start: int, stop: int, prompt: str, where: str
    ) -> None:
        """Refuse turns or tools that the prompt does not show.

        The texts of answers are not looked for: a template may drop the thoughts of earlier ones.
        """
        template = f"the chat template of {self.template.name}"
        for number, turn in enumerate(conversation.turns[start:stop], start + 1):
            content = turn["content"]
            texts = [content] if isinstance(content, str) else content
            if turn["role"] != "assistant" and not all(_is_in(text, prompt) for text in texts):
                raise UserError(
                    f"{where}: turn {number}: {template} does not render the text of role "
                    f"{turn['role']}; write it into a turn of another role"
                )
            for call in turn.get("tool_calls", []):
                if call["function"]["name"] not in prompt:
                    raise _not_rendered(f"{where}: turn {number}", template, call)
        for tool in conversation.tools if start == 0 else ():
            if tool["function"]["name"] not in prompt:
                raise UserError(
                    f"{where}: tools: {template} does not render {tool['function']['name']}; "
                    "delete tools, or take a target that has them"
                )

    def _answer(
        self, conversation: Conversation, rendering: Rendering, number: int, prompt: str
    ) -> Answer | str:
        """What the target writes as turn `number`, or the reason that it cannot be known."""
        turn = conversation.turns[number]
        content = text_of(turn["content"])
        if not content.strip() and "tool_calls" not in turn and "reasoning" not in turn:
            return EMPTY

        through = rendering.through(number + 1)
        if not through.startswith(prompt):
            return self._after_supplied(turn, rendering, number, prompt, through)
        body, stop = self._split(through[len(prompt) :], turn)
        self._check_written(turn, body, f"{rendering.where}: turn {number + 1}")

        # The row's own text, where the template changes nothing but blanks, or leaves its thought
        # out: it is what the target wrote.
        thought, closed, visible = content.rpartition("</think>")
        leaves_out = closed and not _is_in(thought.replace("<think>", ""), body)
        same = _squeezed(visible if leaves_out else content) == _squeezed(body)
        return Answer(content if same and "tool_calls" not in turn else body, stop)

    def _after_supplied(
        self, turn: Turn, rendering: Rendering, number: int, prompt: str, through: str
    ) -> Answer | str:
        """What the target writes where the prompt ends with a text that history does not show."""
        content = text_of(turn["content"])
        where = f"{rendering.where}: turn {number + 1}"
        template = f"the chat template of {self.template.name}"

        # What the prompt has in common with any rendered answer, and what it supplies after that.
        head = rendering.head(number, prompt)
        if not through.startswith(head):
            raise UserError(
                f"{where}: {template} renders the turns before it in another way once it is "
                "answered; mend or delete the row"
            )
        supplied = prompt[len(head) :]
        body, stop = self._split(through[len(head) :], turn)

        # A thought that the template leaves out would be lost.
        if "reasoning" in turn:
            opening = supplied.strip() or "<think>"
            raise UserError(
                f"{where}: {template} does not render reasoning_content; write the thought into "
                f"content, after {opening}"
            )
        if "tool_calls" in turn:
            self._check_written(turn, body, where)
            return Answer(body, stop)

        # The answer repeats the supplied text, or goes on after it.
        beginning = supplied.strip()
        if beginning and content.lstrip().startswith(beginning):
            rest = content.lstrip().removeprefix(beginning)
            return Answer(rest.removeprefix(supplied[len(supplied.rstrip()) :]), stop)
        tag = _opened(supplied)
        if tag:
            return Answer(content, stop) if f"</{tag}>" in content else NO_THOUGHT
        if _squeezed(content) != _squeezed(body):
            raise UserError(
                f"{where}: the prompt supplies {supplied!r}, and this answer begins in another "
                "way; change --template-arg, or mend or delete the row"
            )
        return Answer(content, stop)

    def _split(self, written: str, turn: Turn) -> tuple[str, str]:
        """What is written before the stop token, and the stop token."""
        found = self.template.stop_in(written, _own_texts(turn))
        if found:
            place, stop = found
            return written[:place], stop
        return written.rstrip(), self.template.stop_after("tool_calls" in turn)

    def _check_written(self, turn: Turn, body: str, where: str) -> None:
        """Refuse a thought, a tool call or a text that the template does not render."""
        template = f"the chat template of {self.template.name}"
        if not _is_in(turn.get("reasoning", ""), body):
            raise UserError(
                f"{where}: {template} does not render reasoning_content; "
                "write it into content, or take a target that thinks"
            )
        for call in turn.get("tool_calls", []):
            if call["function"]["name"] not in body:
                raise _not_rendered(where, template, call)
        visible = text_of(turn["content"]).rpartition("</think>")[2]
        if not _is_in(visible, body):
            raise UserError(
                f"{where}: {template} changes the text of this answer; mend or delete the row"
            )


def _not_rendered(where: str, template: str, call: dict[str, Any]) -> UserError:
    return UserError(
        f"{where}: {template} does not render tool_calls ({call['function']['name']}); "
        "write the call as content, or take a target that has tools"
    )


class _Sequence:
    """A sample that grows by prompts and answers.

    The tokenizer cuts at a stop token in any case. So to see whether a longer prompt has the ids
    of this sample, only the text since the last such cut is tokenized again.
    """

    def __init__(self, first: int, prompt: str, tokens: "Tokens") -> None:
        self.first = first
        self.text = prompt
        self.ids = tokens.prompt(prompt)
        self.mask = [0] * len(self.ids)
        # Text and ids since the last cut, whose token they begin with; at first, all.
        self._segment = prompt
        self._segment_ids = list(self.ids)
        self._cut: tuple[str, int] | None = None  # the stop token of the answer added last

    def answered(self, answer: Answer, ids: list[int], stop_id: int) -> None:
        """Add what the target wrote, and its stop token."""
        ids = [*ids, stop_id]
        self._segment += answer.text + answer.stop
        self._segment_ids += ids
        self._cut = (answer.stop, stop_id)

        self.text += answer.text + answer.stop
        self.ids += ids
        self.mask += [1] * len(ids)

    def go_on(self, prompt: str, tokens: "Tokens") -> bool:
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


class Tokens:
    """Texts to ids, as an engine makes them of a prompt, and as the target writes them."""

    def __init__(self, template: ChatTemplate) -> None:
        self.tokenizer = template.tokenizer
        self.special = template.special
        self.cuts = {token.content for token in self.tokenizer.added_tokens_decoder.values()}
        ends = {*template.stops, *(self.tokenizer.special_tokens_map or {}).values()}
        # `<think>` and its like are written by the target as tokens, whatever the tokenizer calls
        # them; other special tokens in an answer's text are text.
        self._text_tokens = [
            token for token in self.special if not (_is_tag(token, self.cuts) and token not in ends)
        ]
        self._as_text = _any_of(self._text_tokens)

    def prompt(self, text: str) -> list[int]:
        """Ids of a rendered prompt: special tokens are read as such."""
        return self._encode(text)

    def document(self, text: str) -> list[int]:
        """Ids of a plain text, with what the tokenizer puts before it."""
        return self.tokenizer(text).input_ids

    def answer(self, text: str, own: list[str], where: str) -> list[int]:
        """Ids of what the target writes, tokenized apart from the prompt.

        Args:
            text: all of it, without the stop token.
            own: the row's own texts. A special token in them is text; one that the template wrote
                is the token.
            where: names the row in errors.

        Raises:
            UserError: an own text with a special token in it is not in `text` as it is.
        """
        risky = [each for each in own if self._as_text.search(each)]
        if not risky:
            return self._continuation(text)

        # Where the own texts lie: a token in them is no cut.
        spans = []
        for each in risky:
            place = text.find(each)
            if place < 0:
                token = self._as_text.search(each)
                raise UserError(
                    f"{where}: an answer has {token[0] if token else each!r} as text, and the chat "
                    "template changes it; mend or delete the row"
                )
            spans.append((place, place + len(each)))

        ids: list[int] = []
        begin = 0
        for match in self._as_text.finditer(text):
            if any(start <= match.start() < end for start, end in spans):
                continue
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
        options = {"split_special_tokens": True} if as_text else {}
        return self.tokenizer(text, add_special_tokens=False, **options).input_ids


# Texts


def _own_texts(turn: Turn) -> list[str]:
    """The row's own texts in a turn, as a template may render them; none is empty."""
    texts = [text_of(turn["content"]), turn.get("reasoning", "")]
    for call in turn.get("tool_calls", []):
        texts.append(call["function"]["name"])
        texts += _strings(call["function"]["arguments"])
    found = []
    for text in texts:
        # As it is, without blanks around it, as JSON.
        forms = [text, text.strip(), json.dumps(text, ensure_ascii=False)[1:-1]]
        found += [form for form in dict.fromkeys(forms) if form.strip()]
    return found


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for each in inner for text in _strings(each)]


def _is_in(text: str, rendered: str) -> bool:
    """Whether a template rendered a text, as it is, without blanks around it, or as JSON."""
    text = text.strip()
    if not text or text in rendered:
        return True
    escaped = (json.dumps(text, ensure_ascii=each)[1:-1] for each in (False, True))
    if any(each in rendered for each in escaped):
        return True
    return _squeezed(text) in _squeezed(rendered)


def _squeezed(text: str) -> str:
    return _BLANK.sub("", text)


def _opened(text: str) -> str | None:
    """The name of the last tag in `text` that is opened and not closed."""
    opened: list[str] = []
    for match in _TAG.finditer(text):
        if not match[0].startswith("</"):
            opened.append(match[1])
        elif match[1] in opened:
            opened.remove(match[1])
    return opened[-1] if opened else None


def _is_tag(token: str, known: set[str]) -> bool:
    match = _TAG.fullmatch(token)
    return bool(match) and {f"<{match[1]}>", f"</{match[1]}>"} <= known


def _any_of(tokens: list[str]) -> re.Pattern[str]:
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _encoded(name: str, ids: list[int], mask: list[int]) -> Encoded:
    return Encoded(
        name, torch.tensor(ids, dtype=torch.int64), torch.tensor(mask, dtype=torch.int64)
    )


def _why_none(conversation: Conversation) -> str:
    has_answer = any(turn["role"] == "assistant" for turn in conversation.turns)
    return NOT_TRAINED if has_answer else NO_ANSWER

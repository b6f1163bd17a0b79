"""Answers by a server with OpenAI's interface: many asked at once, each kept as it comes.

An answer is kept by the conversation that it belongs to and its number there, not by the row's
place: a file whose rows were mended, deleted or added keeps the answers of the others.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any, NamedTuple

from eagle3fn.base.errors import UserError
from eagle3fn.base.files import append_line, json_sha256, write_jsonl
from eagle3fn.data.asked import Asked, Given, is_finished, turns_before
from eagle3fn.data.endpoint import Endpoint
from eagle3fn.data.generate import Sampling
from eagle3fn.data.parts import Parts
from eagle3fn.data.regenerate import OnProgress
from eagle3fn.data.template import ChatTemplate
from eagle3fn.data.tools import calls_of
from eagle3fn.data.turns import Turn

_REASONING = ("reasoning_content", "reasoning")  # names of a thought, by the kind of server


class ByEndpoint(NamedTuple):
    """A server answers, `concurrent` conversations at once."""

    endpoint: Endpoint
    model: str  # its name there
    template: ChatTemplate
    positions: int | None
    concurrent: int = 16

    def parts(self, out: str | Path, rows: list[Asked], sampling: Sampling, seed: int) -> Parts:
        """One file, to which answers are appended."""
        made_from = [self.model, self.template.tokenizer.chat_template, self.template.arguments]
        return Parts(out, json_sha256([*made_from, sampling, seed, "endpoint"])[:12])

    def answers(
        self,
        parts: Parts,
        rows: list[Asked],
        sampling: Sampling,
        seed: int,
        on_progress: OnProgress,
    ) -> list[list[Given]]:
        """Ask for what is not kept yet.

        Raises:
            UserError: the server refuses; names the row.
        """
        kept = _Kept(parts.folder / f"{parts.digest}-answers.jsonl")
        keys = _keys(rows)
        given = [kept.answers(key) for key in keys]
        unfinished = [index for index, row in enumerate(rows) if not is_finished(row, given[index])]
        done = len(rows) - len(unfinished)
        on_progress(done, len(rows))

        waiting = iter(unfinished)
        threads = min(self.concurrent, len(unfinished))
        with _asking(self.endpoint, threads) as (questions, replies):

            def ask(index: int) -> None:
                drawn = [seed, keys[index], len(given[index])]
                body = _body(self, rows[index], given[index], sampling, drawn)
                questions.put((index, rows[index].where, body))

            in_flight = 0
            for index in islice(waiting, threads):
                ask(index)
                in_flight += 1

            while in_flight:
                index, reply = replies.get()
                if isinstance(reply, BaseException):
                    raise reply
                kept.add(keys[index], len(given[index]), reply)
                given[index].append(reply)

                # The conversation goes on; or the next one begins.
                going: int | None = index
                if is_finished(rows[index], given[index]):
                    done += 1
                    on_progress(done, len(rows))
                    going = next(waiting, None)
                if going is None:
                    in_flight -= 1
                else:
                    ask(going)
        return given


def _keys(rows: Sequence[Asked]) -> list[str]:
    """A name for each conversation: of what is asked in it, and how often it was there before."""
    seen: Counter[str] = Counter()
    keys = []
    for row in rows:
        digest = json_sha256([row.conversation[:-1], row.places])[:24]
        keys.append(f"{digest}-{seen[digest]}")
        seen[digest] += 1
    return keys


class _Kept:
    """The file of answers: a line each, appended as they come.

    A line that a kill cut off, or that is no answer, is removed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._given: dict[str, list[Given]] = {}
        if not path.exists():
            return
        lines = path.read_bytes().splitlines()
        rows = [value for value in map(_parsed, lines) if value is not None]
        for value in rows:
            known = self._given.setdefault(value["key"], [])
            if len(known) == value["number"]:
                known.append(Given(value["turn"], value["cut"]))
        write_jsonl(path, rows)  # each line whole, and with its end

    def answers(self, key: str) -> list[Given]:
        """Those of a conversation."""
        return self._given.get(key, [])

    def add(self, key: str, number: int, given: Given) -> None:
        """Keep another one."""
        row = {"key": key, "number": number, "turn": given.turn, "cut": given.cut}
        append_line(self.path, _json(row))


def _parsed(line: bytes) -> dict[str, Any] | None:
    """A line of the file; None if it is not one that `_Kept.add` wrote."""
    try:
        row = json.loads(line)
        kinds = {name: type(row[name]) for name in ("key", "number", "turn", "cut")}
        content = row["turn"]["content"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    right = {"key": str, "number": int, "turn": dict, "cut": bool}
    return row if kinds == right and isinstance(content, str) else None


# Threads


@contextmanager
def _asking(
    endpoint: Endpoint, count: int
) -> Iterator[tuple["SimpleQueue[Any]", "SimpleQueue[Any]"]]:
    """Threads that take `(index, where, body)` from a queue and put `(index, answer)`, or the
    error, into another.

    They are daemons: a program that ends does not wait for a server.
    """
    closed = Event()
    questions: SimpleQueue[Any] = SimpleQueue()
    replies: SimpleQueue[Any] = SimpleQueue()

    def work() -> None:
        while (question := questions.get()) is not None:
            index, where, body = question
            try:
                reply: Any = endpoint.complete(body, given_of, closed.wait)
            except UserError as error:
                reply = UserError(f"{where}: {error}")
            except BaseException as error:  # is raised in the main thread
                reply = error
            replies.put((index, reply))

    for _ in range(count):
        Thread(target=work, daemon=True).start()
    try:
        yield questions, replies
    finally:
        closed.set()
        for _ in range(count):
            questions.put(None)


# Requests and answers


def _body(
    source: ByEndpoint, row: Asked, given: Sequence[Given], sampling: Sampling, drawn: list[Any]
) -> dict[str, Any]:
    """The request for a conversation's next answer."""
    body: dict[str, Any] = {
        "model": source.model,
        "messages": [message_of(turn) for turn in turns_before(row, given)],
        "max_tokens": sampling.max_new,
        "temperature": sampling.temperature,
    }
    if sampling.temperature > 0:
        body["top_p"] = sampling.top_p
        body["seed"] = int(json_sha256(drawn)[:7], 16)
    if row.conversation.tools:
        body["tools"] = row.conversation.tools
    arguments = {**source.template.arguments, **row.conversation.arguments}
    if arguments:
        body["chat_template_kwargs"] = arguments
    return body


def message_of(turn: Turn) -> dict[str, Any]:
    """A turn as OpenAI's interface takes it: arguments of calls as JSON texts, parts by type."""
    content = turn["content"]
    message = {key: turn[key] for key in ("role", "tool_call_id", "name") if key in turn}
    message["content"] = (
        content
        if isinstance(content, str)
        else [{"type": "text", "text": text} for text in content]
    )
    if "reasoning" in turn:
        message["reasoning_content"] = turn["reasoning"]
    if "tool_calls" in turn:
        message["tool_calls"] = [_call_message(call) for call in turn["tool_calls"]]
    return message


def _call_message(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return {**call, "function": {**function, "arguments": _json(function["arguments"])}}


def given_of(tree: dict[str, Any]) -> Given:
    """The answer in a server's JSON.

    Raises:
        ValueError: there is none.
    """
    choices = tree.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    if not (isinstance(choice, dict) and isinstance(choice.get("message"), dict)):
        raise ValueError("no message in it")
    message = choice["message"]
    content = message.get("content")
    if content is not None and not isinstance(content, str):
        raise ValueError("its content is no text")

    turn: Turn = {"role": "assistant", "content": _encodable(content or "")}
    thought = next((message[name] for name in _REASONING if message.get(name)), None)
    if thought is not None:
        if not isinstance(thought, str):
            raise ValueError("its thought is no text")
        turn["reasoning"] = _encodable(thought)
    try:
        calls = calls_of(message.get("tool_calls"), "its calls")
    except UserError as error:
        raise ValueError(str(error)) from None
    if calls:
        turn["tool_calls"] = calls
    return Given(turn, cut=choice.get("finish_reason") == "length")


def _encodable(text: str) -> str:
    """A text that UTF-8 has bytes for: half of a surrogate pair becomes a question mark."""
    return text.encode("utf-8", "replace").decode()


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)

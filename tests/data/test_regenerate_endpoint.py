"""Answers given anew by a server: requests, concurrency, faults, resuming, and the key."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from eagle3fn.base.errors import UserError
from eagle3fn.base.files import write_jsonl
from eagle3fn.base.read import read_jsonl
from eagle3fn.cli import main
from eagle3fn.data import by_endpoint as module
from eagle3fn.data.by_endpoint import ByEndpoint
from eagle3fn.data.endpoint import Endpoint
from eagle3fn.data.generate import Sampling
from eagle3fn.data.regenerate import Regenerated, regenerate
from eagle3fn.data.turns import conversation_of
from tests.data.chat_server import (
    ChatServer,
    Fault,
    chat,
    chat_server,
    failing,
    halved,
    said,
    silent,
    slow,
)
from tests.factories import CHATML, talk, tiny_model, tiny_template, tiny_tokenizer

GREEDY = Sampling(0, 1, 6)
SYSTEM = {"role": "system", "content": "be brief"}
ROWS: list[dict[str, Any]] = [
    {"prompt": "first"},
    {"id": "b", "conversations": talk("one", "theirs", "two", "theirs too")},
    {"messages": [SYSTEM, *talk("three")]},
    {"id": "d", "conversations": talk("four", "theirs", "five")},
    {"id": "e", "conversations": talk("six", "theirs", "seven", "theirs", "eight", "theirs")},
]
ANSWERS = 9
KEY = "sk-very/secret+key"


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with chat_server() as running:
        yield running


def write(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    write_jsonl(path, rows)
    return path


def answer(
    server: ChatServer,
    prompts: Path,
    out: Path,
    sampling: Sampling = GREEDY,
    concurrent: int = 3,
    template: Any = None,
    seed: int = 0,
    **options: Any,
) -> Regenerated:
    quick: dict[str, Any] = {"first_wait": 0.001, "seconds": 5.0, **options}
    template = template or tiny_template()
    endpoint = Endpoint(server.url, **quick)
    source = ByEndpoint(endpoint, "tiny", template, 256, concurrent)
    return regenerate(source, template, prompts, out, sampling, seed)


def check_written(out: Path, rows: list[dict[str, Any]] = ROWS) -> None:
    """Every answer of the file is the server's to the turns before it; the order is the rows'."""
    written = read_jsonl(out)
    assert [row["id"] for row in written] == [
        row.get("id", str(place)) for place, row in enumerate(rows, 1)
    ]
    for row in written:
        turns = row["conversations"]
        for place, turn in enumerate(turns):
            if turn["role"] == "assistant":
                assert turn["content"] == said(turns[:place])


def test_each_answer_is_given_to_the_conversation_so_far_in_the_files_order(server, tmp_path):
    server.delay = 0.01
    done = answer(server, write(tmp_path / "p.jsonl"), tmp_path / "c.jsonl")
    assert (done.conversations, done.answers, done.cut, done.empty) == (5, ANSWERS, 0, 0)
    check_written(tmp_path / "c.jsonl")
    assert len(server.bodies) == ANSWERS and set(server.asked().values()) == {1}
    assert {path.name for path in tmp_path.iterdir()} == {"p.jsonl", "c.jsonl"}


@pytest.mark.parametrize("concurrent", [1, 4])
def test_so_many_conversations_are_asked_at_once(server, tmp_path, concurrent):
    server.delay = 0.02
    rows = [{"prompt": f"number {i}"} for i in range(12)]
    answer(server, write(tmp_path / "p", rows), tmp_path / "c", concurrent=concurrent)
    assert server.most_waiting == concurrent


def test_requests_hold_the_settings(server, tmp_path):
    rows = [{"messages": [SYSTEM, *talk("one")]}]
    answer(server, write(tmp_path / "p", rows), tmp_path / "c")
    assert server.bodies == [
        {
            "model": "tiny",
            "messages": [SYSTEM, *talk("one")],
            "max_tokens": 6,
            "temperature": 0,
        }
    ]
    drawn = Sampling(0.7, 0.9, 5)
    for name, seed in (("d", 0), ("e", 0), ("f", 1)):
        answer(server, tmp_path / "p", tmp_path / name, drawn, seed=seed)
    one, same, other = server.bodies[1:]
    assert (one["temperature"], one["top_p"], one["max_tokens"]) == (0.7, 0.9, 5)
    assert one["seed"] == same["seed"] != other["seed"]
    assert "Authorization" not in server.headers[0]


def test_answers_to_the_same_prompt_are_drawn_apart(server, tmp_path):
    rows = [{"prompt": "again"}] * 3
    answer(server, write(tmp_path / "p", rows), tmp_path / "c", Sampling(1, 1, 6))
    assert len({body["seed"] for body in server.bodies}) == 3


# Answers


def answers_of(server: ChatServer, tmp_path: Path, given: dict[str, Any]) -> tuple[Any, dict]:
    """What comes of the answer `given` to the first of two turns."""
    server.faults.append(failing(given))
    prompts = write(tmp_path / "p", [{"messages": talk("one", "x", "two")}])
    done = answer(server, prompts, tmp_path / "c")
    (row,) = read_jsonl(tmp_path / "c")
    conversation_of(row, "c")  # it can be read again
    return done, row


def test_cut_answers_are_kept_and_counted(server, tmp_path):
    done, row = answers_of(server, tmp_path, chat("half a", "length"))
    assert (done.cut, row["cut"], row["answers"]) == (1, 1, 2)
    assert row["conversations"][1] == {"role": "assistant", "content": "half a"}


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_thoughts_are_kept_and_sent_with_the_conversation(server, tmp_path, name):
    done, row = answers_of(server, tmp_path, chat("five", **{name: "two and three"}))
    thought = {"role": "assistant", "content": "five", "reasoning": "two and three"}
    assert row["conversations"][1] == thought
    assert server.bodies[1]["messages"][1]["reasoning_content"] == "two and three"
    assert done.empty == 0


@pytest.mark.parametrize("content", ["", None, " \n"])
def test_empty_answers_are_kept_and_counted(server, tmp_path, content):
    done, row = answers_of(server, tmp_path, chat(content))
    assert (done.empty, done.answers) == (1, 2)
    assert row["conversations"][1]["content"].strip() == ""


def test_a_conversation_ends_at_the_targets_own_call_of_a_tool(server, tmp_path):
    call = {"id": "7", "type": "function", "function": {"name": "weather", "arguments": '{"a": 1}'}}
    done, row = answers_of(server, tmp_path, chat(None, "tool_calls", tool_calls=[call]))
    assert (done.calls, done.answers, done.empty) == (1, 1, 0)
    assert len(server.bodies) == 1
    assert [turn["role"] for turn in row["conversations"]] == ["user", "assistant"]
    assert conversation_of(row, "c").supervised == (1,)
    (found,) = row["conversations"][1]["tool_calls"]
    assert found["function"] == {"name": "weather", "arguments": {"a": 1}}


def test_kept_calls_parts_tools_and_arguments_are_sent_as_openai_takes_them(server, tmp_path):
    template = tiny_template(
        CHATML.replace("m['content']", "(m['content'] or '')")
        + "{% if tools or think %}{% for m in messages if m.tool_calls %}{% endfor %}{% endif %}"
    )
    tool = {"type": "function", "function": {"name": "weather", "parameters": {}}}
    call = {"function": {"name": "weather", "arguments": {"in": "Oslo"}}, "type": "function"}
    row = {
        "tools": [tool],
        "chat_template_kwargs": {"think": False},
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "a"}, "b"]},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "cold", "tool_call_id": "7"},
        ],
    }
    done = answer(server, write(tmp_path / "p", [row]), tmp_path / "c", template=template)
    assert (done.answers, done.kept) == (1, 1)
    (body,) = server.bodies
    assert body["tools"] == [tool] and body["chat_template_kwargs"] == {"think": False}
    user, called, result = body["messages"]
    assert user["content"] == [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert json.loads(called["tool_calls"][0]["function"]["arguments"]) == {"in": "Oslo"}
    assert "weight" not in called
    assert result == row["messages"][2]


def test_half_of_a_surrogate_pair_is_replaced(server, tmp_path):
    _, row = answers_of(server, tmp_path, chat("a \ud83d b"))
    assert row["conversations"][1]["content"] == "a ? b"


# Faults

HTML = b"<html><body>Bad gateway</body></html>"
PASSING: dict[str, list[Fault | None]] = {
    "429": [failing({"error": {"message": "slow down"}}, 429, Retry_After="0")],
    "500": [failing(b"oops", 500), failing(HTML, 502), failing(b"", 503), failing(b"", 529)],
    "no answer": [None, silent, silent],
    "half an answer": [None, halved],
    "a page in place of JSON": [None, failing(HTML)],
    "other JSON": [None, failing({"object": "error"}), failing([1]), failing({"choices": []})],
    "content that is no text": [None, failing(chat([1])), failing({"choices": [{"message": 3}]})],
}


@pytest.mark.parametrize("name", PASSING)
def test_faults_that_pass_are_tried_again(server, tmp_path, name):
    server.faults.extend(PASSING[name])
    done = answer(server, write(tmp_path / "p.jsonl"), tmp_path / "c.jsonl", concurrent=1)
    assert done.answers == ANSWERS
    check_written(tmp_path / "c.jsonl")
    faults = sum(fault is not None for fault in PASSING[name])
    assert len(server.bodies) == ANSWERS + faults


def test_waits_are_doubled_or_as_long_as_the_server_asks(server):
    """At most a minute; no wait follows the last try."""
    busy: list[Fault | None] = [failing(b"", 503) for _ in range(6)]
    busy[2] = failing(b"", 429, Retry_After="17")
    busy[3] = failing(b"", 429, Retry_After="3600")
    busy[4] = failing(b"", 429, Retry_After="Wed, 21 Oct 2026 07:28:00 GMT")
    server.faults.extend(busy)
    waits: list[float] = []
    endpoint = Endpoint(server.url, tries=6)
    with pytest.raises(UserError, match="after 6 tries"):
        endpoint.complete({}, module.given_of, lambda seconds: bool(waits.append(seconds)))
    assert waits == [1, 2, 17, 60, 16]

    # Where there is to be no other try, there is none.
    server.faults.extend(busy)
    with pytest.raises(UserError, match=r"503: \S+ \S+; mend"):
        endpoint.complete({}, module.given_of, lambda seconds: True)


def test_slow_answers_are_asked_for_again(server, tmp_path):
    """A connection on which nothing comes, and one on which there is always another letter."""
    server.faults.extend([lambda handler, body: time.sleep(0.6), slow(0.6)])
    prompts = write(tmp_path / "p", [{"prompt": "one"}])
    assert answer(server, prompts, tmp_path / "c", seconds=0.2).answers == 1
    assert len(server.bodies) == 3


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (400, r"p.jsonl:1: http.*/v1: refused, 400: too long; shorten, mend or delete the row"),
        (401, r"refused, 401: too long; put the server's key .* --api-key-env NAME"),
        (404, r"refused, 404: too long; --url must end .* or mend --model"),
        (307, r"refused, 307: too long; it sends elsewhere; name http://other/v1"),
    ],
)
def test_refusals_are_one_line_at_once(server, tmp_path, code, text):
    body = {"error": {"message": "too\n  long"}}
    server.faults.append(failing(body, code, Location="http://other/v1"))
    prompts = write(tmp_path / "p.jsonl", ROWS[:1])
    with pytest.raises(UserError, match=text) as caught:
        answer(server, prompts, tmp_path / "c.jsonl")
    assert len(server.bodies) == 1
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["p.jsonl"]


def test_redirects_are_not_followed(server, tmp_path):
    """Another address would be sent the key."""
    server.faults.append(failing(b"", 302, Location=f"{server.url}/other"))
    prompts = write(tmp_path / "p.jsonl", ROWS[:1])
    with pytest.raises(UserError, match=r"refused, 302: .*; it sends elsewhere; name .*/other"):
        answer(server, prompts, tmp_path / "c.jsonl")
    assert server.gets == []


def test_a_fault_that_stays_is_refused_after_all_tries(server, tmp_path):
    server.faults.extend([failing(HTML, 502)] * 4)
    prompts = write(tmp_path / "p", ROWS[:1])
    with pytest.raises(UserError, match=r"502: <html>.*Bad gateway.*, after 4 tries; mend the"):
        answer(server, prompts, tmp_path / "c", tries=4)
    assert len(server.bodies) == 4


def test_a_wrong_address_is_refused_at_once(server, tmp_path):
    """A server of pages, or none at all: neither has ever answered."""
    server.faults.append(failing(HTML))
    prompts = write(tmp_path / "p", ROWS[:1])
    with pytest.raises(UserError, match=r"answered no JSON object but '<html>"):
        answer(server, prompts, tmp_path / "c")
    assert len(server.bodies) == 1
    server.shutdown()  # closed while it listens, it could still take a connection and break it
    server.server_close()
    with pytest.raises(UserError, match=r"no server there \("):
        answer(server, prompts, tmp_path / "c")


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("localhost:8000/v1", "must be an address"),
        ("http://host:port/v1", "must be an address"),
        ("http://host/v1?key=secret", "must be an address"),
        ("http://name:secret@host/v1", "holds a name or key"),
    ],
)
def test_addresses_that_are_none_are_refused(url, text):
    with pytest.raises(UserError, match=text) as caught:
        Endpoint(url)
    assert "name:secret" not in str(caught.value)


# Resuming


class Killed(BaseException):
    pass


@pytest.mark.parametrize("kept", range(ANSWERS))
def test_nothing_that_was_kept_is_asked_again(server, tmp_path, monkeypatch, kept):
    """The run ends when so many answers are kept; others may be on their way."""
    prompts, out = write(tmp_path / "p.jsonl"), tmp_path / "c.jsonl"
    real = module.append_line
    lines = []

    def append(path: Path, text: str) -> None:
        if len(lines) == kept:
            raise Killed
        lines.append(text)
        real(path, text)

    monkeypatch.setattr(module, "append_line", append)
    with pytest.raises(Killed):
        answer(server, prompts, out)
    assert not out.exists()

    monkeypatch.setattr(module, "append_line", real)
    assert answer(server, prompts, out).answers == ANSWERS
    check_written(out)
    assert ANSWERS <= len(server.bodies) <= ANSWERS + 3
    assert not Path(f"{out}.parts").exists()


def half_done(server: ChatServer, prompts: Path, out: Path, at: int = 6) -> Path:
    """End a run at a request that is refused; returns the file of answers."""
    server.faults.extend([None] * at + [failing(b"no", 400)])
    with pytest.raises(UserError):
        answer(server, prompts, out, concurrent=1)
    server.bodies.clear()
    (kept,) = Path(f"{out}.parts").glob("*-answers.jsonl")
    assert len(kept.read_text().splitlines()) == at
    return kept


def test_a_line_that_a_kill_cut_off_is_asked_again(server, tmp_path):
    prompts, out = write(tmp_path / "p.jsonl"), tmp_path / "c.jsonl"
    kept = half_done(server, prompts, out)
    kept.write_bytes(kept.read_bytes()[:-20])

    # What comes after it stands on a line of its own, and is kept too.
    server.faults.extend([None] * 2 + [failing(b"no", 400)])
    with pytest.raises(UserError):
        answer(server, prompts, out, concurrent=1)
    assert [type(json.loads(line)) for line in kept.read_text().splitlines()] == [dict] * 7
    server.bodies.clear()
    answer(server, prompts, out)
    check_written(out)
    assert len(server.bodies) == ANSWERS - 7


NO_ANSWERS = (
    "5",
    '{"key": "x"}',
    '{"key": "x", "number": 0, "turn": null, "cut": false}',
    '{"key": "x", "number": 0, "turn": {"content": 5}, "cut": false}',
    '{"key": "x", "number": 0, "turn": {"content": ""}, "cut": "x"}',
)


@pytest.mark.parametrize("line", NO_ANSWERS)
def test_a_line_that_is_no_answer_is_removed(server, tmp_path, line):
    prompts, out = write(tmp_path / "p.jsonl"), tmp_path / "c.jsonl"
    kept = half_done(server, prompts, out)
    text = kept.read_text()
    key = json.loads(text.splitlines()[0])["key"]  # it would be that conversation's first answer
    line = line.replace('"key": "x"', f'"key": "{key}"')
    kept.write_text(f"{line}\n{text}")
    answer(server, prompts, out)
    check_written(out)
    assert len(server.bodies) == ANSWERS - 6


def test_no_more_threads_are_begun_than_conversations_are_left(server, tmp_path):
    answer(server, write(tmp_path / "p.jsonl"), tmp_path / "c.jsonl", concurrent=10**9)
    check_written(tmp_path / "c.jsonl")
    assert server.most_waiting <= len(ROWS)


def test_answers_are_kept_when_rows_before_them_are_deleted_or_added(server, tmp_path):
    prompts, out = write(tmp_path / "p.jsonl"), tmp_path / "c.jsonl"
    half_done(server, prompts, out)
    rows = [*ROWS[1:], {"id": "new", "prompt": "new"}]
    rows[1] = {"id": "3", **rows[1]}
    answer(server, write(prompts, rows), out)
    check_written(out, rows)
    assert len(server.bodies) == 1 + ANSWERS - 6


@pytest.mark.parametrize("change", ["sampling", "seed", "template"])
def test_answers_of_other_settings_are_not_taken_up(server, tmp_path, change):
    prompts, out = write(tmp_path / "p.jsonl"), tmp_path / "c.jsonl"
    half_done(server, prompts, out)
    sampling = Sampling(0, 1, 5) if change == "sampling" else GREEDY
    template = tiny_template(CHATML + " ") if change == "template" else None
    answer(server, prompts, out, sampling, template=template, seed=change == "seed")
    assert len(server.bodies) == ANSWERS


# The command line


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("target")
    tiny_model(eos_token_id=1).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def command(server: ChatServer, target: Path, prompts: Path, out: Path, *more: Any) -> list[str]:
    words = ["regenerate", "--target", target, "--conversations", prompts, "--out", out]
    words += ["--url", server.url, "--max-new", 6, "--temperature", 0, *more]
    return [str(word) for word in words]


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 143)]
)
def test_a_run_that_is_ended_goes_on_and_asks_twice_only_what_was_on_its_way(
    server, target, tmp_path, number, code
):
    rows = [{"id": f"r{i}", "messages": talk(f"{i}", "x", "and", "y")} for i in range(12)]
    prompts, out = write(tmp_path / "p.jsonl", rows), tmp_path / "c.jsonl"
    words = [sys.executable, "-m", "eagle3fn.cli"]
    words += command(server, target, prompts, out, "--concurrent", 3)
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    server.on_request = lambda count: os.kill(process.pid, number) if count == 11 else None
    _, text = process.communicate(timeout=120)
    assert process.returncode == code
    assert number == signal.SIGKILL or "go on with eagle3fn regenerate --target" in text
    assert not out.exists()

    server.on_request = lambda count: None
    assert main(words[3:]) == 0
    check_written(out, rows)
    asked = server.asked()
    assert len(asked) == 24
    assert max(asked.values()) == 2 or number == signal.SIGTERM  # the one that a kill came with
    assert sum(asked.values()) <= 24 + 3
    assert not Path(f"{out}.parts").exists()


def test_the_key_is_sent_and_nowhere_else(server, target, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("SERVERS_KEY", KEY)
    prompts, out = write(tmp_path / "p.jsonl"), tmp_path / "c.jsonl"
    words = command(server, target, prompts, out, "--api-key-env", "SERVERS_KEY", "--concurrent", 1)

    # A server that says it, in an error that it is refused by; the key must not be there in part.
    filler = "x" * 295
    message = f"wrong key {KEY} {KEY} {filler[:260]} {KEY}"
    server.faults.extend([None] * 3 + [failing({"error": {"message": message}}, 401)])
    assert main(words) == 2
    (kept,) = Path(f"{out}.parts").glob("*-answers.jsonl")
    text = capfd.readouterr()
    assert "wrong key *** ***" in text.err and "--api-key-env SERVERS_KEY" in text.err
    found = text.out + text.err + kept.read_text()

    assert main(words) == 0
    text = capfd.readouterr()
    found += text.out + text.err + out.read_text()
    assert "sk-" not in found
    assert {each["Authorization"] for each in server.headers} == {f"Bearer {KEY}"}


def reason_with_key(handler: Any, body: dict[str, Any]) -> None:
    """An error without a body, whose phrase says the key again."""
    handler.send_response(400, f"no {KEY}")
    handler.send_header("Content-Length", "0")
    handler.end_headers()


@pytest.mark.parametrize("fault", [reason_with_key, failing(b"", 302, Location=f"http://x/{KEY}")])
def test_a_key_that_a_server_says_again_is_not_shown(server, monkeypatch, fault):
    monkeypatch.setenv("SERVERS_KEY", KEY)
    server.faults.append(fault)
    with pytest.raises(UserError, match=r"\*\*\*") as caught:
        Endpoint(server.url, "SERVERS_KEY").complete({}, dict, lambda seconds: False)
    assert "sk-" not in str(caught.value)

    server.models = [KEY, "other"]
    with pytest.raises(UserError, match=r"several models or none \(\*\*\*, other\)"):
        Endpoint(server.url, "SERVERS_KEY").only_model()


@pytest.mark.parametrize("value", [None, "", "two words", "ключ"])
def test_a_variable_without_a_key_is_refused_by_its_name(
    server, target, tmp_path, monkeypatch, capsys, value
):
    if value is not None:
        monkeypatch.setenv("SERVERS_KEY", value)
    prompts = write(tmp_path / "p.jsonl")
    words = command(server, target, prompts, tmp_path / "c", "--api-key-env", "SERVERS_KEY")
    assert main(words) == 2
    text = capsys.readouterr().err
    assert "--api-key-env SERVERS_KEY: " in text
    assert not value or value not in text
    assert server.bodies == []


def test_the_only_model_of_the_server_is_taken_and_several_are_refused(
    server, target, tmp_path, capsys
):
    prompts = write(tmp_path / "p.jsonl", ROWS[:1])
    assert main(command(server, target, prompts, tmp_path / "c")) == 0
    assert server.bodies[-1]["model"] == "tiny"
    assert main(command(server, target, prompts, tmp_path / "d", "--model", "mine")) == 0
    assert server.bodies[-1]["model"] == "mine"
    server.models = ["one", "two"]
    assert main(command(server, target, prompts, tmp_path / "e")) == 2
    assert "several models or none (one, two); give --model" in capsys.readouterr().err


@pytest.mark.parametrize("option", [["--device", "cpu"], ["--batch", "2"], ["--threads", "1"]])
def test_options_of_the_target_in_process_are_refused_with_a_server(
    server, target, tmp_path, capsys, option
):
    prompts = write(tmp_path / "p.jsonl")
    assert main(command(server, target, prompts, tmp_path / "c", *option)) == 2
    assert f"{option[0]}: the server has its own" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option", [["--model", "m"], ["--api-key-env", "NAME"], ["--concurrent", "2"]]
)
def test_options_of_a_server_are_refused_without_one(target, tmp_path, capsys, option):
    words = ["--conversations", write(tmp_path / "p.jsonl"), "--out", tmp_path / "c", *option]
    assert main(["regenerate", "--target", str(target), *map(str, words)]) == 2
    assert f"{option[0]}: needs --url" in capsys.readouterr().err

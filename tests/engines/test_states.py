"""Files of states that an engine names, and answers that are not of the rows asked for."""

import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from eagle3fn.base.errors import UserError
from eagle3fn.data.engine_source import scores_fit
from eagle3fn.engines import vllm_process
from eagle3fn.engines.hidden_states import Score
from eagle3fn.engines.vllm_process import Taps, VllmProcess, read_row, remove_file
from eagle3fn.engines.vllm_server import VllmServer, scores_of

TAPS = Taps([1, 2, 3], [0, 1, 2], 2)


def states(path: Path, tokens: int = 2) -> Path:
    ids = torch.arange(1, tokens + 1)
    save_file({"hidden_states": torch.ones(tokens, 3, 4), "token_ids": ids}, path)
    return path


def test_a_file_of_states_is_deleted_with_its_lock(tmp_path):
    path = states(tmp_path / "row.safetensors")
    (tmp_path / "row.safetensors.lock").touch()
    assert read_row(str(path), TAPS, [], "").aux.shape == (2, 3, 4)
    assert not list(tmp_path.iterdir())


def test_no_other_file_is_deleted(tmp_path):
    other = tmp_path / "letter"
    other.write_text("dear")
    (tmp_path / "letter.lock").touch()
    weights = tmp_path / "model.safetensors"
    save_file(
        {"hidden_states": torch.ones(1), "token_ids": torch.ones(1), "w": torch.ones(1)}, weights
    )
    link = tmp_path / "link.safetensors"
    link.symlink_to(states(tmp_path / "kept.safetensors"))
    os.mkfifo(tmp_path / "pipe")

    before = sorted(tmp_path.iterdir())
    for path in before:
        remove_file(str(path))
        if path.name != "kept.safetensors":
            continue
        states(path)  # of a name of its own it is a file of states
    for name in ("letter", "pipe", "", "\0"):
        with pytest.raises(UserError, match="not written, not readable here or damaged"):
            read_row(str(tmp_path / name), TAPS, [], "")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("path", [None, "", 5, ["a"]])
def test_a_row_without_a_path_is_refused(path):
    with pytest.raises(UserError, match="named no file of hidden states"):
        read_row(path, TAPS, [], "")


# A program's answers


class Program:
    """Stands in for the process."""

    facts: object = {"version": "1.0", "device": "cpu"}
    answer: object = None

    def __init__(self, *_: object, **__: object) -> None:
        self.log = "the log"

    def ask(self, request: dict, seconds: float) -> object:
        return self.answer

    def close(self) -> None:
        pass


@pytest.fixture
def program(monkeypatch) -> type[Program]:
    class Own(Program):
        pass

    monkeypatch.setattr(vllm_process, "EngineProcess", Own)
    return Own


@pytest.mark.parametrize(
    "answer",
    [
        None,
        5,
        [],
        {},
        ["x"],
        [{"path": "a"}],
        [{"path": "a", "scores": [[0, 1]]}],
        [{"path": "a", "scores": 1}],
        [{"path": "a", "scores": []}] * 2,
    ],
)
def test_an_answer_of_another_form_is_one_line(program, answer):
    program.answer = answer
    engine = VllmProcess("py", "target", TAPS, "log", max_length=8)
    with pytest.raises(UserError, match="its answer is not one of 1 rows; see the log"):
        next(engine.rows([[1, 2]], False))
    engine.close()


@pytest.mark.parametrize("facts", [{}, [], 5, {"device": "cpu"}])
def test_a_program_without_a_version_is_one_line(program, facts):
    program.facts = facts
    with pytest.raises(UserError, match="--engine-python py: names no version; is this vLLM"):
        VllmProcess("py", "target", TAPS, "log", max_length=8)


# A server's answers


@pytest.fixture
def server(tmp_path) -> Iterator[tuple[str, dict]]:
    """A server of states; what it is given by "fails" is the number of the answer it refuses."""
    asked: dict = {"count": 0, "fails": None, "version": {"version": "1.0"}}

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def say(self, tree: object, code: int = 200) -> None:
            body = json.dumps(tree).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            models = {"data": [{"id": "m", "max_model_len": 64}]}
            self.say(asked["version"] if self.path == "/version" else models)

        def do_POST(self) -> None:
            row = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["prompt"]
            asked["count"] += 1
            if row[0] == asked["fails"]:
                self.say({}, 500)
                return
            path = asked.get("path") or str(states(tmp_path / f"{asked['count']}.st", len(row)))
            self.say({"kv_transfer_params": {"hidden_states_path": path}})

    service = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=service.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{service.server_port}", asked
    service.shutdown()
    service.server_close()


def test_a_place_without_probabilities_gives_no_scores():
    places = {"prompt_logprobs": [None, {}], "logprobs": {"top_logprobs": [{"token_id:1": 0.0}]}}
    assert scores_of({"choices": [places]}) == []


def test_files_of_a_servers_other_rows_are_deleted_where_one_row_fails(server, tmp_path):
    url, asked = server
    engine = VllmServer(url, TAPS, max_length=8)
    asked["fails"] = 7
    with pytest.raises(UserError, match="refused, 500"):
        list(engine.rows([[1, 2], [7, 8], [3, 4]], False))
    assert asked["count"] == 4
    assert not list(tmp_path.iterdir())


def test_a_server_that_names_a_file_of_others_leaves_it(server, tmp_path):
    url, asked = server
    letter = tmp_path / "letter"
    letter.write_text("dear")
    asked["path"] = str(letter)
    with pytest.raises(UserError, match=r"letter: not written, .*it starts with --speculative"):
        VllmServer(url, TAPS, max_length=8)
    assert letter.read_text() == "dear"


@pytest.mark.parametrize(
    "url",
    [
        "localhost:8000",
        "ftp://x",
        "http://",
        "http://x:abc",
        "http://[::1",
        "http://a b",
        "file:/x",
    ],
)
def test_what_is_no_address_is_refused_by_its_option(url):
    with pytest.raises(UserError, match=r"--engine-url .*: must be an address such as"):
        VllmServer(url, TAPS, max_length=8)


def test_a_server_of_something_else_is_named_by_its_option(server):
    url, asked = server
    asked["version"] = {}
    with pytest.raises(UserError, match=f"--engine-url {url}: names no version; is this vLLM"):
        VllmServer(url, TAPS, max_length=8)
    asked["version"] = {"version": "0.1"}
    with pytest.raises(UserError, match=rf"0.1 \(--engine-url {url}\): too old"):
        VllmServer(url, TAPS, max_length=8)


# Scores


@pytest.mark.parametrize(
    ("score", "good"),
    [
        (Score(1, 3, -0.5), True),
        (Score(1, 3, None), True),
        (Score(4, 3, -0.5), False),
        (Score(-1, 3, -0.5), False),
        (Score(1, 8, -0.5), False),
        (Score(1, -1, -0.5), False),
        (Score("a", "b", "c"), False),  # pyright: ignore[reportArgumentType]
    ],
)
def test_scores_are_of_places_and_tokens_that_are_there(score, good):
    assert scores_fit([score], 4, 8) == good
    others = None if score.log_prob is not None else -0.5
    assert not scores_fit([score, Score(0, 0, others)], 4, 8)

"""A small server with OpenAI's interface, in a thread; it answers by a rule, or fails."""

import json
import time
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import Any

Fault = Callable[["Handler", dict[str, Any]], None]
"""Answers a request in place of the server, or not at all."""


def said(messages: list[dict[str, Any]]) -> str:
    """What the server answers: a function of the whole conversation so far."""
    return f"reply {zlib.crc32(json.dumps(messages).encode())}"


def chat(content: Any = None, finish: str = "stop", **more: Any) -> dict[str, Any]:
    """The JSON of an answer."""
    message = {"role": "assistant", "content": content, **more}
    return {"choices": [{"index": 0, "message": message, "finish_reason": finish}]}


class ChatServer(ThreadingHTTPServer):
    """Its state; `faults` are taken one for each request, in order, then it answers by its rule."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock = Lock()
        self.faults: deque[Fault | None] = deque()
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.models = ["tiny"]
        self.gets: list[str] = []
        self.delay = 0.0  # seconds before each answer
        self.waiting = 0  # requests that are being answered …
        self.most_waiting = 0  # … and most of them at once
        self.on_request: Callable[[int], None] = lambda number: None
        self.answer: Callable[[dict[str, Any]], Any] = lambda body: chat(said(body["messages"]))

    @property
    def url(self) -> str:
        """The address up to `/v1`."""
        return f"http://127.0.0.1:{self.server_port}/v1"

    def asked(self) -> Counter[str]:
        """How often each request came."""
        return Counter(json.dumps(body, sort_keys=True) for body in self.bodies)

    def handle_error(self, *_given: Any) -> None:
        """Nothing: a client may go at any time."""


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: ChatServer

    def do_GET(self) -> None:
        """The models."""
        self.server.gets.append(self.path)
        self.send({"data": [{"id": name} for name in self.server.models]})

    def do_POST(self) -> None:
        """A chat."""
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.bodies.append(body)
            server.headers.append(dict(self.headers))
            number = len(server.bodies)
            fault = server.faults.popleft() if server.faults else None
            server.waiting += 1
            server.most_waiting = max(server.most_waiting, server.waiting)
        try:
            server.on_request(number)
            time.sleep(server.delay)
        finally:
            # Before the answer: once that is there, the client may ask again.
            with server.lock:
                server.waiting -= 1
        if fault is not None:
            fault(self, body)
        else:
            self.send(server.answer(body))

    def send(self, answer: Any, code: int = 200, **headers: str) -> None:
        """JSON, or bytes as they are."""
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is printed."""


def failing(answer: Any, code: int = 200, **headers: str) -> Fault:
    """A fault that is an answer of its own."""
    return lambda handler, body: handler.send(answer, code, **headers)


def silent(handler: Handler, body: dict[str, Any]) -> None:
    """No answer: the connection ends."""
    handler.close_connection = True


def halved(handler: Handler, body: dict[str, Any]) -> None:
    """The connection ends within the answer."""
    data = json.dumps(chat("never read")).encode()
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data[: len(data) // 2])
    handler.close_connection = True


def slow(seconds: float) -> Fault:
    """A letter now and then, for so long that nobody waits for it."""

    def drip(handler: Handler, body: dict[str, Any]) -> None:
        handler.send_response(200)
        handler.end_headers()
        for _ in range(100):
            handler.wfile.write(b" ")
            handler.wfile.flush()
            time.sleep(seconds / 100)

    return drip


@contextmanager
def chat_server() -> Iterator[ChatServer]:
    """A running server."""
    server = ChatServer()
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

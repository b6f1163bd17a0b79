"""A small HTTP server of a test, in a thread; what it answers is a function."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

Answer = Callable[[str, dict[str, Any] | None], Any]
"""`(path, the request's JSON or None)` → JSON, an error's code, or bytes that are sent as they are.

None: the connection ends without an answer.
"""


@contextmanager
def serving(answer: Answer) -> Iterator[str]:
    """Yield the server's address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.say(answer(self.path, None))

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            self.say(answer(self.path, json.loads(body)))

        def say(self, found: Any) -> None:
            if found is None:
                self.close_connection = True
                return
            code = found if isinstance(found, int) else 200
            data = found if isinstance(found, bytes) else json.dumps(found).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

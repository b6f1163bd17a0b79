"""A running server of an engine, asked over HTTP with JSON; each fault is one line."""

import json
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import ProxyHandler, Request, build_opener

from eagle3fn.base.errors import EngineGone, UserError

_SHORT_SECONDS = 60.0  # for what needs no model
_LONGEST = 300  # characters of a server's message
_UNREACHED = (502, 503, 504)  # what a proxy answers in place of a server that is away


class Server:
    """A server at an address.

    Args:
        engine: the engine's name, for messages.
        url: where it is, `http://HOST:PORT`.

    Raises:
        UserError: the address is not one of HTTP.
    """

    def __init__(self, engine: str, url: str) -> None:
        if not _is_address(url):
            raise UserError(f"--engine-url {url}: must be an address such as http://localhost:8000")
        self.engine = engine
        self.url = url.rstrip("/")
        self._opener = build_opener(ProxyHandler({}))

    def get(self, path: str) -> dict[str, Any]:
        """A JSON object that the server has at a path.

        Raises:
            EngineGone: no server there, or it ends or is silent.
            UserError: it refuses, or it answers something else.
        """
        return self._ask(Request(self.url + path), _SHORT_SECONDS)

    def post(self, path: str, body: dict[str, Any], seconds: float) -> dict[str, Any]:
        """The answer, a JSON object, to a request.

        Raises:
            EngineGone: as `get`; silent is who says nothing for `seconds`.
            UserError: as `get`.
        """
        data = json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        return self._ask(Request(self.url + path, data, headers), seconds)

    def _ask(self, request: Request, seconds: float) -> dict[str, Any]:
        where = f"{self.engine} at {request.full_url}"
        try:
            with self._opener.open(request, timeout=seconds) as answer:
                tree = json.loads(answer.read())
        except HTTPError as error:
            kind = EngineGone if error.code in _UNREACHED else UserError
            raise kind(f"{where}: refused, {error.code}: {_message(error)}") from None
        except TimeoutError:
            raise EngineGone(
                f"{where}: no answer within {seconds:.0f} s; look at its log"
            ) from None
        except URLError as error:
            raise EngineGone(
                f"{where}: no server there ({error.reason}); start it, or mend --engine-url"
            ) from None
        except (OSError, HTTPException) as error:
            raise EngineGone(
                f"{where}: it ended while it answered ({type(error).__name__}); look at its log"
            ) from None
        except (ValueError, RecursionError):
            tree = None
        if not isinstance(tree, dict):
            raise UserError(f"{where}: answered no JSON object; is this {self.engine}?")
        return tree


def _is_address(url: str) -> bool:
    """Whether a text is an address with a host, and a port if it has one."""
    try:
        parts = urlsplit(url)
        port = parts.port  # of digits, else an error
    except ValueError:
        return False
    good = parts.scheme in ("http", "https") and bool(parts.hostname) and port != 0
    return good and not any(letter.isspace() for letter in url)


def _message(error: HTTPError) -> str:
    """What a server says of a request that it refuses, in one line."""
    try:
        text = error.read().decode("utf-8", "replace")
    except (OSError, HTTPException):
        text = ""
    return " ".join((text.strip() or str(error.reason)).split())[:_LONGEST]

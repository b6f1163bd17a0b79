"""A server with OpenAI's interface, asked for chat completions; each fault is one line.

Its key is in requests' headers alone: never in a message, a file or a request to another address.
"""

import json
import os
from collections.abc import Callable
from http.client import HTTPException
from threading import Event
from time import monotonic
from typing import Any, TypeVar
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, ProxyHandler, Request, build_opener

from eagle3fn.base.errors import UserError

_LONGEST_WAIT = 60.0  # seconds, also where a server asks for more
_SHORT_SECONDS = 60.0  # for what needs no model
_LARGEST = 64 << 20  # bytes of an answer
_CHUNK = 1 << 16  # bytes
_SHOWN = 300  # characters of a server's message
_BUSY = (408, 409, 425, 429)  # and all from 500 on
_LOCAL = ("localhost", "127.0.0.1", "::1")


Made = TypeVar("Made")


class _TransientError(Exception):
    """A fault that may be over soon."""

    def __init__(self, reason: str, only_known: bool = False, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.only_known = only_known  # it is worth a try only where the server has answered before
        self.wait = wait  # seconds, as the server asks


class Endpoint:
    """A server at an address; may be asked by several threads at once.

    Busy servers (429, 5xx), silent ones and broken connections are asked again, after 1, 2, 4, …
    seconds or what `Retry-After` says; a server that has never answered must at least be there.

    Args:
        url: up to `/v1`, as `http://HOST:PORT/v1`.
        key_env: the environment variable that holds the key; None: no key is sent.
        seconds: that one answer may take.
        tries: of a request, before it is refused.
        first_wait: seconds after the first try, doubled after each.

    Raises:
        UserError: the address is not one of HTTP, or the variable holds no key.
    """

    def __init__(
        self,
        url: str,
        key_env: str | None = None,
        seconds: float = 600.0,
        tries: int = 7,
        first_wait: float = 1.0,
    ) -> None:
        _check_address(url)
        self.url = url.rstrip("/")
        self.seconds = seconds
        self.tries = tries
        self.first_wait = first_wait
        self._key_env = key_env
        self._key = _key_of(key_env) if key_env else ""
        local = urlsplit(url).hostname in _LOCAL
        proxies = ProxyHandler({} if local else None)
        self._opener = build_opener(proxies, _NoRedirects())
        self._has_answered = False

    def only_model(self) -> str:
        """The name of the one model that the server has.

        Raises:
            UserError: as `post`; it has none or several.
        """
        tree = self._again(lambda: self._ask("/models", None, _SHORT_SECONDS), Event().wait)
        entries = tree.get("data")
        found = entries if isinstance(entries, list) else []
        names = [each["id"] for each in found if isinstance(each, dict) and each.get("id")]
        if len(names) != 1:
            shown = self._without_key(", ".join(map(str, names[:6]))) or "none that it names"
            raise UserError(f"{self.url}: has several models or none ({shown}); give --model")
        return str(names[0])

    def complete(
        self,
        body: dict[str, Any],
        use: Callable[[dict[str, Any]], Made],
        wait: Callable[[float], bool],
    ) -> Made:
        """What `use` makes of the answer to a chat; it raises ValueError of an unusable one.

        `wait` lets so many seconds pass between two tries; True where there is to be no other.

        Raises:
            UserError: the server refuses, or all tries fail; with its message in one line.
        """

        def ask() -> Made:
            tree = self._ask("/chat/completions", body, self.seconds)
            try:
                made = use(tree)
            except ValueError as error:
                raise _TransientError(f"unusable answer, {error}", only_known=True) from None
            self._has_answered = True  # a list of models alone does not say that it can
            return made

        return self._again(ask, wait)

    def _again(self, ask: Callable[[], Made], wait: Callable[[float], bool]) -> Made:
        """What `ask` returns, tried again after faults that may be over soon."""
        seconds = self.first_wait
        for left in reversed(range(self.tries)):
            try:
                return ask()
            except _TransientError as fault:
                is_hopeless = fault.only_known and not self._has_answered
                pause = min(max(seconds, fault.wait), _LONGEST_WAIT)
                if is_hopeless or not left or wait(pause):
                    count = self.tries - left
                    tried = "" if count == 1 else f", after {count} tries"
                    raise UserError(
                        f"{self.url}: {fault}{tried}; mend the server or --url, then call again"
                    ) from None
                seconds *= 2
        raise AssertionError("a last try returns or raises")

    def _ask(self, path: str, body: dict[str, Any] | None, seconds: float) -> dict[str, Any]:
        """A JSON object, of one request.

        Raises:
            _TransientError: a fault that may be over soon.
            UserError: the server refuses.
        """
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = Request(self.url + path, data, headers)
        try:
            text = self._read(request, seconds)
        except HTTPError as error:
            raise self._fault_of(error) from None
        except TimeoutError:
            raise _TransientError(f"no answer within {seconds:g} s") from None
        except URLError as error:
            if isinstance(error.reason, TimeoutError):
                raise _TransientError(f"no answer within {seconds:g} s") from None
            raise _TransientError(f"no server there ({error.reason})", only_known=True) from None
        except (OSError, HTTPException) as error:
            raise _TransientError(
                f"the connection broke ({type(error).__name__})", only_known=True
            ) from None

        try:
            tree = json.loads(text)
        except (ValueError, RecursionError):
            tree = None
        if not isinstance(tree, dict):
            shown = self._one_line(text)
            raise _TransientError(f"answered no JSON object but {shown!r}", only_known=True)
        return tree

    def _read(self, request: Request, seconds: float) -> bytes:
        """The bytes of an answer, which must be whole in time."""
        end = monotonic() + seconds
        with self._opener.open(request, timeout=seconds) as answer:
            chunks = []
            size = 0
            while chunk := answer.read1(_CHUNK):
                chunks.append(chunk)
                size += len(chunk)
                if monotonic() > end:
                    raise TimeoutError
                if size > _LARGEST:
                    raise UserError(f"{self.url}: answered more than {_LARGEST >> 20} MiB")
            return b"".join(chunks)

    def _fault_of(self, error: HTTPError) -> Exception:
        """What an answer with an error's code is."""
        try:
            text = error.read(_CHUNK)
        except (OSError, HTTPException):
            text = b""
        shown = self._one_line(text) or self._one_line(str(error.reason).encode())
        if error.code in _BUSY or error.code >= 500:
            return _TransientError(f"{error.code}: {shown}", wait=_asked_wait(error))

        remedy = "mend --url or the request"
        if error.code in (401, 403):
            named = self._key_env or "NAME"
            remedy = f"put the server's key into a variable and give --api-key-env {named}"
        elif error.code == 404:
            remedy = "--url must end as the server says, mostly in /v1; or mend --model"
        elif error.code < 400:
            place = self._without_key(str(error.headers.get("Location")))
            remedy = f"it sends elsewhere; name {place}"
        elif error.code in (400, 413, 422):
            remedy = "shorten, mend or delete the row, or mend the options"
        return UserError(f"{self.url}: refused, {error.code}: {shown}; {remedy}")

    def _one_line(self, text: bytes) -> str:
        """A server's words: the message of a JSON error, or the beginning of a page; no key."""
        words = text.decode("utf-8", "replace")
        try:
            tree = json.loads(words)
            error = tree.get("error", tree)
            found = error.get("message") if isinstance(error, dict) else error
            words = found if isinstance(found, str) else words
        except (ValueError, RecursionError, AttributeError):
            pass  # no JSON error: the page's own words are shown
        return " ".join(self._without_key(words).split())[:_SHOWN]

    def _without_key(self, words: str) -> str:
        """A server may say again what it was sent."""
        return words.replace(self._key, "***") if self._key else words


class _NoRedirects(HTTPRedirectHandler):
    """A request goes to its address alone: another one would be sent the key and an empty body."""

    def redirect_request(self, *_given: Any) -> None:
        """None: the answer is an error of its code."""


def _check_address(url: str) -> None:
    try:
        parts = urlsplit(url)
        port = parts.port  # of digits, else an error
    except ValueError:
        parts, port = urlsplit(""), None
    good = parts.scheme in ("http", "https") and bool(parts.hostname) and port != 0
    if "@" in parts.netloc:
        raise UserError("--url: holds a name or key; leave it out, and give --api-key-env")
    if not good or parts.query or parts.fragment or any(map(str.isspace, url)):
        raise UserError(f"--url {url}: must be an address such as http://localhost:8000/v1")


def _key_of(name: str) -> str:
    """The key that a variable holds; it is never shown."""
    key = os.environ.get(name, "").strip()
    if not key:
        raise UserError(f"--api-key-env {name}: is not set in the environment; export it")
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise UserError(f"--api-key-env {name}: holds no key: blanks or other letters are in it")
    return key


def _asked_wait(error: HTTPError) -> float:
    """The seconds of `Retry-After`; 0 where there is none, or a date."""
    text = error.headers.get("Retry-After") or ""
    return float(text) if text.strip().isdecimal() else 0.0

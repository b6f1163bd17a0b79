"""The items of a JSON array, one after the other: memory holds a piece of the file, never all."""

import codecs
import json
from collections.abc import Iterator
from typing import IO, Any

_PIECE = 1 << 18  # bytes read at once
_MARGIN = 16  # characters: no literal, escape or end of a number is longer
_SHOWN = 40  # characters of the text in an error
_BLANK = " \t\r\n"
_BOM = "\ufeff"


class BrokenArrayError(ValueError):
    """An item, or what stands around it, is not JSON: where the next item begins is not known."""


def array_items(file: IO[bytes]) -> Iterator[tuple[Any, str | None]]:
    """Each item of the array that `file` holds, and None; or None, and why it is unusable.

    An item that holds bytes which are not UTF-8 is unusable; the items after it are read. An item
    is held whole, and at most twice its size of the file's text.

    Raises:
        BrokenArrayError: an item is not JSON, or the array does not end, or is not all there is.
    """
    text = _Text(file)
    if text.take() != "[":
        raise BrokenArrayError("no [ at its beginning")

    number = 1
    if text.peek() == "]":
        text.take()
    else:
        while True:
            yield text.value(number)
            mark = text.take()
            if mark == "]":
                break
            if mark != ",":
                raise text.broken(number, "no comma or ] after it" if mark else "no ] after it")
            number += 1

    if text.peek():
        raise BrokenArrayError(f"more text after the array's ]: {text.shown()}")


class _Text:
    """The file's text from the place of reading on, of which a part is in memory."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        # Bytes that are not UTF-8 become lone surrogates, which no JSON text holds otherwise.
        self.decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self.part = ""
        self.place = 0
        self.ended = False
        self._more()
        self.part = self.part.removeprefix(_BOM)

    def _more(self) -> None:
        """Read on, at least as much as is left unread: a long item is tried a few times only."""
        left = self.part[self.place :]
        data = self.file.read(max(_PIECE, len(left)))
        self.ended = not data
        self.part = left + self.decoder.decode(data, final=self.ended)
        self.place = 0

    def peek(self) -> str:
        """The next character that is not blank; empty at the file's end."""
        while True:
            while self.place < len(self.part) and self.part[self.place] in _BLANK:
                self.place += 1
            if self.place < len(self.part):
                return self.part[self.place]
            if self.ended:
                return ""
            self._more()

    def take(self) -> str:
        """The same; it is then read."""
        found = self.peek()
        self.place += len(found)
        return found

    def value(self, number: int) -> tuple[Any, str | None]:
        """The next value, which is item `number`, and None; or None and why it is unusable."""
        self.peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self.part, self.place)
            except json.JSONDecodeError as error:
                # The error may come from where this part of the text ends: then try with more.
                in_string = error.msg.startswith("Unterminated string")
                if not self.ended and (in_string or error.pos + _MARGIN >= len(self.part)):
                    self._more()
                    continue
                at_end = in_string or not self.part[error.pos :].strip(_BLANK)
                self.place = min(error.pos, len(self.part))
                raise self.broken(
                    number, "the file ends inside it" if at_end else error.msg
                ) from None
            except (ValueError, RecursionError) as error:
                # Numbers of too many digits, and values nested too deeply.
                raise self.broken(number, str(error)) from None

            # A number may go on in the next part.
            if not self.ended and end + _MARGIN > len(self.part):
                self._more()
                continue
            written = self.part[self.place : end]
            self.place = end
            return (
                (value, None) if _is_unicode(written) else (None, "holds bytes that are not UTF-8")
            )

    def broken(self, number: int, reason: str) -> BrokenArrayError:
        return BrokenArrayError(f"item {number}: {reason}, near {self.shown()}")

    def shown(self) -> str:
        """The text around the place of reading."""
        begin = max(0, self.place - _SHOWN // 2)
        return repr(self.part[begin : begin + _SHOWN])


_DECODER = json.JSONDecoder()


def _is_unicode(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True

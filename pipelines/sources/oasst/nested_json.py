"""Decodes JSON of any depth: the standard library's decoder recurses and gives up near 1,000."""

import json
import re
from typing import Any, NoReturn

SPACE = re.compile(r"[ \t\n\r]*")
CLOSING = {"[": "]", "{": "}"}

_decoder = json.JSONDecoder()


def decode(text: str, start: int = 0) -> tuple[Any, int]:
    """Return the JSON value that begins at or after `start`, and the index behind it.

    Raises ValueError (json.JSONDecodeError where the place is known) for what is not JSON.
    """
    start = skip_space(text, start)
    try:
        return _decoder.raw_decode(text, start)
    except RecursionError:
        # How deep is too deep depends on the caller's stack; the result must not.
        return _Nested(text, start).decode()


def skip_space(text: str, start: int) -> int:
    """Return the index of the first character from `start` on that is no JSON whitespace."""
    found = SPACE.match(text, start)
    return found.end() if found else start


class _Nested:
    """One value being decoded: `open` holds the unfinished containers, each with its next key."""

    def __init__(self, text: str, index: int) -> None:
        self.text = text
        self.index = index
        self.open: list[tuple[Any, str]] = []

    def decode(self) -> tuple[Any, int]:
        while True:
            value, finished = self._begin()
            while finished:
                if not self.open:
                    return value, self.index
                value, finished = self._attach(value)

    def _begin(self) -> tuple[Any, bool]:
        """Read a scalar or an empty container, or open one: then nothing is finished yet."""
        char = self._peek()
        if char not in CLOSING:
            return self._scalar(), True
        self.index += 1
        container: Any = [] if char == "[" else {}
        if self._peek() == CLOSING[char]:
            self.index += 1
            return container, True
        self.open.append((container, self._key() if char == "{" else ""))
        return None, False

    def _attach(self, value: Any) -> tuple[Any, bool]:
        """Put a value into the innermost container; return that one where it ends here."""
        container, key = self.open.pop()
        if isinstance(container, dict):
            container[key] = value
        else:
            container.append(value)
        char = self._peek()
        if char == ",":
            self.index += 1
            self.open.append((container, self._key() if isinstance(container, dict) else ""))
            return None, False
        if char != ("}" if isinstance(container, dict) else "]"):
            self._fail("Expecting ',' delimiter")
        self.index += 1
        return container, True

    def _key(self) -> str:
        if self._peek() != '"':
            self._fail("Expecting property name enclosed in double quotes")
        key = str(self._scalar())
        if self._peek() != ":":
            self._fail("Expecting ':' delimiter")
        self.index += 1
        return key

    def _scalar(self) -> Any:
        value, self.index = _decoder.raw_decode(self.text, self.index)
        return value

    def _peek(self) -> str:
        self.index = skip_space(self.text, self.index)
        return self.text[self.index : self.index + 1]

    def _fail(self, message: str) -> NoReturn:
        raise json.JSONDecodeError(message, self.text, self.index)

"""Reads the rows of a JSON document of any size, one row in memory at a time.

A document is an array of rows, an object with such an array one level down (`{"data": [...]}`, or
one for each split), a single row, or several of these one after the other. What does not decode
is passed over by its brackets and strings, so that one bad row costs only itself.
"""

import codecs
import json
import re
from collections.abc import Iterator
from typing import IO, NamedTuple

from pipelines.errors import SourceError
from pipelines.sources.dataset.layout import split_named

CHUNK = 1 << 20
DECODER = json.JSONDecoder()
BLANK = re.compile(r"[ \t\r\n]*")
TOKEN = re.compile(r'"(?:[^"\\]++|\\.)*+"|["\[\]{}]', re.DOTALL)
SCALAR = re.compile(r"[^\s,\[\]{}\"]+")
TRAILING_COMMA = re.compile(r'("(?:[^"\\]++|\\.)*+")|,(?=\s*[\]}])', re.DOTALL)

# Arrays of objects that belong to one row; under any other key they are the rows.
PARTS_OF_A_ROW = frozenset(
    "messages conversations conversation dialogue dialog chat instances answers replies".split()
)


class Item(NamedTuple):
    """One row: its JSON text, or the reason why there is none; the split of the array it is in."""

    text: str
    reason: str = ""
    detail: str = ""
    split: str = ""


def drop_trailing_commas(text: str) -> str:
    """Return JSON without the commas that people leave before a closing bracket."""
    return TRAILING_COMMA.sub(lambda found: found[1] or "", text)


def read_document(stream: IO[bytes], where: str) -> Iterator[Item]:
    """Yield the rows of a JSON document; SourceError with line and cause where it is broken."""
    window = _Window(stream, where)
    while window.peek():
        if window.peek() == "[":
            yield from window.array("")
        elif window.peek() == "{" and window.holds_arrays():
            yield from window.table()
        else:
            yield window.value()


class _Window:
    """The part of the document in memory; bytes that are no UTF-8 become lone surrogates."""

    def __init__(self, stream: IO[bytes], where: str) -> None:
        self._stream = stream
        self._where = where
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
        self._text = ""
        self._at = 0
        self._ended = False
        self._lines = 1

    def peek(self) -> str:
        """Return the next character that is no blank, "" at the end."""
        while True:
            found = BLANK.match(self._text, self._at)
            self._at = found.end() if found else self._at
            if self._at < len(self._text) or not self._more():
                return self._text[self._at : self._at + 1]

    def take(self, expected: str) -> None:
        if self.peek() != expected:
            raise self._error(f"expected {expected!r}, found {self._text[self._at :][:20]!r}")
        self._at += 1

    def holds_arrays(self) -> bool:
        """Say whether the object ahead has an array of objects under a key that is no row's."""
        while len(self._text) - self._at < CHUNK and self._more():
            pass
        ahead = re.compile(r'"((?:[^"\\]|\\.)*)"\s*:\s*\[\s*\{')
        at = self._at + 1
        while found := BLANK.match(self._text, at):
            key = re.compile(r'"(?:[^"\\]|\\.)*"\s*:\s*').match(self._text, found.end())
            if key is None:
                return False
            array = ahead.match(self._text, found.end())
            if array and array[1].lower() not in PARTS_OF_A_ROW:
                return True
            try:
                _, at = DECODER.raw_decode(self._text, key.end())
            except (ValueError, RecursionError):
                return False
            comma = re.compile(r"\s*,").match(self._text, at)
            if comma is None:
                return False
            at = comma.end()
        return False

    def table(self) -> Iterator[Item]:
        """Yield the rows of the arrays in an object; only splits may be more than one."""
        self.take("{")
        held: list[str] = []
        while self.peek() != "}":
            key = json.loads(self.value().text or '""')
            self.take(":")
            if self.peek() == "[":
                if held and not (split_named(held[0]) and split_named(key)):
                    raise self._error(f"rows under {held[0]!r} as well as under {key!r}; keep one")
                held.append(key)
                yield from self.array(split_named(key) or "")
            else:
                self.value()
            if self.peek() != "}":
                self.take(",")
        self.take("}")

    def array(self, split: str) -> Iterator[Item]:
        """Yield the elements of an array."""
        self.take("[")
        while self.peek() != "]":
            yield self.value()._replace(split=split)
            if self.peek() != "]":
                self.take(",")
        self.take("]")

    def value(self) -> Item:
        """Return the next value, or why it is none."""
        self.peek()
        while True:
            try:
                _, end = DECODER.raw_decode(self._text, self._at)
            except (ValueError, RecursionError) as error:
                return self._mend(error)
            # A number may go on in what has not been read yet.
            if end < len(self._text) or not self._more():
                text, self._at = self._text[self._at : end], end
                return Item(text)

    def _mend(self, error: Exception) -> Item:
        end = self._end_of_value(error)
        text, self._at = self._text[self._at : end], end
        try:
            DECODER.decode(text)
        except RecursionError:
            return Item("", "nested_too_deep", "brackets within brackets beyond what is read")
        except ValueError as problem:
            mended = drop_trailing_commas(text)
            try:
                DECODER.decode(mended)
            except (ValueError, RecursionError):
                return Item("", "invalid_json", str(problem))
            return Item(mended)
        return Item(text)

    def _end_of_value(self, error: Exception) -> int:
        """Return where the value ends, by brackets and strings alone; reads on as needed."""
        depth, offset = 0, 0
        while True:
            at = self._at + offset
            if depth == 0 and self._text[at : at + 1] not in ("[", "{", '"'):
                scalar = SCALAR.match(self._text, at)
                if scalar and (scalar.end() < len(self._text) or not self._more()):
                    return scalar.end()
                if scalar is None:
                    raise self._error(str(error)) from error
                continue
            found = TOKEN.search(self._text, at)
            if found is None or found[0] == '"':
                offset = (found.start() if found else len(self._text)) - self._at
                if not self._more():
                    raise self._error(f"a row starts here and never ends ({error})") from error
                continue
            depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(found[0], 0)
            offset = found.end() - self._at
            if depth <= 0:
                return found.end()

    def _more(self) -> bool:
        """Read on, forgetting what lies behind; False at the end of the document."""
        if self._ended:
            return False
        data = self._stream.read(max(CHUNK, len(self._text) - self._at))
        self._ended = not data
        self._lines += self._text.count("\n", 0, self._at)
        self._text = self._text[self._at :] + self._decoder.decode(data, final=self._ended)
        self._at = 0
        return True

    def _error(self, cause: str) -> SourceError:
        line = self._lines + self._text.count("\n", 0, self._at)
        return SourceError(
            f"{self._where}: not valid JSON at line {line}: {cause}; expected an array of objects "
            "or one object a line"
        )

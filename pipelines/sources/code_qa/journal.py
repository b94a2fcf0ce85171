"""The journal of a generation: each request before it is sent, each reply when it has come.

One JSON line each, synced before anything else happens. A kill may cut the last line, which the
next start cuts off; so at most one reply is lost, and no request is forgotten by the budget.
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from pipelines.errors import SourceError

Reply = dict[str, Any]


@dataclass(slots=True)
class Spent:
    """What has been used of the budget: requests sent, and tokens, reserved ones included."""

    requests: int = 0
    tokens: int = 0


@dataclass(slots=True)
class Journal:
    """An open journal: the replies by the key of what was asked, and what they cost."""

    path: Path
    replies: dict[str, Reply] = field(default_factory=dict)
    spent: Spent = field(default_factory=Spent)
    _file: IO[bytes] | None = None

    def __enter__(self) -> Self:
        """Read what is there, and cut off a line that a kill left unfinished."""
        content = self.path.read_bytes() if self.path.exists() else b""
        whole = content.rfind(b"\n") + 1
        for number, line in enumerate(content[:whole].split(b"\n")[:-1], 1):
            try:
                self._take(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise SourceError(
                    f"{self.path}: line {number} is damaged ({error}); delete that line to go on "
                    "with the other replies"
                ) from error
        self._file = self.path.open("ab")
        if whole < len(content):
            self._file.truncate(whole)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def begin(self, key: str, reserved: int) -> None:
        """Note a request that is about to be sent; it costs `reserved` tokens until it is known."""
        self._append({"request": key, "reserved": reserved})

    def settle(self, key: str, reserved: int, tokens: int) -> None:
        """Note what a request has cost, in place of what was reserved for it."""
        self._append({"settled": key, "tokens": tokens - reserved})

    def keep(self, key: str, reply: Reply) -> None:
        """Keep a reply: the pairs of what was asked, or the problem with it."""
        self._append({"reply": key, **reply})

    def _append(self, entry: dict[str, Any]) -> None:
        assert self._file is not None, "the journal is not open"
        self._file.write(json.dumps(entry).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._take(entry)

    def _take(self, entry: dict[str, Any]) -> None:
        if "request" in entry:
            self.spent.requests += 1
            self.spent.tokens += int(entry["reserved"])
        elif "settled" in entry:
            self.spent.tokens += int(entry["tokens"])
        else:
            self.replies[entry["reply"]] = entry

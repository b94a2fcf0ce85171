"""Names of users and marks of duplicates, looked up on disk: a site has millions of users."""

import contextlib
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from pipelines.engine import Outcome, Params
from pipelines.manifest import Counts
from pipelines.records import Row
from pipelines.sources.stack_exchange.dump import find_extent, read_range
from pipelines.sources.stack_exchange.rows import BadRow, read_line

COMMUNITY_ID, COMMUNITY = -1, "Community"  # the user that owns what nobody owns
DUPLICATE = "3"  # LinkTypeId of a question closed as a duplicate
IDS_AT_A_TIME = 500
TABLES = """
PRAGMA journal_mode = OFF;
PRAGMA synchronous = OFF;
CREATE TABLE user (id INTEGER PRIMARY KEY, name TEXT NOT NULL);
CREATE TABLE duplicate (id INTEGER PRIMARY KEY);
"""


class HasPosts(Protocol):
    """A question, or None, with answers."""

    @property
    def question(self) -> Row | None:
        """Return the question."""

    @property
    def answers(self) -> list[Row]:
        """Return the answers."""


def write_names(inputs: Sequence[Path], output: Path, params: Params) -> Outcome:
    """Write names and marks from Users.xml and PostLinks.xml into one SQLite file.

    `params["tables"]` names the root element of each input. Rows count users and links; those that
    cannot be read are left out.
    """
    read = {"users": _read_users, "postlinks": _read_duplicates}
    extra = {}
    with contextlib.closing(sqlite3.connect(output, isolation_level=None)) as database:
        database.executescript(TABLES)
        database.execute("BEGIN")
        for element, path in zip(params["tables"], inputs, strict=True):
            good, bad = read[element](database, path)
            extra[element] = {"rows": good, "bad": bad}
        database.execute("COMMIT")
    return Outcome(Counts(), extra=extra)


def _read_users(database: sqlite3.Connection, path: Path) -> tuple[int, int]:
    good = bad = 0
    for values in _read_values(path, "users", ("Id", "DisplayName")):
        rows = [(int(id_), name) for id_, name in values if _is_integer(id_) and name]
        good, bad = good + len(rows), bad + len(values) - len(rows)
        database.executemany("INSERT OR IGNORE INTO user VALUES (?, ?)", rows)
    return good, bad


def _read_duplicates(database: sqlite3.Connection, path: Path) -> tuple[int, int]:
    good = bad = 0
    for values in _read_values(path, "postlinks", ("PostId", "LinkTypeId")):
        known = [(id_, kind) for id_, kind in values if _is_integer(id_) and kind]
        good, bad = good + len(known), bad + len(values) - len(known)
        rows = [(int(id_),) for id_, kind in known if kind == DUPLICATE]
        database.executemany("INSERT OR IGNORE INTO duplicate VALUES (?)", rows)
    return good, bad


def _is_integer(value: str | None) -> bool:
    return value is not None and value.removeprefix("-").isdecimal() and len(value) < 18


def _read_values(
    path: Path, element: str, names: tuple[str, str]
) -> Iterator[list[tuple[Any, Any]]]:
    """Yield pairs of attributes, None where a row has none, chunk by chunk."""
    extent = find_extent(path, element)
    for chunk in read_range(path, extent, extent.start, extent.end, names):
        columns = [chunk.plain.values[name].to_pylist() for name in names]
        values = list(zip(*columns, strict=True))
        for line in chunk.odd:
            try:
                rows = read_line(line.content)
            except BadRow:
                values.append((None, None))
                continue
            values += [(row.get(names[0]), row.get(names[1])) for row in rows]
        yield values


class Names:
    """Looks up what `write_names` wrote; knows only the Community user where there is no file."""

    def __init__(self, path: Path | None) -> None:
        self._database = None
        if path is not None:
            address = f"{path.absolute().as_uri()}?mode=ro&immutable=1"
            self._database = sqlite3.connect(address, uri=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._database is not None:
            self._database.close()

    def fill(self, threads: Iterable[HasPosts]) -> None:
        """Give posts without an author's name that of their user, where it is known."""
        posts = [post for thread in threads for post in (thread.question, *thread.answers) if post]
        nameless = [p for p in posts if not p["author"] and p["author_id"] is not None]
        names = dict(self._select("SELECT id, name FROM user", [p["author_id"] for p in nameless]))
        names.setdefault(COMMUNITY_ID, COMMUNITY)
        for post in posts:
            post["author"] = post["author"] or names.get(post["author_id"])

    def find_duplicates(self, threads: Iterable[HasPosts]) -> set[int]:
        """Return the ids of the questions that are marked as duplicates of others."""
        ids = [thread.question["id"] for thread in threads if thread.question]
        return {id_ for (id_,) in self._select("SELECT id FROM duplicate", ids)}

    def _select(self, query: str, ids: Iterable[int]) -> Iterator[Any]:
        if self._database is None:
            return
        wanted = sorted(set(ids))
        for start in range(0, len(wanted), IDS_AT_A_TIME):
            some = wanted[start : start + IDS_AT_A_TIME]
            marks = ",".join("?" * len(some))
            yield from self._database.execute(f"{query} WHERE id IN ({marks})", some)

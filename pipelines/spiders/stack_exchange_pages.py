"""Raw pages of the Stack Exchange API: how they lie on disk, and which questions they hold.

`pages/00000012.json.gz` is one answer of the API: a line of JSON that says what was asked
(`method`, `asked` ids, `gone` ids: asked twice, not there any more), then the body as received.
Later pages hold the newer state of the world; a question comes with all of its answers.
"""

import gzip
import hashlib
import json
import os
import sqlite3
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pipelines.errors import SourceError

PAGES = "pages"
GZIP_LEVEL = 6  # 9 takes three times as long for a hundredth less
QUESTION_KEYS = (
    "question_id", "score", "title", "body", "tags", "creation_date", "last_edit_date",
    "closed_date", "accepted_answer_id", "content_license",
)  # fmt: skip
ANSWER_KEYS = (
    "answer_id", "question_id", "score", "body", "creation_date", "last_edit_date",
    "content_license",
)  # fmt: skip
OWNER_KEYS = ("display_name", "user_id", "user_type")

Item = dict[str, Any]


def page_names(folder: Path) -> tuple[str, ...]:
    """Return the pages of a fetched folder in the order they came, relative to it."""
    return tuple(sorted(f"{PAGES}/{path.name}" for path in (folder / PAGES).glob("[0-9]*.json.gz")))


def page_number(name: str) -> int:
    """Return the number of a page by its name."""
    return int(Path(name).name.partition(".")[0])


def remove_outdated(folder: Path, known: "KnownQuestions") -> int:
    """Remove pages that later ones replace as a whole; return their number.

    Pages that say what is gone stay. Killed at any point, what is left says the same.
    """
    live, removed = known.pages(), 0
    for name in page_names(folder):
        if page_number(name) not in live and not read_page(folder / name)[0].get("gone"):
            (folder / name).unlink()
            removed += 1
    return removed


def write_page(folder: Path, number: int, header: dict[str, Any], body: bytes) -> None:
    """Store an answer whole or not at all; the same bytes for the same answer."""
    path = folder / PAGES / f"{number:08d}.json.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(header, sort_keys=True).encode() + b"\n"
    part = path.with_name(f".{path.name}.part")
    with part.open("wb") as file:
        file.write(gzip.compress(line + body, GZIP_LEVEL, mtime=0))
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def read_page(path: Path) -> tuple[dict[str, Any], list[Any]]:
    """Return the header and the items of a page; SourceError for a damaged file."""
    try:
        head, _, body = gzip.decompress(path.read_bytes()).partition(b"\n")
        header, wrapper = json.loads(head), json.loads(body)
        return header, list(wrapper["items"])
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError, RecursionError) as e:
        raise SourceError(
            f"{path}: not a page of the Stack Exchange API as it was stored ({e}); "
            f"remove the folder {path.parent.parent} to fetch it again"
        ) from e


def digest_item(item: Item) -> bytes:
    """Return a digest over all that records are made of; views and bumps do not change it."""
    answers = item.get("answers")
    known = {
        "question": _pick(item, QUESTION_KEYS),
        "answers": sorted(
            (_pick(each, ANSWER_KEYS) for each in answers if isinstance(each, dict)),
            key=lambda each: str(each["answer_id"]),
        )
        if isinstance(answers, list)
        else None,
    }
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).digest()[:16]


def _pick(item: Item, keys: Iterable[str]) -> Item:
    owner = item.get("owner")
    picked = {key: item.get(key) for key in keys}
    picked["owner"] = {k: owner.get(k) for k in OWNER_KEYS} if isinstance(owner, dict) else None
    return picked


def question_id(item: Any) -> int | None:
    """Return the id of an item that is a question, else None."""
    found = item.get("question_id") if isinstance(item, dict) else None
    if type(found) is not int or not 0 < found < 2**63 or "answer_id" in item:
        return None
    return found


class KnownQuestions:
    """Which questions the stored pages hold, and a digest of each; memory does not grow with it."""

    def __init__(self, folder: Path) -> None:
        """Read the pages of a folder."""
        self._table = sqlite3.connect("", isolation_level=None)  # a temporary file of SQLite's own
        self._table.execute(
            "CREATE TABLE known "
            "(id INTEGER PRIMARY KEY, digest BLOB NOT NULL, page INTEGER NOT NULL)"
        )
        self._table.execute("BEGIN")
        for name in page_names(folder):
            header, items = read_page(folder / name)
            for item in items:
                self.learn(item, page_number(name))
            self.forget(header.get("gone", ()))

    def find(self, number: int) -> bytes | None:
        """Return the digest of a question, None for an unknown one."""
        row = self._table.execute("SELECT digest FROM known WHERE id = ?", (number,)).fetchone()
        return row[0] if row else None

    def learn(self, item: Item, page: int) -> None:
        """Remember a question as it is now, on a page."""
        number = question_id(item)
        if number is not None:
            known = (number, digest_item(item), page)
            self._table.execute("INSERT OR REPLACE INTO known VALUES (?, ?, ?)", known)

    def forget(self, ids: Iterable[int]) -> None:
        """Forget deleted questions."""
        self._table.executemany("DELETE FROM known WHERE id = ?", ((each,) for each in ids))

    def ids_after(self, number: int, limit: int) -> list[int]:
        """Return the next ids above `number`, ascending."""
        rows = self._table.execute(
            "SELECT id FROM known WHERE id > ? ORDER BY id LIMIT ?", (number, limit)
        )
        return [row[0] for row in rows]

    def pages(self) -> set[int]:
        """Return the pages that hold the newest state of a question."""
        return {row[0] for row in self._table.execute("SELECT DISTINCT page FROM known")}

    def __len__(self) -> int:
        """Return the number of known questions."""
        return int(self._table.execute("SELECT count(*) FROM known").fetchone()[0])


def batches(known: KnownQuestions, after: int, size: int, limit: int) -> Iterator[list[int]]:
    """Yield up to `limit` batches of ids above `after`, going round, each id at most once."""
    first, wrapped = after, False
    for _ in range(limit):
        ids = known.ids_after(after, size)
        if wrapped:
            ids = [each for each in ids if each <= first]
        elif not ids:
            wrapped = True
            ids = [each for each in known.ids_after(0, size) if each <= first]
        if not ids:
            return
        yield ids
        after = ids[-1]

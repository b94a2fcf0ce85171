"""Posts as the Stack Exchange API gave them, page after page, folded into their newest state.

Later pages win; a question's answers are those it came with last; what is gone is gone. Folding
goes through a table on disk, so memory does not grow with the site.
"""

import html
import json
import sqlite3
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipelines.records import clean_text
from pipelines.sources.stack_exchange.posts import ANSWER, QUESTION
from pipelines.spiders.stack_exchange_pages import page_names, question_id, read_page

Row = dict[str, Any]
OnBad = Callable[[str, str, str], None]  # id, reason, detail
TABLE = """
CREATE TABLE post (id INTEGER PRIMARY KEY, parent INTEGER, content TEXT NOT NULL);
CREATE INDEX by_parent ON post (parent);
"""


def read_posts(folder: Path, on_bad: OnBad | None = None) -> Iterator[Row]:
    """Yield the posts of a fetched folder as rows of POST_SCHEMA, by ascending id.

    `on_bad` is told id ("" where there is none), reason (bad_item, bad_characters) and detail of
    each item that is no post; it is passed over. Raises SourceError for a damaged page.
    """
    tell = on_bad or (lambda *_: None)
    table = sqlite3.connect("", isolation_level=None)  # a temporary file of SQLite's own
    try:
        table.executescript(TABLE)
        table.execute("BEGIN")
        for name in page_names(folder):
            header, items = read_page(folder / name)
            for item in items:
                _fold(table, item, tell)
            for gone in header.get("gone", ()):
                table.execute("DELETE FROM post WHERE id = ? OR parent = ?", (gone, gone))
        for (content,) in table.execute("SELECT content FROM post ORDER BY id"):
            yield json.loads(content)
    finally:
        table.close()


def _fold(table: sqlite3.Connection, item: Any, tell: OnBad) -> None:
    """Put a question with its answers, or an answer by itself, in the place of what was there."""
    question = question_id(item)
    _put(table, item, tell)
    if question is None:
        return
    answers = item.get("answers")
    if not isinstance(answers, list):
        if item.get("answer_count") == 0:
            table.execute("DELETE FROM post WHERE parent = ?", (question,))
        return
    table.execute("DELETE FROM post WHERE parent = ?", (question,))
    for answer in answers:
        _put(table, answer, tell)


def _put(table: sqlite3.Connection, item: Any, tell: OnBad) -> None:
    try:
        row = post_of(item)
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError, OSError) as error:
        name = item.get("answer_id", item.get("question_id")) if isinstance(item, dict) else None
        tell(str(name) if isinstance(name, int) else "", "bad_item", repr(error)[:200])
        return
    texts = [row["title"], row["body"], row["author"], *(row["tags"] or ())]
    if any(clean_text(text) is None for text in texts if text is not None):
        tell(str(row["id"]), "bad_characters", "NUL bytes or lone surrogates")
        return
    content = json.dumps(row)
    table.execute(
        "INSERT OR REPLACE INTO post VALUES (?, ?, ?)", (row["id"], row["parent"], content)
    )


def post_of(item: Any) -> Row:
    """Return a question or answer of the API as a row of POST_SCHEMA.

    The API escapes titles, tags and names for HTML; the body is HTML. Raises KeyError, TypeError
    or ValueError for an item that is neither.
    """
    is_answer = "answer_id" in item
    owner = item.get("owner") or {}
    title = item.get("title")
    tags = item.get("tags")
    return {
        "id": _whole(item["answer_id" if is_answer else "question_id"]),
        "type": ANSWER if is_answer else QUESTION,
        "parent": _whole(item["question_id"]) if is_answer else None,
        "accepted": None if is_answer else _maybe(_whole, item.get("accepted_answer_id")),
        "score": _whole(item["score"]),
        "title": None if is_answer else _maybe(_unescape, title),
        "body": _text(item.get("body", "")),
        "tags": None if is_answer or tags is None else [_unescape(tag) for tag in tags],
        "author": _maybe(_unescape, owner.get("display_name")),
        "author_id": _maybe(_whole, owner.get("user_id")),
        "created": _date(item["creation_date"]),
        "edited": _maybe(_date, item.get("last_edit_date")),
        "active": _maybe(_date, item.get("last_activity_date")),
        "closed": _maybe(_date, item.get("closed_date")),
        "license": _maybe(_text, item.get("content_license")),
    }


def _maybe(convert: Callable[[Any], Any], value: Any) -> Any:
    return None if value is None else convert(value)


def _whole(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not -(2**63) <= value < 2**63:
        raise TypeError(f"{value!r} is no whole number")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.80} is no text")
    return value


def _unescape(value: Any) -> str:
    return html.unescape(_text(value))


def _date(value: Any) -> str:
    return datetime.fromtimestamp(_whole(value), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")

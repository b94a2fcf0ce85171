"""Makes posts of the attributes of dump rows: whole columns of plain rows, odd rows one by one.

Both ways accept the same values; a row that the columns cannot take is handed back to be parsed by
itself, which says what is wrong with it.
"""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.records import Row
from pipelines.sources.stack_exchange.posts import ANSWER, POST_SCHEMA, QUESTION
from pipelines.sources.stack_exchange.rows import Attributes, BadRow, PlainRows

COLUMNS = {
    "id": "Id", "type": "PostTypeId", "parent": "ParentId", "accepted": "AcceptedAnswerId",
    "score": "Score", "title": "Title", "body": "Body", "tags": "Tags",
    "author": "OwnerDisplayName", "author_id": "OwnerUserId", "created": "CreationDate",
    "edited": "LastEditDate", "active": "LastActivityDate", "closed": "ClosedDate",
    "license": "ContentLicense",
}  # fmt: skip
INTEGERS = ("id", "type", "parent", "accepted", "score", "author_id")
DATES = ("created", "edited", "active", "closed")
REQUIRED = {
    QUESTION: ("id", "score", "title", "body", "created"),
    ANSWER: ("id", "parent", "score", "body", "created"),
}
OTHER_TYPES = {  # https://data.stackexchange.com, table PostTypes
    3: "orphaned_tag_wiki", 4: "tag_wiki_excerpt", 5: "tag_wiki", 6: "moderator_nomination",
    7: "wiki_placeholder", 8: "privilege_wiki",
}  # fmt: skip

INTEGER = re.compile(r"-?[0-9]{1,17}")
INTEGER_LENGTH = 18
SCORE_LIMIT = 2**31
DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(?:\.[0-9]{1,9})?")
DATE_SHAPE = np.frombuffer(b"0000-00-00T00:00:00.000", dtype=np.uint8)
ZERO, NINE, MINUS = b"09-"

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Parsed:
    """The posts of some plain rows, the rows left out by reason, and which rows are odd."""

    batch: pa.RecordBatch
    dropped: Counter[str]
    odd: npt.NDArray[np.int64]


def parse_post(attributes: Attributes) -> Row | str:
    """Return a row of POST_SCHEMA, or why a post of another type is left out.

    Raises BadRow for a missing or impossible value.
    """
    type_ = _parse_integer("PostTypeId", attributes.get("PostTypeId"))
    if type_ is None:
        raise BadRow("missing_PostTypeId", "PostTypeId is missing")
    if type_ not in REQUIRED:
        return drop_type(type_)
    row: Row = {name: attributes.get(attribute) for name, attribute in COLUMNS.items()}
    for name in INTEGERS:
        row[name] = _parse_integer(COLUMNS[name], row[name])
    for name in DATES:
        _check_date(COLUMNS[name], row[name])
    for name in REQUIRED[type_]:
        if row[name] is None:
            raise BadRow(f"missing_{COLUMNS[name]}", f"{COLUMNS[name]} is missing")
    if abs(row["score"]) >= SCORE_LIMIT:
        raise BadRow("bad_Score", f"Score={row['score']} is beyond 32 bits")
    row["tags"] = split_tags(row["tags"])
    return row


def drop_type(type_: int) -> str:
    """Return what a post of a type that is no question or answer is counted under."""
    return OTHER_TYPES.get(type_, "other_post_type")


def split_tags(text: str | None) -> list[str] | None:
    """Return the tags of either form, None where there are none.

    >>> split_tags("<r><multiple-regression>"), split_tags("|r|")
    (['r', 'multiple-regression'], ['r'])
    """
    return text.replace("><", "|").strip("<>|").split("|") if text else None


def _parse_integer(name: str, value: str | None) -> int | None:
    if value is None:
        return None
    if not INTEGER.fullmatch(value):
        raise BadRow(f"bad_{name}", f"{name}={value[:40]!r} is not an integer")
    return int(value)


def _check_date(name: str, value: str | None) -> None:
    if value is None:
        return
    try:
        known = DATE.fullmatch(value) and datetime.fromisoformat(value[:19])
    except ValueError:
        known = None
    if not known:
        detail = f"{name}={value[:40]!r} is not a date such as 2021-04-27T15:06:44.553"
        raise BadRow(f"bad_{name}", detail)


def parse_posts(rows: PlainRows) -> Parsed:
    """Return the posts among plain rows; rows with a value that is not plain are odd."""
    columns = {name: rows.values[attribute] for name, attribute in COLUMNS.items()}
    bad: dict[str, Mask] = {}
    for name in INTEGERS:
        columns[name], bad[name] = _parse_integers(columns[name])
    for name in DATES:
        bad[name] = _find_bad_dates(columns[name])
    scores = columns["score"].fill_null(0).to_numpy(zero_copy_only=False)
    bad["score"] |= np.abs(scores) >= SCORE_LIMIT
    types = columns["type"].fill_null(-1).to_numpy(zero_copy_only=False)
    bad["type"] |= ~columns["type"].is_valid().to_numpy(zero_copy_only=False)
    is_post = ~bad["type"] & np.isin(types, list(REQUIRED))
    wrong = np.logical_or.reduce(list(bad.values()))
    for type_, required in REQUIRED.items():
        for name in required:
            missing = ~columns[name].is_valid().to_numpy(zero_copy_only=False)
            wrong |= (types == type_) & missing
    odd = bad["type"] | (is_post & wrong)
    others = Counter(drop_type(int(type_)) for type_ in types[~bad["type"] & ~is_post])
    columns["tags"] = _split_all_tags(columns["tags"])
    keep = pa.array(is_post & ~odd)
    arrays = [columns[field.name] for field in POST_SCHEMA]
    if keep.true_count != len(keep):
        arrays = [array.filter(keep) for array in arrays]
    cast = [
        array if array.type == field.type else array.cast(field.type)
        for array, field in zip(arrays, POST_SCHEMA, strict=True)
    ]
    return Parsed(pa.RecordBatch.from_arrays(cast, schema=POST_SCHEMA), others, np.flatnonzero(odd))


def _parse_integers(column: pa.StringArray) -> tuple[pa.Int64Array, Mask]:
    """Return the integers of a column and which values are none."""
    data, lengths = _bytes_of(column)
    digits = ((data >= ZERO) & (data <= NINE)) | (data == MINUS)
    if digits.all() and (not len(lengths) or lengths.max() < INTEGER_LENGTH):
        try:
            return column.cast(pa.int64()), np.zeros(len(column), dtype=bool)
        except pa.ArrowInvalid:
            pass
    bad = _find_bad(column, lambda value: _parse_integer("", value))
    return pc.if_else(pa.array(bad), None, column).cast(pa.int64()), bad


def _find_bad_dates(column: pa.StringArray) -> Mask:
    """Return which values of a column are no dates."""
    data, lengths = _bytes_of(column)
    width = len(DATE_SHAPE)
    if column.null_count == len(column):
        return np.zeros(len(column), dtype=bool)
    if np.isin(lengths, (0, width)).all() and len(data) == width * (
        len(column) - column.null_count
    ):
        block = data.reshape(-1, width)
        digit = (block >= ZERO) & (block <= NINE)
        shaped = np.where(DATE_SHAPE == ZERO, digit, block == DATE_SHAPE).all()
        if shaped and (block[:, :4] != ZERO).any(axis=1).all():  # Python knows no year 0
            try:
                column.cast(pa.timestamp("ms"))
            except pa.ArrowInvalid:
                pass
            else:
                return np.zeros(len(column), dtype=bool)
    return _find_bad(column, lambda value: _check_date("", value))


def _find_bad(column: pa.StringArray, check: Callable[[str | None], object]) -> Mask:
    def is_bad(value: str | None) -> bool:
        try:
            check(value)
        except BadRow:
            return True
        return False

    return np.array([is_bad(value) for value in column.to_pylist()], dtype=bool)


def _bytes_of(column: pa.StringArray) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int32]]:
    """Return the bytes of all values in a row, and their lengths."""
    _, offsets_buffer, data = column.buffers()
    offsets = np.frombuffer(offsets_buffer, dtype=np.int32, count=len(column) + 1)
    content = np.frombuffer(data or b"", dtype=np.uint8)[offsets[0] : offsets[-1]]
    return content, np.diff(offsets)


def _split_all_tags(column: pa.StringArray) -> pa.ListArray:
    """Return what `split_tags` returns for each value."""
    some = pc.if_else(pc.equal(column, ""), None, column)
    bare = pc.utf8_trim(pc.replace_substring(some, "><", "|"), "<>|")
    return pc.split_pattern(bare, "|")

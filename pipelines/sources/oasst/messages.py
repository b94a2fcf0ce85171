"""Turns the rows of any known layout into messages of one: the first pass over the raw files.

Layouts are told apart row by row: a tree (`prompt` with nested `replies`), a message with nested
`replies`, a flat message of the export or the hub (labels as parallel lists), a flat seed message
(`user_message_id`, `parent_message_id`).
"""

import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.engine import SAMPLES_PER_REASON, Outcome, Params, Reject
from pipelines.manifest import Counts, canonical
from pipelines.records import clean_text
from pipelines.sources.oasst.rows import Unread, read_rows

MESSAGE_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("parent", pa.string()),
        pa.field("tree", pa.string()),
        pa.field("state", pa.string()),
        pa.field("role", pa.string(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("lang", pa.string()),
        pa.field("created", pa.string()),
        pa.field("author", pa.string()),
        pa.field("model", pa.string()),
        pa.field("rank", pa.int64()),
        pa.field("deleted", pa.bool_()),
        pa.field("synthetic", pa.bool_()),
        pa.field("reviewed", pa.bool_()),
        pa.field("labels", pa.string()),
        # What chooses among copies of a message: the fields it has, and a digest of them.
        pa.field("known", pa.int32()),
        pa.field("digest", pa.string()),
    ]
)
ROWS_PER_GROUP = 5000
# No message has this id, so what names it as its parent is an orphan.
NOBODY = ""
ROLES = {"prompter": "user", "user": "user", "assistant": "assistant"}

Message = dict[str, Any]


class BadMessage(ValueError):
    """Something that is no message; `reason` is what it is counted under."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def scan_file(inputs: Sequence[Path], output: Path, params: Params) -> Outcome:
    """Write the messages of one raw file; rows_in counts messages and what should have been one.

    `params` holds root and id. Raises SourceError for a file that cannot be read.
    """
    [path] = inputs
    name = path.relative_to(params["root"]).as_posix()
    quarantined: Counter[str] = Counter()
    rejects: list[Reject] = []
    written = 0
    batch: list[Message] = []
    with pq.ParquetWriter(
        output, MESSAGE_SCHEMA, compression="zstd", compression_level=1
    ) as writer:
        for position, row in read_rows(path):
            for found in read_messages(row):
                if isinstance(found, BadMessage):
                    quarantined[found.reason] += 1
                    if quarantined[found.reason] <= SAMPLES_PER_REASON:
                        where = f"{params['id']}:{name} {position}"
                        shown = where.encode(errors="backslashreplace").decode()
                        rejects.append({"id": shown, "reason": found.reason, "detail": str(found)})
                    continue
                batch.append(found)
            if len(batch) >= ROWS_PER_GROUP:
                written += _write(writer, batch)
        written += _write(writer, batch)
    counts = Counts(
        rows_in=written + quarantined.total(),
        rows_out=written,
        used=written,
        quarantined=dict(sorted(quarantined.items())),
    )
    return Outcome(counts, rejects=tuple(rejects))


def _write(writer: pq.ParquetWriter, batch: list[Message]) -> int:
    count = len(batch)
    if batch:
        writer.write_table(pa.Table.from_pylist(batch, schema=MESSAGE_SCHEMA))
        batch.clear()
    return count


def read_messages(row: Any) -> Iterator[Message | BadMessage]:
    """Yield the messages of one row of any layout, parents before their replies.

    A bad message is yielded as BadMessage; its replies follow, without a parent to be found.
    """
    if isinstance(row, Unread):
        yield BadMessage(row.reason, row.detail)
        return
    if not isinstance(row, dict):
        yield BadMessage("not_an_object", f"expected a message or tree, got a {_kind(row)}")
        return
    above: dict[str, Any] = {}
    if isinstance(row.get("prompt"), dict):
        above = {"tree": row.get("message_tree_id"), "state": row.get("tree_state")}
        row = row["prompt"]
    todo: list[tuple[Any, dict[str, Any]]] = [(row, above)]
    while todo:
        node, above = todo.pop()
        try:
            message = read_message(node, above)
        except BadMessage as error:
            yield error
            message = {**above, "id": NOBODY}
        else:
            yield message
        replies = node.get("replies") if isinstance(node, dict) else None
        if replies is not None and not isinstance(replies, list):
            yield BadMessage("bad_field", f"replies: expected a list, got a {_kind(replies)}")
        elif replies:
            below = {
                "parent": message["id"],
                "tree": above.get("tree"),
                "state": above.get("state"),
            }
            todo.extend((reply, below) for reply in reversed(replies))


def read_message(node: Any, above: Mapping[str, Any]) -> Message:
    """Return one message with the fields of MESSAGE_SCHEMA; what its tree says of it wins.

    Raises BadMessage.
    """
    if not isinstance(node, dict):
        raise BadMessage("not_an_object", f"expected a message, got a {_kind(node)}")
    if not any(key in node for key in ("role", "text", "message_id", "user_message_id")):
        raise BadMessage("unknown_layout", f"keys: {', '.join(sorted(map(str, node))[:8])[:200]}")
    seed = "user_message_id" in node and "message_id" not in node
    message: Message = {
        "id": _read_id(node, "user_message_id" if seed else "message_id"),
        "parent": _read_string(node, "parent_message_id" if seed else "parent_id"),
        "tree": _read_string(node, "message_tree_id"),
        "state": _read_string(node, "tree_state"),
        "role": _read_role(node),
        "text": _read_text(node),
        "lang": _read_string(node, "lang"),
        "created": _read_string(node, "created_date"),
        "author": _read_string(node, "user_id"),
        "model": _read_string(node, "model_name"),
        "rank": _read_rank(node),
        "deleted": _read_flag(node, "deleted"),
        "synthetic": _read_flag(node, "synthetic"),
        "reviewed": _read_flag(node, "review_result"),
        "labels": _read_labels(node.get("labels")),
    }
    told = {key: _read_string(above, key) for key in above}
    message.update({key: value for key, value in told.items() if value is not None})
    message["known"] = sum(value is not None for value in message.values())
    message["digest"] = hashlib.sha256(canonical(message).encode()).hexdigest()
    return message


def _read_id(node: Mapping[str, Any], key: str) -> str:
    found = _read_string(node, key)
    if not found:
        raise BadMessage("missing_id", f"no {key}")
    return found


def _read_string(node: Mapping[str, Any], key: str) -> str | None:
    value = node.get(key)
    if value is None:
        return None
    if isinstance(value, date):
        value = value.isoformat()
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise BadMessage("bad_field", f"{key}: expected text, got a {_kind(value)}")
    if clean_text(value) is None:
        raise BadMessage("bad_field", f"{key}: holds NUL bytes or half a character")
    return value


def _read_role(node: Mapping[str, Any]) -> str:
    role = _read_string(node, "role")
    if role is None:
        raise BadMessage("missing_role", "no role")
    if role not in ROLES:
        raise BadMessage("unknown_role", f"role {role[:50]!r}, expected prompter or assistant")
    return ROLES[role]


def _read_text(node: Mapping[str, Any]) -> str:
    text = node.get("text")
    if text is None:
        raise BadMessage("missing_text", "no text")
    if not isinstance(text, str):
        raise BadMessage("bad_field", f"text: expected text, got a {_kind(text)}")
    if clean_text(text) is None:
        raise BadMessage("bad_text", "the text holds NUL bytes or half a character")
    if not text.strip():
        raise BadMessage("empty_text", "the text is empty")
    return text


def _read_rank(node: Mapping[str, Any]) -> int | None:
    rank = _read_number(node.get("rank"), "rank")
    if rank is None:
        return None
    if rank != int(rank) or not 0 <= rank < 2**31:
        raise BadMessage("bad_field", f"rank: expected 0, 1, ..., got {rank}")
    return int(rank)


def _read_number(value: Any, key: str) -> float | None:
    """Return a number, None for none and for NaN, as tables write it."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 2**53:
        raise BadMessage("bad_field", f"{key}: expected a number, got a {_kind(value)}")
    return float(value)


def _read_flag(node: Mapping[str, Any], key: str) -> bool | None:
    value = node.get(key)
    if value is None or isinstance(value, bool):
        return value
    raise BadMessage("bad_field", f"{key}: expected true or false, got a {_kind(value)}")


def _read_labels(labels: Any) -> str | None:
    """Return {label: value} as JSON, from objects or parallel lists; None where there are none."""
    if labels is None:
        return None
    if not isinstance(labels, dict):
        raise BadMessage("bad_field", f"labels: expected an object, got a {_kind(labels)}")
    names, values = labels.get("name"), labels.get("value")
    if isinstance(names, list) and isinstance(values, list):
        if len(names) != len(values):
            raise BadMessage("bad_field", f"labels: {len(names)} names, {len(values)} values")
        pairs = list(zip(names, values, strict=True))
    else:
        pairs = list(labels.items())
    found = {}
    for name, value in pairs:
        if not isinstance(name, str) or clean_text(name) is None:
            raise BadMessage("bad_field", "labels: a name is no text")
        number = _read_number(value.get("value") if isinstance(value, dict) else value, "labels")
        if number is not None:
            found[name] = round(number, 4)
    return canonical(found) if found else None


def _kind(value: Any) -> str:
    return type(value).__name__

"""OpenAssistant messages in the layouts in which they are found."""

import json
from collections.abc import Iterator

from pipelines.engine import Work
from pipelines.records import read_rows
from pipelines.settings.sources import OasstSource
from pipelines.sources import oasst

READY = "ready_for_export"


def message(message_id, parent=None, **fields):
    """Return a flat message of the export; a parent's id ends in its depth, as its own does."""
    role = fields.pop("role", "prompter" if int(message_id[-1]) % 2 == 0 else "assistant")
    return {
        "message_id": message_id,
        "parent_id": parent,
        "text": f"text of {message_id}",
        "role": role,
        "lang": "en",
        "review_result": True,
        "deleted": False,
        "synthetic": False,
        **fields,
    }


def nest(messages):
    """Return the trees of flat messages: export rows with nested replies."""
    nodes = {m["message_id"]: {**m, "replies": []} for m in messages}
    for node in nodes.values():
        parent = node.pop("parent_id")
        if parent is not None:
            node["parent_id"] = parent
            nodes[parent]["replies"].append(node)
    return [
        {"message_tree_id": node["message_id"], "tree_state": READY, "prompt": node}
        for node in nodes.values()
        if "parent_id" not in node
    ]


def json_lines(rows):
    """Return rows as the bytes of a .jsonl file."""
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def oasst_source(path, **keys):
    """Return the settings of a source that reads a path."""
    return {"type": "oasst", "id": "o", "path": str(path), "license": "Apache-2.0", **keys}


def read_oasst(path, folder, *, limit=None, **keys):
    """Read a path in a build folder, without a store; return (rows, counts, what was read)."""
    source = OasstSource.model_validate(oasst_source(path, **keys))
    raw = oasst.locate(source)
    folder.mkdir(parents=True, exist_ok=True)
    given = {
        "root": str(raw.root),
        "id": source.id,
        "where": "sources.0",
        "license": source.license,
        "allow_unlicensed": source.allow_unlicensed,
        "openai_outputs": source.openai_outputs,
        "origin": {"revision": raw.origin.revision, "url": raw.origin.url, "licenses": {}},
        "max_bytes": 1_000_000,
        "limit": limit,
        "first": 0,
    }
    made = oasst.read(source, raw, Work(folder), given)
    rows = [row for r in made.reports for row in read_rows(folder / r.shard.file)]
    return rows, sum((r.counts for r in made.reports), made.unread), made


def spoken(row) -> Iterator[tuple[str, bool]]:
    """Yield (id, trained) of each turn of a record."""
    ids = json.loads(row["meta"])["message_ids"]
    return ((name, turn["train"]) for name, turn in zip(ids, row["messages"], strict=True))

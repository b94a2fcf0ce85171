"""Finds the trees among messages that come in any order, and shares them out over the shards.

Only ids are held in memory. Of several copies of a message the fullest one stays.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.engine import SAMPLES_PER_REASON, Reject
from pipelines.manifest import Counts
from pipelines.sources.oasst.messages import NOBODY

MESSAGES_PER_SHARD = 10_000
PART_SCHEMA = pa.schema(
    [
        pa.field("file", pa.int32(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
        pa.field("root", pa.string(), nullable=False),
    ]
)

Address = tuple[int, int]  # (number of the file, row in it)


@dataclass(slots=True)
class Left:
    """What is in no tree: counts by reason, and samples."""

    source: str
    dropped: Counter[str] = field(default_factory=Counter)
    quarantined: Counter[str] = field(default_factory=Counter)
    rejects: list[Reject] = field(default_factory=list)

    def quarantine(self, message: str, reason: str, detail: str) -> None:
        """Count a message that contradicts the others."""
        self.quarantined[reason] += 1
        self._sample(self.quarantined, message, reason, detail)

    def drop(self, message: str, reason: str, detail: str) -> None:
        """Count a message that is left out."""
        self.dropped[reason] += 1
        self._sample(self.dropped, message, reason, detail)

    def _sample(self, counter: Counter[str], message: str, reason: str, detail: str) -> None:
        if counter[reason] <= SAMPLES_PER_REASON:
            row = {"id": f"{self.source}:{message}", "reason": reason, "detail": detail}
            self.rejects.append(row)

    def counts(self, used: int = 0, rows_out: int = 0) -> Counts:
        """Return the counts, with `used` messages besides."""
        return Counts(
            rows_in=used + self.dropped.total() + self.quarantined.total(),
            rows_out=rows_out,
            used=used,
            dropped=dict(sorted(self.dropped.items())),
            quarantined=dict(sorted(self.quarantined.items())),
        )


@dataclass(frozen=True, slots=True)
class Part:
    """Whole trees for one shard: the file that lists their messages, and how many those are."""

    path: Path
    messages: int


def plan_parts(scanned: Sequence[Path], folder: Path, left: Left) -> list[Part]:
    """Write the part files of all trees, sorted by root; there is one even where none is.

    Messages that are in no tree go to `left`: copies, orphans, cycles.
    """
    addresses, parents = _read_ids(scanned, left)
    roots = find_roots(parents, left)
    members: dict[str, list[str]] = {}
    for message, root in roots.items():
        members.setdefault(root, []).append(message)
    parts: list[Part] = []
    rows: list[dict[str, object]] = []
    for root in sorted(members):
        if rows and len(rows) + len(members[root]) > MESSAGES_PER_SHARD:
            parts.append(_write_part(folder, len(parts), rows))
            rows = []
        for message in sorted(members[root]):
            file, row = addresses[message]
            rows.append({"file": file, "row": row, "root": root})
    parts.append(_write_part(folder, len(parts), rows))
    return parts


def _write_part(folder: Path, number: int, rows: list[dict[str, object]]) -> Part:
    path = folder / f"trees-{number:05d}.parquet"
    temporary = path.with_name(f".{path.name}.part")
    pq.write_table(pa.Table.from_pylist(rows, schema=PART_SCHEMA), temporary)
    temporary.replace(path)
    return Part(path, len(rows))


def _read_ids(
    scanned: Sequence[Path], left: Left
) -> tuple[dict[str, Address], dict[str, str | None]]:
    """Return the address and the parent of each message, the fullest of its copies."""
    best: dict[str, tuple[int, str, Address, str | None]] = {}
    copies: list[str] = []
    columns = ["id", "parent", "known", "digest"]
    for number, path in enumerate(scanned):
        row = -1
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(columns=columns):
                for message in batch.to_pylist():
                    row += 1
                    # The fullest first, then whichever: equal digests are equal messages.
                    mine = (-message["known"], message["digest"], (number, row), message["parent"])
                    other = best.setdefault(message["id"], mine)
                    if other is not mine:
                        copies.append(message["id"])
                        best[message["id"]] = min(mine, other)
    for message_id in sorted(copies):
        left.quarantine(message_id, "duplicate_id", "another message has the same id")
    return (
        {message_id: found[2] for message_id, found in best.items()},
        {message_id: found[3] for message_id, found in best.items()},
    )


def find_roots(parents: Mapping[str, str | None], left: Left) -> dict[str, str]:
    """Return the root of each message that has one; the others go to `left`.

    A message whose parent is missing is an orphan, one that is its own ancestor is in a cycle;
    what follows them is cut off.
    """
    fate: dict[str, tuple[str | None, str]] = {}  # (root, or None with the reason)
    for start in parents:
        path: list[str] = []
        place: dict[str, int] = {}
        message: str | None = start
        while message is not None and message in parents and message not in fate:
            if message in place:
                cycle = path[place[message] :]
                fate.update(dict.fromkeys(cycle, (None, "cycle")))
                path = path[: place[message]]
                break
            place[message] = len(path)
            path.append(message)
            message = parents[message]
        _settle(path, message, fate)
    for message_id in sorted(fate):
        root, reason = fate[message_id]
        if root is None:
            _leave(message_id, reason, parents[message_id], left)
    return {message_id: root for message_id, (root, _) in fate.items() if root is not None}


def _settle(path: list[str], end: str | None, fate: dict[str, tuple[str | None, str]]) -> None:
    """Decide the fate of a path upwards to `end`: no parent, a missing or a known one."""
    if not path:
        return
    if end is None:
        fate.update(dict.fromkeys(path, (path[-1], "")))
    elif end in fate:
        root = fate[end][0]
        fate.update(dict.fromkeys(path, (root, "" if root is not None else "cut_off")))
    else:
        fate.update(dict.fromkeys(path, (None, "cut_off")))
        fate[path[-1]] = (None, "orphan")


def _leave(message_id: str, reason: str, parent: str | None, left: Left) -> None:
    if reason == "orphan":
        detail = "no message" if parent == NOBODY else f"no message {parent!r}"
        left.quarantine(message_id, reason, f"{detail} that it replies to")
    elif reason == "cycle":
        left.quarantine(message_id, reason, "replies to its own replies")
    else:
        left.drop(message_id, reason, "replies to a message that was left out")

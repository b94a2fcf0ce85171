"""What a build of `dedup` leaves for the next one, so that a refresh does not redo the old.

Records that share a bucket, directly or through others, are a component; components are resolved
one by one. A component that gains no record and loses none is what it was: its members are taken
from the kept index. New records, and the components that one of them shares a bucket with or that
lost a record, are resolved as in a first build, over these records alone. So a refresh gives the
bytes of a build from nothing.

An index is a folder: a label for each document (equal in a component), the members of clusters,
and per shard its output. It is named by its shards' digests, lies in a folder named by the settings
and the code, and is renamed into place whole, its manifest last; one that does not match its
digests is passed over.
"""

import contextlib
import json
import os
import shutil
import threading
import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipelines.curate.clusters import MEMBER_SCHEMA, read_members
from pipelines.curate.signatures import KEPT_SECONDS, Index, mapped
from pipelines.curate.words import Hashes, Integers
from pipelines.engine import Outcome, ShardReport
from pipelines.manifest import Counts, Shard, digest_of, sha256_file
from pipelines.store import write_atomic

Mask = npt.NDArray[np.bool_]

MANIFEST, LABELS, MEMBERS = "index.json", "labels.bin", "members.arrow"
MOST_KEPT = 8
ABANDONED_SECONDS = 24 * 3600
BYTES_PER_KEY = 32


class Base:
    """A kept index, and where its documents are among those of this build."""

    def __init__(
        self, folder: Path, old: Sequence[Mapping[str, Any]], new: Sequence[Shard]
    ) -> None:
        """Match the shards of both; the index is only mapped by `open`."""
        self.folder = folder
        self.shards = match_shards([each["sha256"] for each in old], [s.sha256 for s in new])
        self.old_rows: list[int] = [each["rows"] for each in old]
        self.old_firsts = list(accumulate(self.old_rows, initial=0))
        self.new_firsts = list(accumulate((shard.rows for shard in new), initial=0))
        self.rows = sum(self.old_rows[number] for number in self.shards.values())
        self.labels: Integers = np.empty(0, np.int64)
        self.members = MEMBER_SCHEMA.empty_table()

    def open(self) -> bool:
        """Map the index; False where it is not what its manifest says."""
        try:
            told = json.loads((self.folder / MANIFEST).read_text())["sha256"]
            for name in (LABELS, MEMBERS):
                if sha256_file(self.folder / name) != told[name]:
                    return False
            self.labels = mapped(self.folder / LABELS, np.int64)
            self.members = read_members(self.folder / MEMBERS)
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowInvalid):
            return False
        return int(self.labels.size) == self.old_firsts[-1]

    def renumber(self, documents: Integers) -> Integers:
        """Return the numbers in this build of old documents, -1 for those that are gone."""
        shifts = np.full(len(self.old_rows), np.iinfo(np.int64).min, np.int64)
        for new, old in self.shards.items():
            shifts[old] = self.new_firsts[new] - self.old_firsts[old]
        if not len(documents):
            return documents
        shard = np.searchsorted(self.old_firsts, documents, "right") - 1
        moved: Integers = np.maximum(documents + shifts[shard], -1)
        return moved

    def known_labels(self) -> Iterator[tuple[int, Integers]]:
        """Yield the number of each shard that is known, and its documents' old labels."""
        for new, old in self.shards.items():
            first = self.old_firsts[old]
            yield new, self.labels[first : first + self.old_rows[old]]

    def report(self, shard: int) -> Path | None:
        """Return the report on a shard's kept output, which lies beside it."""
        old = self.shards.get(shard)
        return None if old is None else self.folder / f"output-{old:05d}.json"


def match_shards(old: Sequence[str], new: Sequence[str]) -> dict[int, int]:
    """Return {place among the new: place among the old} of equal digests, in ascending order.

    Order counts: of records with equal score and id, the first one stays.

    >>> match_shards(["a", "b", "c", "b"], ["x", "b", "b", "c"])
    {1: 1, 2: 3}
    """
    places: dict[str, list[int]] = defaultdict(list)
    for number, digest in enumerate(old):
        places[digest].append(number)
    found: dict[int, int] = {}
    start = 0
    for number, digest in enumerate(new):
        mine = places[digest]
        at = bisect_left(mine, start)
        if at < len(mine):
            found[number] = mine[at]
            start = mine[at] + 1
    return found


def find_base(root: Path, shards: Sequence[Shard]) -> Base | None:
    """Return the whole index that knows most of these shards' records, None where none does."""
    known = []
    for path in root.glob(f"*/{MANIFEST}"):
        try:
            old = json.loads(path.read_text())["shards"]
            known.append(Base(path.parent, old, shards))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    for base in sorted(known, key=lambda base: (-base.rows, base.folder.name)):
        if base.rows and base.open():
            return base
    return None


def choose_active(index: Index, base: Base | None, path: Path, budget: int) -> Mask:
    """Write and map which documents are compared: all, or those that `base` cannot tell of.

    `budget` bounds the keys held in memory, in bytes.
    """
    np.ones(index.size, np.bool_).tofile(path)
    active: Mask = mapped(path, np.bool_, "r+")
    if base is None:
        return active
    touched = _find_touched(index, base, path.with_name("touched.bin"), budget)
    for new, labels in base.known_labels():
        first = base.new_firsts[new]
        active[first : first + len(labels)] = touched[labels]
    return active


def _find_touched(index: Index, base: Base, path: Path, budget: int) -> Mask:
    """Write and map by old label whether the component lost a record or meets a new one."""
    np.zeros(len(base.labels), np.bool_).tofile(path)
    touched: Mask = mapped(path, np.bool_, "r+")
    for old in set(range(len(base.old_rows))) - set(base.shards.values()):
        first = base.old_firsts[old]
        touched[base.labels[first : first + base.old_rows[old]]] = True
    for name in ("sum", *index.bands):
        for keys in _new_keys(index, base, name, budget):
            for number, (values, valid) in enumerate(_keys_of(index, name)):
                if number in base.shards:
                    places = keys.find(values)
                    first = base.old_firsts[base.shards[number]]
                    touched[base.labels[first + places[valid[places]]]] = True
    return touched


class _Keys:
    """A set of keys to look many others up in; a bitmap turns most of them away."""

    def __init__(self, keys: Sequence[Hashes]) -> None:
        self._keys = np.unique(np.concatenate(keys))
        bits = min(max(16, len(self._keys).bit_length() + 3), 27)
        self._shift = np.uint64(64 - bits)
        self._bitmap = np.zeros(1 << bits, np.bool_)
        self._bitmap[self._keys >> self._shift] = True

    def find(self, values: Hashes) -> Integers:
        """Return the places of the values that are in the set."""
        places = np.flatnonzero(self._bitmap[values >> self._shift])
        chosen = values[places]
        at = np.minimum(np.searchsorted(self._keys, chosen), len(self._keys) - 1)
        found: Integers = places[self._keys[at] == chosen]
        return found


def _keys_of(index: Index, name: str) -> Iterator[tuple[Hashes, Mask]]:
    """Yield a column of each shard, and which documents have such a key: bands need shingles."""
    for column, shingles in zip(index.columns(name), index.columns("shingles"), strict=True):
        valid = np.ones(len(column.values), np.bool_) if name == "sum" else shingles.values > 0
        yield column.values, valid


def _new_keys(index: Index, base: Base, name: str, budget: int) -> Iterator[_Keys]:
    """Yield the keys of a column over the new shards, in pieces that fit the budget."""
    held: list[Hashes] = []
    for number, (values, valid) in enumerate(_keys_of(index, name)):
        mine = values[valid]
        if number in base.shards or not len(mine):
            continue
        if held and BYTES_PER_KEY * (sum(map(len, held)) + len(mine)) > budget:
            yield _Keys(held)
            held = []
        held.append(mine)
    if held:
        yield _Keys(held)


def carry_members(base: Base, active: Mask, path: Path) -> int:
    """Write the members of the components that stay as they are; return their clusters' number."""
    clusters = 0
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, MEMBER_SCHEMA) as writer:
        for batch in base.members.to_batches():
            documents = base.renumber(batch["document"].to_numpy())
            stays = documents >= 0
            stays[stays] = ~active[documents[stays]]
            rows = batch.filter(pa.array(stays))
            named = base.renumber(rows["cluster"].to_numpy())
            clusters += int(np.count_nonzero(named == documents[stays]))
            rows = rows.set_column(0, MEMBER_SCHEMA.field(0), pa.array(documents[stays]))
            place = MEMBER_SCHEMA.get_field_index("cluster")
            writer.write_batch(rows.set_column(place, MEMBER_SCHEMA.field(place), pa.array(named)))
    return clusters


def keep_index(
    root: Path,
    shards: Sequence[Shard],
    base: Base | None,
    active: Mask,
    labels_file: Path,
    members: Iterable[pa.Table],
    made: Sequence[ShardReport],
) -> None:
    """Keep what the next build needs, whole or not at all, in the place of what `base` kept.

    `labels_file` has the labels of active documents, `members` is a table for each shard.
    """
    sizes = [{"sha256": shard.sha256, "rows": shard.rows} for shard in shards]
    folder = root / digest_of([size["sha256"] for size in sizes])[:16]
    if base is not None and base.folder == folder:
        os.utime(folder)
        return
    part = root / f".{folder.name}.{os.getpid()}-{threading.get_ident()}.part"
    part.mkdir(parents=True)
    _write_labels(part / LABELS, shards, base, active, mapped(labels_file, np.int64))
    with (
        pa.OSFile(str(part / MEMBERS), "wb") as file,
        pa.ipc.new_file(file, MEMBER_SCHEMA) as writer,
    ):
        for table in members:
            writer.write_table(table)
    for number, report in enumerate(made):
        _link(labels_file.with_name(report.shard.file), part / f"output-{number:05d}")
        note = part / f"output-{number:05d}.json"
        note.write_text(json.dumps(asdict(report), ensure_ascii=False), encoding="utf-8")
    digests = {name: sha256_file(part / name) for name in (LABELS, MEMBERS)}
    write_atomic(part / MANIFEST, json.dumps({"shards": sizes, "sha256": digests}))
    shutil.rmtree(folder, ignore_errors=True)
    part.replace(folder)
    if base is not None:
        shutil.rmtree(base.folder, ignore_errors=True)


def _write_labels(
    path: Path, shards: Sequence[Shard], base: Base | None, active: Mask, labels: Integers
) -> None:
    known = dict(base.known_labels()) if base else {}
    first = 0
    with path.open("wb") as file:
        for number, shard in enumerate(shards):
            mine = np.array(labels[first : first + shard.rows])
            if base is not None and number in known:
                old = ~active[first : first + shard.rows]
                mine[old] = base.renumber(known[number][old])
            mine.tofile(file)
            first += shard.rows


def reuse_output(kept: Path, cause: str, output: Path) -> Outcome | None:
    """Put a kept output in its place if `cause` is what made it; None where it is not, or damaged.

    `kept` is the file's report, as `Base.report` names it.
    """
    try:
        report = json.loads(kept.read_text(encoding="utf-8"))
        shard, file = Shard(**report["shard"]), kept.with_suffix("")
        if report["extra"]["cause"] != cause or sha256_file(file) != shard.sha256:
            return None
        _link(file, output)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Outcome(
        Counts(**report["counts"]), rejects=tuple(report["rejects"]), extra=report["extra"]
    )


def _link(source: Path, target: Path) -> None:
    """Give a finished file, which nobody changes, a second name; copy it where that cannot be."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def forget_old(root: Path) -> None:
    """Remove indexes beyond the newest few or unused for 30 days, and parts of killed builds."""
    if not root.is_dir():
        return
    os.utime(root)
    ages = []
    for folder in root.iterdir():
        with contextlib.suppress(OSError):
            ages.append((time.time() - folder.stat().st_mtime, folder))
    whole = sorted(each for each in ages if not each[1].name.startswith("."))
    old = [folder for age, folder in whole[:MOST_KEPT] if age > KEPT_SECONDS]
    old += [folder for _, folder in whole[MOST_KEPT:]]
    old += [f for age, f in ages if f.name.startswith(".") and age > ABANDONED_SECONDS]
    for folder in old:
        shutil.rmtree(folder, ignore_errors=True)

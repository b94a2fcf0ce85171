"""From a run back to its records: the chain of stages, urls and licenses of the training set.

The training set is what the packed training shards hold; with few steps a model has seen only part
of it. Invariant: each record id in those shards is found again in the split stage, so the license
counts cover all that the model may have seen, and nothing that it cannot have.
"""

import hashlib
import heapq
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.errors import StoreError
from pipelines.manifest import Manifest
from pipelines.markdown import table
from pipelines.plan import STAGES
from pipelines.runs import Run
from pipelines.store import StageRef, Store

COLUMNS = ("id", "source", "revision", "url", "author", "license")
NUM_EXAMPLES = 3

Lineage = dict[str, Any]


def build_lineage(run: Run, store: Store) -> Lineage:
    """Return the lineage of a run: its stages in order, and what each source gave to training.

    `sources` holds for each id what `collect` reported of it (revision, license, url, records) and
    `used`, the training set's part: {records, licenses, authors, urls, examples}; a license ""
    means none is stated. Raises StoreError where a stage is gone, was rebuilt with another result,
    or does not fit the others.
    """
    refs, info = run.refs(), run.info()
    manifests = {s.name: _manifest(run, store, refs[s.name]) for s in STAGES}
    collected = manifests["collect"].report.get("sources", {})
    used = _sources_used(run, store)
    return {
        "run": run.name,
        "key": info["key"],
        "recipe": info["recipe"],
        "git_sha": info["git_sha"],
        "dataset": refs["pack"].digest,
        "tokenizer": refs["tokenizer"].digest,
        "stages": [_stage(manifest, refs[name]) for name, manifest in manifests.items()],
        "sources": {
            name: {**collected.get(name, {}), "used": used.get(name, _Used()).summary()}
            for name in sorted({*collected, *used})
        },
    }


def records_of_run(run: Run, store: Store) -> Iterator[dict[str, Any]]:
    """Yield id, source, revision, url, author and license of every record in the training set.

    A record that a mixture repeats comes once. Reads only the columns named, a batch at a time; the
    order is that of the split stage. Raises StoreError where a stage is gone or packed ids are
    unknown to the split stage.
    """
    refs = run.refs()
    for name in ("pack", "split"):
        _manifest(run, store, refs[name])
    ids = _packed_ids(store, refs["pack"])
    seen = np.zeros(len(ids), dtype=bool)
    for _, path in store.shards(refs["split"], "train"):
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            for batch in file.iter_batches(batch_size=65_536, columns=list(COLUMNS)):
                numbers = pc.fill_null(pc.index_in(batch.column("id"), value_set=ids), -1)
                number, row = np.unique(numbers.to_numpy(), return_index=True)
                row, number = row[number >= 0], number[number >= 0]
                new = np.sort(row[~seen[number]])
                seen[number] = True
                yield from batch.take(pa.array(new)).to_pylist()
    if not seen.all():
        raise StoreError(
            f"run {run.name}: {len(ids)} records are packed, but {seen.sum()} of them are in the "
            f"training split {refs['split'].folder}; `starloom data verify` says which is damaged"
        )


def trace_text(lineage: Lineage) -> str:
    """Return the lineage as Markdown that reads well in a terminal, too."""
    stages = [
        [
            stage["stage"],
            stage["digest"][:12],
            stage["rows_in"],
            stage["rows_out"],
            reasons_text(stage),
            " ".join(f"{name}:{digest[:12]}" for name, digest in stage["upstream"].items()) or "-",
        ]
        for stage in lineage["stages"]
    ]
    code = lineage["git_sha"] or "unknown"
    parts = [
        f"run {lineage['run']} (recipe {lineage['recipe']}, code {code})",
        table(["stage", "digest", "rows in", "rows out", "left out", "made from"], stages),
    ]
    for name, source in lineage["sources"].items():
        used = source["used"]
        revision = source.get("revision") or "unknown"
        parts.append(
            f"source {name}, revision {revision}: {used['records']:,} of "
            f"{source.get('records', 0):,} records in the training set, {used['urls']:,} urls, "
            f"{used['authors']:,} authors"
        )
        parts.append(table(["license", "records"], license_rows(used["licenses"])))
        parts.append("\n".join(f"- {url}" for url in used["examples"]) or "(no urls)")
    return "\n\n".join(parts)


def reasons_text(stage: dict[str, Any]) -> str:
    """Return why rows left a stage, most frequent first: "duplicate 12, parse_error 3"."""
    lost = Counter(stage["dropped"])
    lost.update(stage["quarantined"])
    return ", ".join(f"{name} {n:,}" for name, n in lost.most_common() if n) or "-"


def license_rows(licenses: dict[str, int]) -> list[tuple[str, int]]:
    """Return (license, records), most frequent first; a missing license is named so."""
    ordered = sorted(licenses.items(), key=lambda pair: (-pair[1], pair[0]))
    return [(name or "(none stated)", count) for name, count in ordered]


@dataclass(slots=True)
class _Used:
    """What the training set holds of one source."""

    licenses: Counter[str] = field(default_factory=Counter)
    authors: set[str] = field(default_factory=set)
    urls: set[str] = field(default_factory=set)

    def add(self, record: dict[str, Any]) -> None:
        self.licenses[record["license"] or ""] += 1
        if record["author"]:
            self.authors.add(record["author"])
        if record["url"]:
            self.urls.add(record["url"])

    def summary(self) -> dict[str, Any]:
        return {
            "records": self.licenses.total(),
            "licenses": dict(sorted(self.licenses.items())),
            "authors": len(self.authors),
            "urls": len(self.urls),
            # The smallest hashes: a sample spread over the source that never changes.
            "examples": heapq.nsmallest(NUM_EXAMPLES, self.urls, key=_sha256),
        }


def _sources_used(run: Run, store: Store) -> dict[str, _Used]:
    used: dict[str, _Used] = {}
    for record in records_of_run(run, store):
        used.setdefault(record["source"], _Used()).add(record)
    return used


def _packed_ids(store: Store, pack: StageRef) -> pa.Array:
    """Return the distinct record ids of the packed training shards."""
    chunks = [pa.array([], pa.string())]
    for _, path in store.shards(pack, "train"):
        with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as stream:
            for batch in stream:
                chunks.append(pc.unique(batch.column("record_ids").flatten()))
                if "joined_ids" in batch.schema.names:  # files of one repository
                    chunks.append(pc.unique(batch.column("joined_ids").flatten().flatten()))
    return pc.unique(pa.chunked_array(chunks))


def _manifest(run: Run, store: Store, ref: StageRef) -> Manifest:
    try:
        manifest = store.manifest(ref)
    except StoreError as error:
        raise StoreError(
            f"run {run.name}: stage {ref.stage!r} ({store.path(ref)}) is no longer in the store; "
            f"`starloom run {run.info()['recipe']}` builds it again"
        ) from error
    if manifest.digest != ref.digest:
        raise StoreError(
            f"run {run.name}: stage {ref.stage!r} ({store.path(ref)}) was rebuilt with another "
            f"result: digest {manifest.digest[:12]}, the run was trained from {ref.digest[:12]}"
        )
    return manifest


def _stage(manifest: Manifest, ref: StageRef) -> dict[str, Any]:
    counts = manifest.counts
    return {
        "stage": manifest.stage,
        "key": manifest.key,
        "digest": manifest.digest,
        "folder": ref.folder,
        "upstream": manifest.upstream,
        "rows_in": counts.rows_in,
        "rows_out": counts.rows_out,
        "used": counts.used,
        "dropped": counts.dropped,
        "quarantined": counts.quarantined,
        "tokens": manifest.tokens,
        "cost": asdict(manifest.cost),
        "versions": manifest.versions,
        "git_sha": manifest.git_sha,
        "created": manifest.created,
        "shards": [asdict(shard) for shard in manifest.shards],
    }


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()

"""Joins the groups that clusters connect: what must lie in the same split, across sources, too.

Two groups with records of one cluster hold (nearly) the same text; were one trained on and the
other held out, the held-out loss would measure memory. A joined group is named by the smallest
name of its groups, so it does not depend on the order of records or shards.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.curate.clusters import read_members
from pipelines.curate.partitions import unite

GROUPS = "groups.parquet"
GROUP_SCHEMA = pa.schema([pa.field("group", pa.string()), pa.field("joined", pa.string())])


def join_groups(members: pa.Table) -> pa.Table:
    """Return (group, joined) of every group that shares a cluster with another one, sorted.

    `members` has the columns `group` and `cluster`.
    """
    pairs = members.group_by(["cluster", "group"]).aggregate([])
    encoded = pc.dictionary_encode(pairs["group"].combine_chunks())
    names = encoded.dictionary.take(pc.sort_indices(encoded.dictionary))
    # Numbers in the order of the names, so that the smallest number is the smallest name.
    groups = pc.index_in(pairs["group"], names).to_numpy().astype(np.int64)
    clusters = pairs["cluster"].to_numpy()
    order = np.lexsort((groups, clusters))
    groups, clusters = groups[order], clusters[order]
    first = np.searchsorted(clusters, clusters, "left")
    labels = np.arange(len(names), dtype=np.int64)
    unite(labels, np.stack([groups[first], groups], axis=1))
    while (labels != labels[labels]).any():
        labels = labels[labels]
    joined = np.flatnonzero(np.bincount(labels, minlength=len(labels))[labels] > 1)
    return pa.table(
        [names.take(pa.array(joined)), names.take(pa.array(labels[joined]))], schema=GROUP_SCHEMA
    )


def write_groups(path: Path, files: Sequence[Path]) -> dict[str, int]:
    """Write the joined groups of all members in some Arrow files; return their numbers."""
    tables = [read_members(file).select(["group", "cluster"]) for file in files]
    table = join_groups(pa.concat_tables(tables))
    pq.write_table(table, path)
    sizes = pc.value_counts(table["joined"]).field("counts").to_numpy()
    return {
        "groups": table.num_rows,
        "joined": len(sizes),
        "largest": int(sizes.max(initial=0)),
    }

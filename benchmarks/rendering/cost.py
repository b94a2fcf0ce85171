"""What an arm of the rendering benchmark took, and what it wrote."""

import hashlib
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa


def cpu_seconds() -> float:
    own, children = (
        resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return sum(usage.ru_utime + usage.ru_stime for usage in (own, children))


def peak_megabytes() -> float:
    return (
        max(
            resource.getrusage(who).ru_maxrss
            for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        )
        / 1e3
    )


def summarize(output: Path) -> dict[str, Any]:
    """Return the rows, tokens and a digest of what an arm wrote."""
    digest, rows, tokens = hashlib.sha256(), 0, 0
    for path in sorted([*output.glob("train-*.arrow"), *output.glob("packed/*.arrow")]):
        with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as reader:
            for batch in reader:
                column = batch["input_ids"]
                rows += batch.num_rows
                tokens += len(column.flatten())
                digest.update(np.diff(column.offsets.to_numpy()).tobytes())
                digest.update(column.flatten().to_numpy().astype(np.int32).tobytes())
                if "labels" in batch.schema.names:
                    digest.update(batch["labels"].flatten().to_numpy().astype(np.int32).tobytes())
    return {"rows": rows, "tokens": tokens, "digest": digest.hexdigest()[:12]}

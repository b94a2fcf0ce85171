"""What a shard function leaves out: counted by reason, the first of each reason sampled."""

from collections import Counter

from pipelines.engine import SAMPLES_PER_REASON, Reject


class Drops:
    """Counts and samples of one shard's dropped rows."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.samples: list[Reject] = []

    def add(self, record_id: str, reason: str, detail: str) -> None:
        """Count one row under a reason, and keep it as a sample if few are there yet."""
        self.counts[reason] += 1
        if self.counts[reason] <= SAMPLES_PER_REASON:
            self.samples.append({"id": record_id, "reason": reason, "detail": detail})

"""Documents of random ids with the lengths of function/docstring pairs, packed or padded.

No tokenizer and no corpus are needed: speed depends on the lengths, not on what the ids mean. The
lengths are log-normal, fitted to 12,000 such pairs: 336 tokens on average, 38 % of the positions
real where batches of 8 are padded to the longest, 16 % where they are padded to 2,048.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipelines.training.collate import PackedRow

MEDIAN_LOG, SPREAD = 5.465, 0.85
SHORTEST = 16
PAD, FIRST_ID = 4, 19  # <fim_pad>; the ids below 19 are StarCoder's control tokens

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Documents:
    """Lengths of documents in random order; the ids are drawn when they are asked for."""

    lengths: Ids
    block: int
    vocabulary: int

    @classmethod
    def draw(cls, count: int, block: int, vocabulary: int) -> "Documents":
        """Draw documents of at most `block` tokens; a smaller block has shorter documents."""
        scale = np.log(block / 2048)
        lengths = np.random.default_rng(0).lognormal(MEDIAN_LOG + scale, SPREAD, count)
        return cls(lengths.round().astype(np.int64).clip(min(SHORTEST, block // 8), block), block,
                   vocabulary)  # fmt: skip

    def ids(self, document: int) -> Ids:
        """Return the ids of a document: always the same ones."""
        dice = np.random.default_rng(document)
        return dice.integers(FIRST_ID, self.vocabulary, int(self.lengths[document]))

    def rows(self) -> list[PackedRow]:
        """Pack all documents best-fit, each token trained; the rows are in random order."""
        rows = []
        for documents in self.plan():
            ids = np.concatenate([self.ids(number) for number in documents])
            rows.append(PackedRow(ids, ids, self.lengths[documents]))
        order = np.random.default_rng(1).permutation(len(rows))
        return [rows[number] for number in order]

    def plan(self) -> list[list[int]]:
        """Return the documents of each row: longest first, each into the fullest row it fits."""
        rows: list[list[int]] = []
        with_space: list[list[int]] = [[] for _ in range(self.block + 1)]
        for document in np.argsort(-self.lengths, kind="stable").tolist():
            length = int(self.lengths[document])
            space = next((s for s in range(length, self.block + 1) if with_space[s]), None)
            row = len(rows) if space is None else with_space[space].pop()
            if space is None:
                space = self.block
                rows.append([])
            rows[row].append(document)
            with_space[space - length].append(row)
        return rows

    @property
    def token_weighted(self) -> float:
        """Return the mean document length as a token sees it, which attention's cost follows."""
        return float((self.lengths**2).sum() / self.lengths.sum())


def pad_documents(samples: list[Ids]) -> dict[str, Ids]:
    """Return what the scripts of the seeds feed: padded to the longest, with an attention_mask."""
    shape = (len(samples), max(len(ids) for ids in samples))
    input_ids = np.full(shape, PAD, np.int64)
    for number, ids in enumerate(samples):
        input_ids[number, : len(ids)] = ids
    real = np.arange(shape[1]) < np.array([len(ids) for ids in samples])[:, None]
    labels = np.where(real, input_ids, -100)
    return {"input_ids": input_ids, "labels": labels, "attention_mask": real.astype(np.int64)}

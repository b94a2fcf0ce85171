"""Deduplicates a corpus with another library, as its documentation does, and lists what it removes.

    benchmarks/.venv/bin/python benchmarks/curation/dedup_peers.py ARM CORPUS OUTPUT

Runs without starloom, in the environment of `benchmarks/peers.txt`. Every arm compares sets of word
5-grams at a threshold of 0.7 with 256 hashes (datatrove: 14 buckets of 8, its default), reads the
corpus's shards and writes the removed ids as JSON. Candidates are not verified by any of them.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pyarrow.parquet as pq

WORD = re.compile(r"[0-9A-Za-z_\x80-\U0010ffff]+")
NGRAM, THRESHOLD, NUM_PERM = 5, 0.7, 256
BATCH = 1000


def read_texts(corpus: Path) -> Iterator[tuple[str, str]]:
    """Yield (id, text) of all records."""
    for path in sorted(corpus.glob("records-*.parquet")):
        for batch in pq.ParquetFile(path).iter_batches(256, columns=["id", "text"]):
            yield from zip(batch["id"].to_pylist(), batch["text"].to_pylist(), strict=True)


def token_set(text: str) -> set[str]:
    words = WORD.findall(text)
    return {" ".join(gram) for gram in zip(*(words[k:] for k in range(NGRAM)), strict=False)}


def removed_of(ids: list[str], neighbors: Iterator[tuple[int, list[int]]]) -> list[str]:
    """Return all but the first record of each connected set."""
    roots = list(range(len(ids)))

    def root(number: int) -> int:
        while roots[number] != number:
            roots[number] = number = roots[roots[number]]
        return number

    for number, others in neighbors:
        for other in others:
            a, b = sorted((root(number), root(other)))
            roots[b] = a
    return [ids[number] for number in range(len(ids)) if root(number) != number]


def rensa(corpus: Path) -> list[str]:
    from rensa import RMinHash, RMinHashLSH

    lsh = RMinHashLSH(THRESHOLD, NUM_PERM, 32)
    ids, hashes = [], []
    texts = read_texts(corpus)
    while batch := list(islice(texts, BATCH)):
        ids += [name for name, _ in batch]
        sets = [token_set(text) for _, text in batch]
        hashes += RMinHash.from_token_sets(sets, NUM_PERM, 42)
    lsh.insert_many(hashes)
    return removed_of(ids, enumerate(lsh.query_all(hashes)))


def datasketch(corpus: Path) -> list[str]:
    import xxhash
    from datasketch import MinHash, MinHashLSH

    lsh = MinHashLSH(THRESHOLD, NUM_PERM)
    ids, hashes = [], []
    for number, (name, text) in enumerate(read_texts(corpus)):
        minhash = MinHash(NUM_PERM, hashfunc=xxhash.xxh32_intdigest, scheme="affine32")
        minhash.update_batch([token.encode() for token in token_set(text)])
        lsh.insert(number, minhash)
        ids.append(name)
        hashes.append(minhash)
    return removed_of(ids, ((n, lsh.query(minhash)) for n, minhash in enumerate(hashes)))


def text_dedup(corpus: Path) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "out"
        command = [
            *(sys.executable, "-m", "text_dedup.minhash", "--path", "parquet"),
            *("--data_files", str(corpus / "records-*.parquet"), "--split", "train"),
            *("--column", "text", "--output", str(output), "--cache_dir", f"{folder}/cache"),
            *("--ngram", str(NGRAM), "--threshold", str(THRESHOLD), "--hash_func", "xxh3"),
            *("--num_perm", str(NUM_PERM), "--num_proc", "1", "--batch_size", "1000"),
        ]
        subprocess.run(command, check=True, stdout=sys.stderr)
        from datasets import load_from_disk

        kept = set(load_from_disk(str(output))["id"])
    return [name for name, _ in read_texts(corpus) if name not in kept]


def datatrove(corpus: Path) -> list[str]:
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.dedup import (
        MinhashConfig,
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
        MinhashDedupSignature,
    )
    from datatrove.pipeline.readers import ParquetReader
    from datatrove.pipeline.writers import JsonlWriter

    folder = tempfile.mkdtemp()
    config = MinhashConfig(n_grams=NGRAM)
    reader = ParquetReader(
        str(corpus), glob_pattern="records-*.parquet", text_key="text", id_key="id"
    )
    kept = JsonlWriter(f"{folder}/kept", compression=None)
    steps = (
        (1, [reader, MinhashDedupSignature(f"{folder}/signatures", config=config)]),
        (14, [MinhashDedupBuckets(f"{folder}/signatures", f"{folder}/buckets", config=config)]),
        (1, [MinhashDedupCluster(f"{folder}/buckets", f"{folder}/remove", config=config)]),
        (1, [reader, MinhashDedupFilter(f"{folder}/remove"), kept]),
    )
    for number, (tasks, pipeline) in enumerate(steps):
        LocalPipelineExecutor(
            pipeline, tasks=tasks, workers=1, logging_dir=f"{folder}/logs{number}"
        ).run()
    names = set()
    for path in Path(folder, "kept").glob("*.jsonl"):
        names |= {json.loads(line)["id"] for line in path.read_text().split("\n") if line}
    shutil.rmtree(folder)
    return [name for name, _ in read_texts(corpus) if name not in names]


ARMS = {
    "rensa": rensa,
    "datasketch": datasketch,
    "text-dedup": text_dedup,
    "datatrove": datatrove,
}


def main() -> None:
    arm, corpus, output = sys.argv[1:]
    Path(output).write_text(json.dumps(ARMS[arm](Path(corpus))))


if __name__ == "__main__":
    main()

"""Packs a million examples of realistic lengths, and reads packed rows as training does.

python -m benchmarks.rendering.packing [--examples 1000000]
"""

import argparse
import math
import random
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipelines.manifest import Cost, Counts, Manifest, Shard, content_digest, sha256_file
from pipelines.render.arrow_files import open_writer
from pipelines.render.encode import EXAMPLE_SCHEMA
from pipelines.render.pack import (
    gather_examples,
    order_rows,
    pack_shard,
    plan_rows,
    whole_examples,
    write_plans,
)

BLOCK, ROWS_PER_SHARD = 2048, 2048


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def write_examples(path: Path, lengths: list[int]) -> None:
    generator = np.random.default_rng(0)
    with open_writer(path, EXAMPLE_SCHEMA) as writer:
        for first in range(0, len(lengths), 10_000):
            part = lengths[first : first + 10_000]
            offsets = pa.array(np.concatenate([[0], np.cumsum(part)]), pa.int32())
            ids = generator.integers(0, 49_152, sum(part), dtype=np.uint16)
            names = pa.array([f"source:{first + i}" for i in range(len(part))])
            constants = [pa.array([value] * len(part)) for value in ("source", "none")]
            lists = [
                pa.ListArray.from_arrays(offsets, pa.array(values)) for values in (ids, ids % 3 > 0)
            ]
            joined = pa.nulls(len(part), EXAMPLE_SCHEMA.field("joined").type)
            columns = [names, *constants, joined, *lists]
            writer.write_table(pa.Table.from_arrays(columns, schema=EXAMPLE_SCHEMA))


def read_rows(folder: Path) -> tuple[int, float]:
    """Return the tokens read and the CPU seconds, with every value touched once."""
    from pipelines.training.collate import PackedDataset

    dataset = PackedDataset(folder, "train", rehash=False)
    before, tokens = cpu_seconds(), 0
    for number in np.random.default_rng(1).permutation(len(dataset)).tolist():
        row = dataset[number]
        tokens += len(row.input_ids) + 0 * int(row.input_ids.sum()) + 0 * int(row.labels.sum())
    return tokens, cpu_seconds() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=1_000_000)
    number = parser.parse_args().examples
    dice = random.Random(7)  # noqa: S311
    lengths = [
        min(BLOCK, max(8, int(dice.lognormvariate(math.log(120), 0.9)))) for _ in range(number)
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_examples(folder / "examples.arrow", lengths)
        floor = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        times = {"start": (cpu_seconds(), time.monotonic())}
        examples = gather_examples([folder / "examples.arrow"], folder, "train")
        times["gather tokens"] = (cpu_seconds(), time.monotonic())
        plan = plan_rows(examples.lengths, BLOCK)
        times["plan rows (best-fit decreasing)"] = (cpu_seconds(), time.monotonic())
        plan = order_rows(plan, "train", {"seed": 42})
        segments = whole_examples(plan, examples)
        jobs = list(write_plans(segments, examples, "train", ROWS_PER_SHARD, folder))
        times["order and write plans"] = (cpu_seconds(), time.monotonic())
        shards = []
        for job in jobs:
            path = folder / job.file
            made = pack_shard(job.inputs, path, {"wide_ids": False, "mixing": False})
            shards.append(
                Shard(job.file, made.counts.rows_out, path.stat().st_size, "", "train", made.tokens)
            )
        times["write shards"] = (cpu_seconds(), time.monotonic())
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        shards = [
            Shard(s.file, s.rows, s.bytes, sha256_file(folder / s.file), s.split, s.tokens)
            for s in shards
        ]
        write_manifest(folder, tuple(shards))
        tokens, seconds = read_rows(folder)
    print(f"{number:,} examples, {sum(lengths):,} tokens, {len(plan):,} rows of {BLOCK}")
    print(
        f"fill {sum(lengths) / len(plan) / BLOCK:.4%}\n\n| step | CPU s | wall s |\n|---|---|---|"
    )
    steps = list(times.items())
    for (_, before), (step, after) in zip(steps, steps[1:], strict=False):  # noqa: RUF007
        print(f"| {step} | {after[0] - before[0]:.2f} | {after[1] - before[1]:.2f} |")
    first, last = steps[0][1], steps[-1][1]
    print(f"| all | {last[0] - first[0]:.2f} | {last[1] - first[1]:.2f} |")
    print(f"\nPeak memory {peak / 1e3:.0f} MB, {floor / 1e3:.0f} MB of it before packing.")
    print(f"Reader: {tokens / seconds / 1e6:.0f} M tokens per CPU second.")


def write_manifest(folder: Path, shards: tuple[Shard, ...]) -> None:
    digest = content_digest(shards)
    Manifest(
        stage="pack",
        key="benchmark",
        key_parts={},
        digest=digest,
        shards=shards,
        counts=Counts(),
        cost=Cost(0.0, 0.0, 0),
        upstream={},
        upstream_keys={},
    ).write(folder)


if __name__ == "__main__":
    main()

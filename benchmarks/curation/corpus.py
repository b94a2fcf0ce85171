"""Builds a corpus of real code and text from installed packages, with planted near-duplicates.

    python -m benchmarks.curation.corpus --folder data/bench/corpus --megabytes 250

Writes record shards and `truth.parquet` (id, original, kind). Every fifth record is a
near-duplicate of a random file, changed in one of seven ways at a random strength. The same machine
and arguments give the same corpus.
"""

import argparse
import random
import re
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.records import new_record, write_rows

ENDINGS = (".py", ".pyi", ".rst", ".md", ".txt", ".h", ".hpp", ".c", ".js", ".html", ".css")
SMALLEST, LARGEST = 400, 100_000
PLANTED_SHARE = 0.2
SHARD_BYTES = 16_000_000
LICENSE_HEADER = "\n".join(
    [f"# Copyright (c) 20{year:02d} contributor {year} of this project." for year in range(4)]
    + ["# Permission is granted, free of charge, to deal in this file without restriction."]
)


def add_header(text: str, random: random.Random) -> str:
    return f"{LICENSE_HEADER}\n# Serial number {random.random()}\n\n{text}"


def change_spaces(text: str, random: random.Random) -> str:
    wide = text.replace("    ", random.choice(["\t", "  ", "        "]))
    return wide.replace("\n", random.choice(["\r\n", "\n\n", " \n"]))


def rename_words(text: str, random: random.Random) -> str:
    names = sorted(set(re.findall(r"[a-z_]{6,}", text)))
    chosen = random.sample(names, min(len(names), random.randint(1, 3)))
    for name in chosen:
        text = re.sub(rf"\b{name}\b", f"{name}_{random.randrange(100)}", text)
    return text


def delete_lines(text: str, random: random.Random) -> str:
    share = random.uniform(0.005, 0.06)
    return "\n".join(line for line in text.split("\n") if random.random() > share)


def insert_lines(text: str, random: random.Random) -> str:
    share = random.uniform(0.005, 0.06)
    lines = []
    for line in text.split("\n"):
        lines.append(line)
        if random.random() < share:
            lines.append(f"inserted line number {random.randrange(10**6)} of this file")
    return "\n".join(lines)


def truncate(text: str, random: random.Random) -> str:
    return text[: int(len(text) * random.uniform(0.75, 0.97))]


def substitute_words(text: str, random: random.Random) -> str:
    share = random.uniform(0.002, 0.03)

    def swap(match: re.Match[str]) -> str:
        return f"w{random.randrange(1000)}" if random.random() < share else match[0]

    return re.sub(r"\w+", swap, text)


CHANGES: dict[str, Callable[[str, random.Random], str]] = {
    "header": add_header,
    "white_space": change_spaces,
    "rename": rename_words,
    "deletion": delete_lines,
    "insertion": insert_lines,
    "truncation": truncate,
    "substitution": substitute_words,
}


def find_texts(roots: list[Path], seed: int) -> Iterator[tuple[str, str]]:
    """Yield (path, text) of the files below the roots that are UTF-8, in random order."""
    paths = sorted(
        path
        for root in roots
        for path in root.rglob("*")
        if path.suffix in ENDINGS and path.is_file() and not path.is_symlink()
    )
    random.Random(seed).shuffle(paths)  # noqa: S311 (a corpus, no secret)
    for path in paths:
        data = path.read_bytes()
        if SMALLEST <= len(data) <= LARGEST and b"\0" not in data:
            try:
                yield str(path), data.decode("utf-8")
            except UnicodeDecodeError:
                continue


def build_rows(megabytes: float, seed: int) -> Iterator[tuple[dict, str, str]]:
    """Yield (record, id of the original or "", kind of change or "") up to a size."""
    roots = [Path(sysconfig.get_paths()[name]) for name in ("purelib", "stdlib")]
    roots += [Path("/usr/share"), Path("/usr/include")]
    dice = random.Random(seed)  # noqa: S311 (a corpus, no secret)
    seen: list[tuple[str, str]] = []
    left = megabytes * 1e6
    for number, (_, text) in enumerate(find_texts(roots, seed)):
        if left <= 0:
            return
        name = f"f{number:06d}"
        seen.append((name, text))
        left -= len(text.encode())
        yield new_record(id=name, group=name, source="files", text=text), "", ""
        if dice.random() < PLANTED_SHARE / (1 - PLANTED_SHARE):
            original, before = dice.choice(seen)
            kind = dice.choice(list(CHANGES))
            planted = CHANGES[kind](before, dice)
            left -= len(planted.encode())
            name = f"p{number:06d}"
            yield new_record(id=name, group=name, source="planted", text=planted), original, kind
    sys.exit(f"only {megabytes - left / 1e6:.0f} MB of text are installed here")


def write_corpus(folder: Path, megabytes: float, seed: int) -> None:
    """Write shards of about SHARD_BYTES and the table of what was planted."""
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict] = []
    truth: list[dict] = []
    size = shards = 0
    for row, original, kind in build_rows(megabytes, seed):
        rows.append(row)
        size += len(row["text"])
        if original:
            truth.append({"id": row["id"], "original": original, "kind": kind})
        if size >= SHARD_BYTES:
            write_rows(folder / f"records-{shards:05d}.parquet", rows)
            rows, size, shards = [], 0, shards + 1
    if rows:
        write_rows(folder / f"records-{shards:05d}.parquet", rows)
    pq.write_table(pa.Table.from_pylist(truth), folder / "truth.parquet")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--megabytes", type=float, default=250)
    parser.add_argument("--seed", type=int, default=42)
    arguments = parser.parse_args()
    write_corpus(arguments.folder, arguments.megabytes, arguments.seed)


if __name__ == "__main__":
    main()

"""Builds rows of English and code from installed packages and their documentation.

    python -m benchmarks.rendering.corpus --folder data/bench/rendering --megabytes 110

Each row is a prompt (the beginning of a stretch of a file) with its completion (the rest), of the
lengths that instruction data has. The same machine and arguments give the same rows.
"""

import argparse
import math
import random
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from pipelines.records import new_record, write_rows

ENDINGS = (".py", ".pyi", ".rst", ".md", ".txt", ".h", ".hpp", ".c", ".js", ".html")
SMALLEST, LARGEST = 400, 400_000
ROWS_PER_SHARD = 16_384
# Characters of a row: log-normal, as instruction data is, and within a block of 2,048 tokens.
MEDIAN, SPREAD, LONGEST = 900, 0.8, 4_000


def find_texts(seed: int) -> Iterator[str]:
    """Yield the UTF-8 files of the installed packages and the system, in random order."""
    roots = [Path(sysconfig.get_paths()[name]) for name in ("purelib", "stdlib")]
    roots += [Path("/usr/share"), Path("/usr/include")]
    paths = sorted(
        path
        for root in roots
        for path in root.rglob("*")
        if path.suffix in ENDINGS and path.is_file() and not path.is_symlink()
    )
    random.Random(seed).shuffle(paths)  # noqa: S311
    for path in paths:
        data = path.read_bytes()
        if SMALLEST <= len(data) <= LARGEST and b"\0" not in data:
            try:
                yield data.decode("utf-8")
            except UnicodeDecodeError:
                continue


def cut_rows(text: str, dice: random.Random) -> Iterator[tuple[str, str]]:
    """Yield (prompt, completion) over the whole text, cut at line ends where there are some."""
    start = 0
    while start < len(text):
        size = min(LONGEST, max(40, int(dice.lognormvariate(math.log(MEDIAN), SPREAD))))
        stop = text.find("\n", start + size) + 1
        stop = stop if 0 < stop <= start + LONGEST else start + size
        part = text[start:stop]
        middle = part.find("\n", len(part) // 4) + 1 or len(part) // 4
        if part[:middle].strip() and part[middle:].strip():
            yield part[:middle], part[middle:]
        start = stop


def write_corpus(folder: Path, megabytes: float, seed: int) -> None:
    """Write shards of records until they hold so many bytes of text."""
    folder.mkdir(parents=True, exist_ok=True)
    dice = random.Random(seed)  # noqa: S311
    rows: list[dict] = []
    left, shards, number = megabytes * 1e6, 0, 0
    for text in find_texts(seed):
        for prompt, completion in cut_rows(text, dice):
            name = f"row:{number:07d}"
            number += 1
            left -= len(prompt.encode()) + len(completion.encode())
            body = {"prompt": prompt, "completion": completion}
            rows.append(new_record(id=name, group=name, source="files", **body))
            if len(rows) == ROWS_PER_SHARD or left <= 0:
                write_rows(folder / f"train-{shards:05d}.parquet", rows)
                rows, shards = [], shards + 1
            if left <= 0:
                return
    sys.exit(f"only {megabytes - left / 1e6:.0f} MB of text are installed here")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--megabytes", type=float, default=110)
    parser.add_argument("--seed", type=int, default=42)
    arguments = parser.parse_args()
    write_corpus(arguments.folder, arguments.megabytes, arguments.seed)


if __name__ == "__main__":
    main()

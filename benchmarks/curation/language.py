"""The language filter against a plain predict loop over the same texts with the same model.

    python -m benchmarks.curation.language [--records 6000] [--rounds 7]

The corpus is prose of installed packages: docstrings as prompts, and pages of documentation cut at
blank lines into messages of about 1,500 characters. The loop predicts each whole text and does
nothing else; the filter strips, judges, decides and notes the scores. CPU seconds, rounds of all
arms alternating in one process, medians.
"""

import argparse
import ast
import statistics
import sysconfig
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.curation.corpus import find_texts
from pipelines.curate import language
from pipelines.curate.language_model import find_model, load_model
from pipelines.markdown import table
from pipelines.recipe import Curation
from pipelines.records import Row, new_record, write_rows

MESSAGE_CHARS = 1500


def find_docstrings(text: str) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and (docstring := ast.get_docstring(node)):
            yield docstring


def cut_page(text: str) -> Iterator[str]:
    part = ""
    for paragraph in text.split("\n\n"):
        part = f"{part}\n\n{paragraph}" if part else paragraph
        if len(part) >= MESSAGE_CHARS:
            yield part
            part = ""
    if part.strip():
        yield part


def build_rows(count: int) -> dict[str, list[Row]]:
    """Return up to `count` records of docstrings and as many of documentation."""
    docstrings: list[Row] = []
    pages: list[Row] = []
    roots = [Path(sysconfig.get_paths()[name]) for name in ("purelib", "stdlib")]
    roots.append(Path("/usr/share"))
    for path, text in find_texts(roots, 1):
        name = f"{len(docstrings)}-{len(pages)}"
        common = {"id": name, "group": name, "source": "installed"}
        if path.endswith(".py") and len(docstrings) < count:
            docstrings += [
                new_record(**common, prompt=prompt, completion="x = 1")
                for prompt in find_docstrings(text)
            ]
        elif path.endswith((".md", ".rst", ".txt", ".html")) and len(pages) < count:
            messages = [
                {"role": ("user", "assistant")[i % 2], "content": part, "train": i % 2 == 1}
                for i, part in enumerate(cut_page(text))
            ]
            pages.append(new_record(**common, messages=messages))
    return {"docstrings": docstrings[:count], "documentation": pages[:count]}


def texts_of(rows: list[Row]) -> list[str]:
    return [
        text
        for row in rows
        for text in ([row["prompt"]] if row["prompt"] else [m["content"] for m in row["messages"]])
    ]


def cpu_seconds(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def measure(rows: list[Row], folder: Path, rounds: int) -> list[tuple[str, float]]:
    """Return the median CPU seconds of each arm."""
    texts, path, model = texts_of(rows), folder / "in.parquet", load_model(find_model())
    write_rows(path, rows)
    curation = Curation()
    params = {
        "languages": list(curation.languages),
        "threshold": curation.language_threshold,
        "margin": curation.language_margin,
        "min_letters": curation.language_min_letters,
        "path": str(find_model()),
    }

    def loop() -> None:
        for text in texts:
            model.predict(text.replace("\n", " ") + "\n", 1, 0.0, "strict")

    arms: dict[str, Callable[[], object]] = {
        "plain predict loop": loop,
        "starloom: the whole stage, Parquet to Parquet": lambda: language.filter_shard(
            [path], folder / "out.parquet", params
        ),
    }
    taken: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name, arm in arms.items():
            taken[name].append(cpu_seconds(arm))
    return [(name, statistics.median(times)) for name, times in taken.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=6000)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    lines = []
    total: dict[str, float] = {}
    kinds = build_rows(arguments.records)
    with tempfile.TemporaryDirectory() as folder:
        for kind, rows in kinds.items():
            texts = texts_of(rows)
            size = sum(len(text.encode()) for text in texts) / 1e6
            measured = measure(rows, Path(folder), arguments.rounds)
            for name, seconds in measured:
                total[name] = total.get(name, 0.0) + seconds
                share = f"{measured[0][1] / seconds:.0%}"
                speed = f"{len(texts) / seconds:,.0f}", f"{size / seconds:.1f}"
                lines.append([kind, name, len(texts), f"{size:.1f}", *speed, share])
    first = next(iter(total.values()))
    lines += [["both", name, "", "", "", "", f"{first / s:.0%}"] for name, s in total.items()]
    header = ["texts", "arm", "number", "MB", "texts per CPU s", "MB per CPU s", "of the loop"]
    print(table(header, lines))


if __name__ == "__main__":
    main()

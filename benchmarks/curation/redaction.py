"""Redaction with all rules against detect-secrets with all of its plugins, on the same files.

    python -m venv benchmarks/.venv && benchmarks/.venv/bin/pip install -r benchmarks/peers.txt
    python -m benchmarks.curation.redaction [--megabytes 40] [--sample 5]

The corpus is code and text of installed packages. detect-secrets is slower than 1 MB per CPU second
and runs on a sample of the corpus (marked *), in a process and environment of its own; its imports
are not counted. Both also search the labelled secrets and decoys of the tests.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from benchmarks.curation.corpus import build_rows
from pipelines.curate.redact import redact_shard
from pipelines.curate.redact_text import ALL_KINDS, find_edits
from pipelines.markdown import table
from pipelines.records import write_rows
from tests.assets.labelled_secrets import Sample, decoys, positives

PEER = Path(__file__).parents[1] / ".venv" / "bin" / "python"
PEER_PROGRAM = """
import json, sys, time
from pathlib import Path
from detect_secrets import SecretsCollection
from detect_secrets.settings import default_settings
found = {}
with default_settings():
    SecretsCollection().scan_file(sys.argv[2])  # loads the plugins
    started = time.process_time()
    for path in sorted(Path(sys.argv[1]).iterdir()):
        secrets = SecretsCollection()
        secrets.scan_file(str(path))
        found[path.name] = sum(map(len, secrets.data.values()))
    seconds = time.process_time() - started
print(json.dumps({"seconds": seconds, "found": found}))
"""


def run_peer(texts: list[str]) -> tuple[float, list[int]]:
    """Return the CPU seconds of detect-secrets and how many secrets it finds in each text."""
    with tempfile.TemporaryDirectory() as folder, tempfile.NamedTemporaryFile("w") as first:
        for number, text in enumerate(texts):
            Path(folder, f"{number:06d}.txt").write_text(text, encoding="utf-8")
        first.write("x = 1\n")
        first.flush()
        command = [str(PEER), "-c", PEER_PROGRAM, folder, first.name]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    answer = json.loads(done.stdout)
    return answer["seconds"], [answer["found"][name] for name in sorted(answer["found"])]


def run_ours(texts: list[str]) -> tuple[float, list[int]]:
    """Return the CPU seconds of all rules and how many secrets they find in each text."""
    started = time.process_time()
    found = [len(find_edits(text, ALL_KINDS)) for text in texts]
    return time.process_time() - started, found


def run_stage(rows: list[dict]) -> float:
    """Return the CPU seconds of the stage, from Parquet to Parquet."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "in.parquet")
        write_rows(source, rows)
        started = time.process_time()
        redact_shard([source], Path(folder, "out.parquet"), {"kinds": sorted(ALL_KINDS)})
        return time.process_time() - started


def compare_labelled() -> str:
    """Return the share of labelled secrets and decoys that each flags, by kind."""
    samples: list[Sample] = [*positives(), *decoys()]
    texts = [sample.text for sample in samples]
    _, ours = run_ours(texts)
    _, peer = run_peer(texts)
    counts: Counter[tuple[str, str, bool]] = Counter()
    for sample, mine, theirs in zip(samples, ours, peer, strict=True):
        for name, found in (("all", 1), ("ours", mine), ("peer", theirs)):
            counts[name, sample.kind, bool(sample.secret)] += bool(found)
    lines = [
        [kind]
        + [
            f"{counts[name, kind, real] / counts['all', kind, real]:.0%}"
            for real in (True, False)
            for name in ("ours", "peer")
        ]
        for kind in sorted(ALL_KINDS)
    ]
    header = ["kind", "secrets: starloom", "detect-secrets", "decoys: starloom", "detect-secrets"]
    return table(header, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=float, default=40)
    parser.add_argument("--sample", type=float, default=5)
    arguments = parser.parse_args()
    if not PEER.exists():
        sys.exit(f"{PEER} is missing: see the module's docstring")
    rows = [row for row, _, _ in build_rows(arguments.megabytes, 1)]
    texts = [row["text"] for row in rows]
    sample, size = [], 0.0
    for text in texts:
        if size < arguments.sample:
            sample.append(text)
            size += len(text.encode()) / 1e6
    total = sum(len(text.encode()) for text in texts) / 1e6
    measured = [
        ("starloom: all rules", total, *run_ours(texts)),
        ("starloom: all rules, same sample *", size, *run_ours(sample)),
        ("starloom: the stage, Parquet to Parquet", total, run_stage(rows), []),
        ("detect-secrets 1.5.0, all plugins *", size, *run_peer(sample)),
    ]
    slowest = size / measured[-1][2]
    lines = [
        [
            name,
            f"{mb:.1f}",
            f"{s:.2f}",
            f"{mb / s:.2f}",
            f"{mb / s / slowest:.0f}x",
            sum(found) or "",
        ]
        for name, mb, s, found in measured
    ]
    print(table(["arm", "MB", "CPU s", "MB per CPU s", "of the peer", "found"], lines))
    print()
    print(compare_labelled())


if __name__ == "__main__":
    main()

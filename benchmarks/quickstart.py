"""Runs finetune/quickstart on a running server, as `make demo` does, and samples every process.

    starloom up && python -m benchmarks.quickstart [--force]

Prints a Markdown table of wall seconds and peak resident memory: server, workers, flow processes,
shard workers, training ranks and evaluation. RSS counts shared pages in each process.
"""

import argparse
import platform
import subprocess
import sys
import threading
import time
from collections import defaultdict
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import psutil

KINDS = (
    # (kind, limit in MB or None, words that must all be in the command line); first match wins
    ("training rank", None, ("pipelines.training.trainer",)),
    ("evaluation", None, ("pipelines.evals.evaluate",)),
    ("supervisor", None, ("pipelines.training.supervise",)),
    ("worker", 600, ("worker", "start")),
    ("server", None, ("server", "start")),
    ("server", None, ("prefect.server",)),
    ("shard worker", None, ("multiprocessing",)),
    ("flow process", 1000, ("prefect", "flow-run", "execute")),
    ("flow process", 1000, ("prefect.flow_engine",)),
    ("flow process", 1000, ("prefect.engine",)),
)


def classify(command: list[str]) -> str | None:
    """Return the kind of a process by its command line."""
    line = " ".join(command)
    if "torch.distributed.run" in line and "supervise" not in line:
        return "torchrun"
    for kind, _, words in KINDS:
        if all(word in line for word in words):
            return kind
    return None


def sample(peaks: dict[str, float], stop: threading.Event) -> None:
    """Note the peak resident MB of each kind of process until told to stop."""
    while not stop.wait(0.25):
        for process in psutil.process_iter(["cmdline", "memory_info"]):
            command, memory = process.info["cmdline"], process.info["memory_info"]
            kind = classify(command or [])
            if kind and memory:
                peaks[kind] = max(peaks[kind], memory.rss / 1e6)


def run(force: bool) -> tuple[float, dict[str, float]]:
    """Run the deployment once; return wall seconds and peak MB by kind of process."""
    peaks: dict[str, float] = defaultdict(float)
    stop = threading.Event()
    sampler = threading.Thread(target=sample, args=(peaks, stop))
    sampler.start()
    started = time.monotonic()
    prefect = Path(sys.executable).with_name("prefect")
    command = [str(prefect), "deployment", "run", "finetune/quickstart", "--watch"]
    if force:
        command += ["-p", "force=true"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    seconds = time.monotonic() - started
    stop.set()
    sampler.join()
    if done.returncode:
        sys.exit(f"the flow run failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return seconds, peaks


def report(runs: list[tuple[str, float, dict[str, float]]]) -> str:
    """Return the table as Markdown."""
    limits = {kind: limit for kind, limit, _ in KINDS}
    kinds = sorted({kind for _, _, peaks in runs for kind in peaks})
    head = "| | " + " | ".join(name for name, _, _ in runs) + " | bar |"
    lines = [head, "|---" * (len(runs) + 2) + "|"]
    lines.append("| wall s | " + " | ".join(f"{s:.0f}" for _, s, _ in runs) + " | |")
    for kind in kinds:
        cells = " | ".join(f"{peaks.get(kind, 0):.0f}" for _, _, peaks in runs)
        limit = f"< {limits[kind]}" if limits.get(kind) else ""
        lines.append(f"| peak MB, largest {kind} | {cells} | {limit} |")
    versions = ", ".join(f"{n} {metadata.version(n)}" for n in ("prefect", "torch", "deepspeed"))
    stamp = datetime.now(UTC).strftime("%Y-%m-%d")
    machine = f"{psutil.cpu_count()} CPUs, {psutil.virtual_memory().total / 2**30:.0f} GiB"
    return "\n".join(
        [
            f"{stamp}, {platform.machine()}, {machine}, {platform.python_version()}, {versions}",
            "",
            *lines,
        ]
    )


def main() -> None:
    """Run twice (or once with --force) and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--force", action="store_true", help="train again in the first run")
    force = parser.parse_args().force
    runs = [("first run", *run(force)), ("second run", *run(False))]
    print(report(runs))


if __name__ == "__main__":
    main()

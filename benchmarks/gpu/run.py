"""Speed of training on one GPU: the rate of its matrix products, then each optimization by itself.

    python -m benchmarks.gpu.run --output FOLDER [--arms NAME ...] [--minutes M] [--again]

Run it from the checkout, on a machine with one NVIDIA GPU of 141 GB (an H200). It needs torch (2.11
or newer), transformers (5.17), peft, pyarrow, pydantic and pyyaml, and neither an installation nor
a network: weights and documents are random. 20 to 30 minutes in all. FOLDER keeps a line of
results.jsonl for each arm and table.md, rewritten after each; an arm that is there is passed over,
so that the same command goes on after an interruption. An arm that fails is a line with its reason.

    --minutes M   begin no arm that would not be done M minutes after the start, and end by then
    --again       measure arms anew that failed
    --dry-run     tiny shapes on the CPU, to see that every arm runs
    --list        the arms
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.gpu.arms import ARMS, Arm
from benchmarks.gpu.table import render

MARK = "@result "  # as in measure, which loads torch
LIMIT = 480.0  # seconds of an arm, all its attempts together
ROOT = Path(__file__).parents[2]

Result = dict[str, Any]
Measure = Callable[[Arm, int, float], Result]


def measure_all(
    folder: Path, names: list[str], measure: Measure, *, deadline: float, again: bool
) -> list[str]:
    """Measure the arms that are not there yet; return those that the time did not suffice for."""
    folder.mkdir(parents=True, exist_ok=True)
    left = []
    for name in names:
        known = read_results(folder).get(name)
        if known and (known["status"] == "ok" or not again):
            print(f"{name}: is there", flush=True)
            continue
        arm = ARMS[name]
        if left or time.monotonic() + arm.seconds > deadline:
            left.append(name)  # in order: later arms are worth less without the earlier ones
            continue
        result = measure_arm(arm, measure, deadline)
        if result["status"] != "ok" and time.monotonic() >= deadline:
            left.append(name)  # cut off: that says nothing about the arm
            continue
        result["finished"] = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
        append(folder / "results.jsonl", result)
        write_table(folder)
        print(f"{name}: {outcome(result)}", flush=True)
    write_table(folder)
    return left


def measure_arm(arm: Arm, measure: Measure, deadline: float) -> Result:
    """Measure an arm; where memory does not suffice, with half the rows, and again."""
    rows, deadline = arm.rows, min(deadline, time.monotonic() + LIMIT)
    while True:
        result = measure(arm, rows, deadline - time.monotonic())
        if result["status"] == "memory" and rows > 1 and time.monotonic() < deadline:
            print(f"{arm.name}: out of memory with {rows} rows", flush=True)
            rows //= 2
            continue
        if rows < arm.rows:
            result["note"] = f"{arm.rows} do not fit"
        return result


def in_process(folder: Path, *, dry_run: bool) -> Measure:
    """Return a function that measures an arm in a process of its own."""
    environment = {
        **os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PYTHONUNBUFFERED": "1",
    }  # fmt: skip

    def measure(arm: Arm, rows: int, seconds: float) -> Result:
        command = [sys.executable, "-m", "benchmarks.gpu.measure", arm.name, "--rows", str(rows)]
        command += ["--parent", str(os.getpid()), *["--dry-run"] * dry_run]
        failed: Result = {"arm": arm.name, "rows": rows, "status": "failed", "seconds": 0.0}
        began = time.monotonic()
        with (folder / "log.txt").open("a") as log:
            log.write(f"\n=== {arm.name}, {rows} rows\n")
            log.flush()
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment, cwd=ROOT,
                start_new_session=True,
            )  # fmt: skip
            try:
                output, _ = process.communicate(timeout=seconds)
            except subprocess.TimeoutExpired:
                return failed | {"reason": f"not done after {LIMIT:.0f} s", "seconds": seconds}
            finally:
                stop(process)
            log.write(output)
        lines = [line for line in output.splitlines() if line.startswith(MARK)]
        if lines:
            found: Result = json.loads(lines[-1].removeprefix(MARK))
            return found
        took = round(time.monotonic() - began, 1)
        reason = f"ended with {process.returncode}; see log.txt"
        return failed | {"reason": reason, "seconds": took}

    return measure


def stop(process: subprocess.Popen) -> None:
    """Leave nothing of an arm on the GPU."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def read_results(folder: Path) -> dict[str, Result]:
    """Return the newest result of each arm; a line that was cut by a kill counts as none."""
    path = folder / "results.jsonl"
    found = {}
    for line in path.read_text().split("\n") if path.exists() else ():
        try:
            result = json.loads(line)
        except ValueError:
            continue
        found[result["arm"]] = result
    return found


def append(path: Path, result: Result) -> None:
    cut = path.exists() and not path.read_bytes().endswith(b"\n")
    with path.open("a") as file:
        file.write("\n" * cut + json.dumps(result) + "\n")
        file.flush()
        os.fsync(file.fileno())


def write_table(folder: Path) -> None:
    temporary = folder / "table.md.tmp"
    temporary.write_text(render(read_results(folder)))
    temporary.replace(folder / "table.md")


def outcome(result: Result) -> str:
    if result["status"] != "ok":
        return f"{result['status']}: {result.get('reason', '')}"
    if "flops" in result:
        return f"{result['flops'] / 1e12:.0f} TFLOP/s"
    return (
        f"{result['tokens_per_second']:,.0f} real tok/s, {result['peak']} GiB, "
        f"{result['seconds']:.0f} s"
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("data/bench/gpu"))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="NAME")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args()
    if options.list:
        print("\n".join(f"{a.name:18}{a.shape:6}{a.seconds:4} s  {a.title}" for a in ARMS.values()))
        return 0
    folder = options.output.absolute()
    deadline = time.monotonic() + 60 * options.minutes
    names = [name for name in ARMS if name in options.arms]
    folder.mkdir(parents=True, exist_ok=True)
    left = measure_all(
        folder, names, in_process(folder, dry_run=options.dry_run), deadline=deadline,
        again=options.again,
    )  # fmt: skip
    print(f"\n{(folder / 'table.md').read_text()}")
    if left:
        print(f"No time left for {', '.join(left)}: run the same command again.")
    return 0


if __name__ == "__main__":
    sys.exit(main())

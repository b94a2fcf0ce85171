"""Real tokens per CPU second of six ways to train the same small model on the same documents.

    python -m venv benchmarks/.venv
    benchmarks/.venv/bin/pip install -r benchmarks/peers.txt torch==... transformers==...
    python -m benchmarks.training.train [--folder FOLDER] [--rounds 3] [--vocabularies 4096 49152]

Every arm is a process of one thread; their rounds alternate, and the median counts. Start-up
(imports, data, the first step) is reported apart. TRL needs benchmarks/.venv, with the project's
versions of torch and transformers, or it would be measured on others.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.training.corpus import collect_pairs, prepare
from benchmarks.training.gate import MARK
from pipelines.training.environment import KEEP_MEMORY

PEER_PYTHON = Path(__file__).parents[1] / ".venv" / "bin" / "python"
PAIRS = 9_000
ARMS = {
    "padded": "(A) seed's script: tokenized one by one, padded to the longest, 8 documents",
    "padded-still": "(A0) the same without the dropout of 0.1 that StarCoder's configs carry",
    "padded-max": "(A') as (A), padded to 1,024",
    "constant": "(B) ConstantLengthDataset: documents are cut and see each other",
    "trl": "(C) TRL SFTTrainer, packing bfd, no dropout",
    "bare": "(D) bare loop over starloom's rows, model and settings",
    "starloom": "(E) starloom: what `starloom run` trains with",
}
# Steps of a round by size of the vocabulary: about as many CPU seconds for each arm.
STEPS = {
    "padded": (5, 1), "padded-still": (5, 1), "padded-max": (3, 1),
    "constant": (8, 2), "trl": (5, 1), "bare": (8, 2), "starloom": (8, 2),
}  # fmt: skip
BARS = (("padded", "at least", 2.4), ("bare", "at least", 0.95))


@dataclass
class Arm:
    """A running arm and what it reported."""

    name: str
    process: subprocess.Popen
    log: Path
    startup: list[dict[str, Any]] = field(default_factory=list)
    rounds: list[dict[str, Any]] = field(default_factory=list)

    def turn(self, *, first: bool = False) -> None:
        """Let it do its next part, and wait until it is done; exits where it failed."""
        if not first:
            assert self.process.stdin is not None
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        for line in self.process.stdout or ():
            if line.startswith(MARK):
                found = json.loads(line.removeprefix(MARK))
                (self.rounds if found["kind"] == "round" else self.startup).append(found)
                return
        sys.exit(f"{self.name} failed; the end of {self.log}:\n{self.log.read_text()[-3000:]}")

    @property
    def speeds(self) -> list[float]:
        """Return the real tokens per CPU second of each round."""
        return [found["tokens"] / found["cpu"] for found in self.rounds]

    @property
    def speed(self) -> float:
        """Return the median of the rounds."""
        return median(self.speeds)


def start_arm(name: str, prepared: Path, steps: int, rounds: int) -> Arm:
    python = PEER_PYTHON if name == "trl" else Path(sys.executable)
    command = [str(python), "-m", "benchmarks.training.arms", name, "--prepared", str(prepared)]
    command += ["--steps", str(steps), "--rounds", str(rounds)]
    environment = {
        **os.environ, **KEEP_MEMORY, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    log = prepared.parent / f"{name}.log"
    with log.open("w") as stderr:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True,
            env=environment,
        )  # fmt: skip
    return Arm(name, process, log)


def measure(folder: Path, names: list[str], small: int, rounds: int) -> list[Arm]:
    """Start the arms one after the other, then let each do its rounds in turn."""
    arms = []
    try:
        for name in names:
            arms.append(start_arm(name, folder / "prepared.json", STEPS[name][small], rounds))
            arms[-1].turn(first=True)  # imports
            arms[-1].turn()  # data, model, first step
        for number in range(rounds):
            for arm in arms:
                arm.turn()
                print(f"round {number} {arm.name}: {arm.speeds[-1]:.0f} tok/CPU s", file=sys.stderr)
    finally:
        for arm in arms:
            arm.process.kill()
            arm.process.wait()
    return arms


def table(arms: list[Arm]) -> list[str]:
    baseline = {arm.name: arm.speed for arm in arms}
    lines = [
        "| arm | real tok / CPU s | rounds | to (A) | real | data | peak MB | start-up CPU s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for arm in arms:
        tokens, positions, data, cpu = (
            sum(found[key] for found in arm.rounds)
            for key in ("tokens", "positions", "data", "cpu")
        )
        ratio = f"{arm.speed / baseline['padded']:.2f}x" if "padded" in baseline else ""
        imports, building = arm.startup[0]["imports"], arm.startup[1]["cpu"]
        lines.append(
            f"| {ARMS[arm.name]} | {arm.speed:,.0f} | {min(arm.speeds):,.0f} to "
            f"{max(arm.speeds):,.0f} | {ratio} | {tokens / positions:.1%} | {data / cpu:.2%} "
            f"| {arm.rounds[-1]['peak']:,.0f} | {imports:.1f} + {building:.1f} |"
        )
    return lines


def verdicts(arms: list[Arm]) -> list[str]:
    """Say whether the bars are met: starloom over the seed's padded script and the bare loop."""
    speeds = {arm.name: arm.speed for arm in arms}
    lines = []
    for name, wording, bar in BARS:
        if name in speeds and "starloom" in speeds:
            ratio = speeds["starloom"] / speeds[name]
            met = "met" if ratio >= bar else "missed"
            lines.append(f"- starloom / {name}: {ratio:.3f} ({wording} {bar} wanted): {met}")
    return lines


def headline() -> str:
    names = ("torch", "transformers", "trl", "accelerate")
    found = [f"{name} {version}" for name in names if (version := _version(name))]
    return (
        f"{datetime.now(UTC):%Y-%m-%d}, {platform.machine()}, {os.cpu_count()} CPUs, load "
        f"{os.getloadavg()[0]:.1f} at the start; Python {platform.python_version()}, "
        f"{', '.join(found)}"
    )


def _version(name: str) -> str:
    if name == "trl":
        code = "from importlib.metadata import version; print(version('trl'))"
        done = subprocess.run(
            [PEER_PYTHON, "-c", code], check=False, capture_output=True, text=True
        )
        return done.stdout.strip()
    return metadata.version(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="keep the prepared data there")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[4096, 49152])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    options = parser.parse_args()
    if "trl" in options.arms and not PEER_PYTHON.exists():
        sys.exit(f"{PEER_PYTHON} is missing: see benchmarks/README.md, or leave --arms trl out")
    folder = options.folder or Path(tempfile.mkdtemp(prefix="starloom-benchmark-"))
    print(headline(), flush=True)
    pairs = collect_pairs(PAIRS)
    for vocabulary in options.vocabularies:
        work = (folder / str(vocabulary)).absolute()
        prepared = prepare(work, vocabulary, pairs)
        (work / "prepared.json").write_text(json.dumps(prepared))
        arms = measure(work, options.arms, int(vocabulary > 10_000), options.rounds)
        mean = prepared["tokens"] / prepared["number"]
        print(
            f"\n## Vocabulary of {prepared['rows']:,}\n\n{prepared['number']:,} documents of "
            f"{mean:.0f} tokens on average (at most 1,024)\n"
        )
        print("\n".join([*table(arms), "", *verdicts(arms)]), flush=True)
    print(f"\nload {os.getloadavg()[0]:.1f} at the end")


if __name__ == "__main__":
    main()

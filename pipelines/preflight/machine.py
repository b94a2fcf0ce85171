"""What this machine has: GPUs, their memory, its own. Asked of the system, without torch."""

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

MIB = 2**20
CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@dataclass(frozen=True, slots=True)
class Machine:
    """GPUs by number, name and bytes of the smallest, and the bytes of main memory."""

    gpus: int = 0
    gpu_name: str | None = None
    gpu_memory: float | None = None
    memory: float = 0.0


def count_gpus() -> int:
    """Return the number of NVIDIA GPUs the driver lists, without importing torch."""
    return sum(line.startswith("GPU ") for line in _ask_driver("-L"))


def look_around() -> Machine:
    """Return what this machine has."""
    gpus = count_gpus()
    name, smallest = None, None
    if gpus:
        rows = [
            line.rsplit(",", 1)
            for line in _ask_driver(
                "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"
            )
        ]
        known = [(float(row[1]) * MIB, row[0].strip()) for row in rows if _is_number(row)]
        smallest, name = min(known) if known else (None, None)
    return Machine(gpus, name, smallest, main_memory())


def main_memory() -> float:
    """Return the bytes of memory that processes here may use: the machine's, or the container's."""
    import psutil

    total = float(psutil.virtual_memory().total)
    for path in CGROUP_LIMITS:
        try:
            total = min(total, float(Path(path).read_text(encoding="ascii")))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return total


def _is_number(row: list[str]) -> bool:
    return len(row) == 2 and row[1].strip().isdigit()


def _ask_driver(*options: str) -> list[str]:
    if shutil.which("nvidia-smi") is None:
        return []
    try:
        answer = subprocess.run(
            ["nvidia-smi", *options], capture_output=True, text=True, check=False, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return answer.stdout.splitlines() if answer.returncode == 0 else []

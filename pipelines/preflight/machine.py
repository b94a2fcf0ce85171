"""What this machine has: GPUs, their memory, its own. Asked of the system, without torch."""

import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

MIB = 2**20
CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
QUESTION = ("--query-gpu=uuid,name,memory.total,memory.used", "--format=csv,noheader,nounits")


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU that the driver lists; bytes are None where it does not say."""

    uuid: str
    name: str
    memory: float | None = None
    used: float | None = None


@dataclass(frozen=True, slots=True)
class Machine:
    """GPUs that processes here may use, and the bytes of main memory.

    `gpu_memory` are the bytes of the smallest GPU, `gpu_free` those that other processes leave of
    the fullest.
    """

    gpus: int = 0
    gpu_name: str | None = None
    gpu_memory: float | None = None
    memory: float = 0.0
    gpu_free: float | None = None


def list_gpus() -> list[Gpu]:
    """Return the NVIDIA GPUs that processes here may use, without importing torch.

    CUDA_VISIBLE_DEVICES hides the others, which the driver lists all the same.
    """
    rows = [[word.strip() for word in line.split(",")] for line in _ask_driver(*QUESTION)]
    found = [
        Gpu(uuid, ",".join(name), _bytes(total), _bytes(used))
        for uuid, *name, total, used in (row for row in rows if len(row) >= 4)
    ]
    return _visible(found, os.environ.get("CUDA_VISIBLE_DEVICES"))


def count_gpus() -> int:
    """Return the number of NVIDIA GPUs that processes here may use."""
    return len(list_gpus())


def look_around() -> Machine:
    """Return what this machine has."""
    found = list_gpus()
    known = [(gpu.memory, gpu.name) for gpu in found if gpu.memory is not None]
    smallest, name = min(known) if known else (None, found[0].name if found else None)
    free = [
        gpu.memory - gpu.used for gpu in found if gpu.memory is not None and gpu.used is not None
    ]
    return Machine(len(found), name, smallest, main_memory(), min(free) if free else None)


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


def _visible(gpus: Sequence[Gpu], wanted: str | None) -> list[Gpu]:
    """Return the GPUs that a value of CUDA_VISIBLE_DEVICES names, up to its first that is none.

    Numbers are the driver's: CUDA counts otherwise on machines of different GPUs, unless
    CUDA_DEVICE_ORDER is PCI_BUS_ID. A part of a GPU (MIG) is one of unknown size.
    """
    if wanted is None:
        return list(gpus)
    found = []
    for name in (part.strip() for part in wanted.split(",")):
        if name.startswith("MIG-"):
            found.append(Gpu(name, "MIG"))
            continue
        if name.isdecimal():
            chosen = list(gpus[int(name) :][:1])
        else:
            chosen = [gpu for gpu in gpus if name and gpu.uuid.startswith(name)]
        if len(chosen) != 1 or chosen[0] in found:
            break
        found += chosen
    return found


def _bytes(mebibytes: str) -> float | None:
    return float(mebibytes) * MIB if mebibytes.isdecimal() else None


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

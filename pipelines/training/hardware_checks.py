"""What keeps a recipe from being launched on its hardware, said before anything runs."""

import shutil
from collections.abc import Callable

from pipelines.errors import TrainingError
from pipelines.recipe import Recipe
from pipelines.settings.hardware import Hardware
from pipelines.training.deepspeed_config import deepspeed_problems, offload_devices
from pipelines.training.launchers import (
    EndpointError,
    find_node,
    hostfile_problems,
    in_slurm_job,
)

COMPILERS = ("c++", "g++", "clang++")


def launch_problems(
    recipe: Recipe, hardware: Hardware, *, here: bool, dry: bool = False
) -> list[str]:
    """Return what contradicts the recipe, and `here` what this machine lacks to start its ranks.

    A `dry` run may be printed on a machine that does not know node 0.
    """
    problems = deepspeed_problems(recipe, hardware)
    if not here:
        return problems
    problems += [*offload_problems(hardware), *hostfile_problems(hardware)]
    if hardware.launcher != "slurm" or in_slurm_job():
        try:
            find_node(hardware)
        except EndpointError as error:
            problems += [] if dry else [f"hardware {recipe.hardware}: {error}"]
        except TrainingError as error:
            problems.append(f"hardware {recipe.hardware}: {error}")
    return problems


def offload_problems(
    hardware: Hardware, which: Callable[[str], str | None] = shutil.which
) -> list[str]:
    """Say where offloading needs a compiler that is not here.

    Only DeepSpeed's NVMe offload compiles (async_io, at its first use). What is offloaded to the
    memory of the CPU is updated by torch's own fused AdamW.
    """
    if "nvme" not in offload_devices(hardware):
        return []
    missing = [] if any(which(name) for name in COMPILERS) else ["a C++ compiler"]
    missing += [] if which("ninja") else ["ninja"]
    if not missing:
        return []
    problem = (
        f"offload to nvme: DeepSpeed compiles its file access (async_io) at first use, and "
        f"{' and '.join(missing)} cannot be found on PATH; install g++, ninja and libaio, or "
        "offload to the CPU (offload: all)"
    )
    return [problem]

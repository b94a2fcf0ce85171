"""What the training runs on: the keys of a file of `recipes/hardware`, or of one's own."""

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from pipelines.settings.section import Count, Section

# What starts the ranks and what they cost: a run's result depends on none of it.
LAUNCH_KEYS = frozenset(
    {
        "launcher", "rdzv_endpoint", "hostfile", "slurm", "environment_script",
        "price_per_hour", "peak_tflops",
    }
)  # fmt: skip

SLURM_OWN = ("nodes", "ntasks-per-node", "cpus-per-task", "gpus-per-node")


class Hardware(Section):
    """What the training runs on.

    `offload` keeps the optimizer state (`optimizer`), or the weights too (`all`), in the memory of
    the CPU. `deepspeed` is a DeepSpeed JSON, as a path beside the hardware file or as keys, merged
    into the generated one. With more than one node, `rdzv_endpoint` is HOST:PORT of node 0 (or
    STARLOOM_RDZV_ENDPOINT). `hostfile` is for the launcher deepspeed. `slurm` holds long options
    of sbatch (partition, account, time, ...), `environment_script` a file that a job sources first.
    """

    device: Literal["cpu", "cuda"]
    num_nodes: Count = 1
    processes_per_node: Count = 1
    threads_per_process: Count = 1
    strategy: Literal["ddp", "zero2", "zero3", "fsdp2"] = "zero2"
    offload: Literal["none", "optimizer", "all"] = "none"
    deepspeed: dict[str, Any] | None = None
    launcher: Literal["torchrun", "deepspeed", "slurm"] = "torchrun"
    rdzv_endpoint: str | None = None
    hostfile: str | None = None
    slurm: dict[str, str | int | bool] = Field(default_factory=dict)
    environment_script: str | None = None
    price_per_hour: Annotated[float, Field(gt=0)] | None = None
    peak_tflops: Annotated[float, Field(gt=0)] | None = None

    @property
    def world_size(self) -> int:
        """Return the number of ranks."""
        return self.num_nodes * self.processes_per_node

    @property
    def is_alone(self) -> bool:
        """Return whether one rank trains the whole model: then it needs no process group."""
        return self.strategy == "ddp" and self.world_size == 1

    @field_validator("rdzv_endpoint")
    @classmethod
    def _host_and_port(cls, value: str | None) -> str | None:
        return value if value is None else check_endpoint(value)

    @model_validator(mode="after")
    def _fits_together(self) -> "Hardware":
        problems = [*_strategy_problems(self), *_launcher_problems(self)]
        if problems:
            raise ValueError("; ".join(problems))
        return self


def check_endpoint(value: str) -> str:
    """Return an endpoint HOST:PORT as it is; ValueError where it is none."""
    host, _, port = value.rpartition(":")
    if not host or "/" in host or not (port.isdecimal() and 0 < int(port) < 65_536):
        raise ValueError(f"{value!r} is no HOST:PORT, e.g. node0.example.org:29500")
    return value


def _strategy_problems(hardware: Hardware) -> list[str]:
    strategy, offload = hardware.strategy, hardware.offload
    zero = strategy in ("zero2", "zero3")
    problems = []
    possible = {
        "ddp": ("none",),
        "zero2": ("none", "optimizer"),
        "zero3": ("none", "optimizer", "all"),
        "fsdp2": ("none", "all"),
    }[strategy]
    if offload not in possible:
        problems.append(
            f"offload: {strategy} can do {' or '.join(possible)}, got {offload!r} "
            "(strategy: zero3 can do all of them)"
        )
    if strategy == "fsdp2" and offload == "all" and hardware.device == "cpu":
        problems.append("offload: fsdp2 on device cpu has nothing to offload; use none")
    if hardware.deepspeed is not None and not zero:
        problems.append(f"deepspeed: only for strategy zero2 and zero3, got strategy {strategy!r}")
    if strategy == "fsdp2" and hardware.world_size == 1:
        problems.append("strategy: fsdp2 shards over 2 processes at least; use ddp for one")
    return problems


def _launcher_problems(hardware: Hardware) -> list[str]:
    launcher = hardware.launcher
    problems = []
    for key, value in hardware.slurm.items():
        if not re.fullmatch(r"[a-z][a-z-]*[a-z]", key) or key in SLURM_OWN:
            problems.append(
                f"slurm.{key}: a long option of sbatch is expected, without its dashes, and none "
                f"of {', '.join(SLURM_OWN)}, which follow from this file"
            )
        if not str(value).isprintable():
            problems.append(f"slurm.{key}: one line is expected, got {value!r}")
    for key, only in (
        ("hostfile", "deepspeed"),
        ("slurm", "slurm"),
        ("environment_script", "slurm"),
    ):
        if getattr(hardware, key) and launcher != only:
            problems.append(f"{key}: only for launcher {only}, got launcher {launcher!r}")
    if launcher == "deepspeed" and hardware.hostfile is None:
        problems.append(
            "hostfile: required for launcher deepspeed (one line per node: `HOST slots=N`)"
        )
    return problems

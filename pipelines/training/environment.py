"""The environment of training processes: an allow-list, plus threads, allocator and devices.

Invariant: no secret of the parent reaches a training process or its log; the Hub's token passes
only where the base model has to come from the Hub, a reporter's variables where it is asked for.
"""

import os
from collections.abc import Mapping
from pathlib import Path

from pipelines.recipe import Recipe
from pipelines.runs import Run
from pipelines.settings.hardware import Hardware
from pipelines.training.reporters import passes

ALLOWED = {
    "PATH", "HOME", "USER", "LOGNAME", "SHELL", "TERM", "LANG", "TZ", "TMPDIR", "VIRTUAL_ENV",
    "PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX",
    "LD_LIBRARY_PATH", "LD_PRELOAD", "CUDA_HOME",
    "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "CUDA_LAUNCH_BLOCKING",
    "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF",
    "TORCH_EXTENSIONS_DIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR",
    "XDG_CACHE_HOME", "MPLCONFIGDIR",
    "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_ENDPOINT",
    "STARLOOM_DATA", "STARLOOM_PEAK_TFLOPS", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE",
}  # fmt: skip
# glibc gives every large tensor back to the kernel at once: 40,000 page faults and 8 % of the CPU
# time of a quickstart step. Keeping them took 1.16 instead of 0.88 GiB (26 M parameters, full).
KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**30),
    "MALLOC_TOP_PAD_": str(2**26),
}
# Where small tensors outlive the large ones around them, glibc (2.36 here; sourceware bug 30723)
# often fits no aligned tensor into the gap that one of the same size left, and twice the memory is
# taken. There each large tensor is a mapping of its own; huge pages, where the kernel has them,
# halve the cost of its page faults.
RETURN_MEMORY = {
    **KEEP_MEMORY, "MALLOC_MMAP_THRESHOLD_": str(2**20),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}  # fmt: skip
GROUP = {
    "RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE",
    "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
}  # fmt: skip
ALLOWED_PREFIXES = ("LC_", "NCCL_", "GLOO_")
DEEPSPEED_ENVIRONMENT = "deepspeed.env"
# deepspeed's launcher reaches the other nodes by ssh.
SSH = ("SSH_AUTH_SOCK", "PDSH_")
# A proxy's address may carry a password, so it goes where the Hub is needed only.
HUB_ONLY = {"HF_TOKEN", "HF_TOKEN_PATH", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"}


def hardware_of(run: Run) -> Hardware:
    """Return the hardware that is part of a run's key, whatever the file says by now.

    How its ranks are started is no part of the key: that is as it was when the run was opened last.
    """
    info = run.info()
    return Hardware.model_validate({**info.get("launch", {}), **info["key_parts"]["hardware"]})


def needs_hub(recipe: Recipe) -> bool:
    """Return whether the base model is a hub id rather than a folder or random weights."""
    name = recipe.model.model_name_or_path
    return name is not None and not Path(name).exists()


def keeps_memory(recipe: Recipe, hardware: Hardware) -> bool:
    """Return whether training on CPU keeps freed tensors: whole models on ranks without ZeRO.

    The quickstart, ZeRO-2 on two ranks, took 69 CPU s for 30 steps where they were kept and 71
    where they went back, and a larger model 2.59 GiB where 1.72 were needed.
    """
    plain = recipe.adapter is None and not recipe.training.gradient_checkpointing
    return plain and not hardware.strategy.startswith("zero")


def leave_group(hardware: Hardware) -> None:
    """Make a rank that is alone forget what torchrun told it, before torch looks.

    In a group of one, DDP would hold and copy every gradient a second time.
    """
    if hardware.is_alone:
        for name in GROUP:
            os.environ.pop(name, None)


def child_environment(
    recipe: Recipe, hardware: Hardware, parent: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """Return the environment of the launcher and the ranks of one training run."""
    allowed = ALLOWED | HUB_ONLY if needs_hub(recipe) else ALLOWED
    environment = {
        name: value
        for name, value in parent.items()
        if name.upper() in allowed
        or name.startswith(ALLOWED_PREFIXES)
        or passes(name, recipe.training.report_to)
    }
    environment |= {
        "OMP_NUM_THREADS": str(hardware.threads_per_process),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DO_NOT_TRACK": "1",
        "PYTHONUNBUFFERED": "1",
    }
    if not needs_hub(recipe) and "trackio" not in recipe.training.report_to:
        environment["HF_HUB_OFFLINE"] = "1"
    if hardware.device == "cpu":
        environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        environment |= KEEP_MEMORY if keeps_memory(recipe, hardware) else RETURN_MEMORY
        if hardware.num_nodes == 1:
            # Otherwise gloo asks the resolver for this host's name, which may not exist.
            environment["GLOO_SOCKET_IFNAME"] = "lo"
    if hardware.launcher == "deepspeed":
        # Its ranks on other nodes get what this file lists: our settings, no secret.
        environment["DS_ENV_FILE"] = DEEPSPEED_ENVIRONMENT
        environment |= {k: v for k, v in parent.items() if k.startswith(SSH)}
    return environment


def environment_lines(recipe: Recipe, hardware: Hardware) -> str:
    """Return what we add to the environment, nothing of the parent's, as NAME=VALUE lines."""
    added = child_environment(recipe, hardware, {})
    return "".join(f"{name}={value}\n" for name, value in sorted(added.items()))

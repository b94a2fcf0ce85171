"""The commands that start a run's ranks: torchrun, deepspeed's hostfile launcher, a Slurm script.

The dry run prints what these functions return and `launch` executes the same. Several nodes meet
at an endpoint of node 0 (torchrun's c10d rendezvous); `nodes` has what they agree on.
"""

import ipaddress
import os
import re
import shlex
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from pipelines.errors import TrainingError
from pipelines.runs import TRAINER, Run
from pipelines.settings.hardware import Hardware, check_endpoint
from pipelines.store import Store

ENDPOINT, RANK = "STARLOOM_RDZV_ENDPOINT", "STARLOOM_NODE_RANK"
NODE = "STARLOOM_NODE"  # tells apart the ranks of two nodes that share a machine
ALLOW_LOOPBACK = "STARLOOM_ALLOW_LOOPBACK"
PORT = 29500
JOIN_SECONDS = 600  # torchrun's own limit for nodes that have said they are ready


class EndpointError(TrainingError):
    """Node 0 has an endpoint, but it cannot be found or reached from this machine."""


@dataclass(frozen=True, slots=True)
class Target:
    """What ranks train, and on what: paths, or shell variables where they are not known yet."""

    run: str
    dataset: str
    tokenizer: str

    def arguments(self) -> list[str]:
        """Return the trainer's arguments."""
        return [f"--run={self.run}", f"--dataset={self.dataset}", f"--tokenizer={self.tokenizer}"]


@dataclass(frozen=True, slots=True)
class Node:
    """A machine among the nodes of a run; `address` is its own on the way to node 0."""

    name: str
    leader: bool
    address: str
    endpoint: str


def target_of(run: Run, store: Store) -> Target:
    """Return the paths of a run and its data."""
    refs = run.refs()
    return Target(str(run.path), *(str(store.path(refs[name])) for name in ("pack", "tokenizer")))


def spans_nodes(hardware: Hardware) -> bool:
    """Return whether every node has to start its own agent (deepspeed starts them itself)."""
    return hardware.num_nodes > 1 and hardware.launcher != "deepspeed"


def launch_command(
    hardware: Hardware, target: Target, node: Node | None, rdzv_id: str
) -> list[str]:
    """Return the command that starts this node's ranks; `rdzv_id` is new at every attempt."""
    if hardware.launcher == "deepspeed":
        return _deepspeed_command(hardware, target)
    if node is None:
        meeting = ["--standalone", "--local-addr=127.0.0.1"]
    else:
        meeting = [
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={node.endpoint}",
            f"--rdzv-id={rdzv_id}",
            f"--rdzv-conf=is_host={int(node.leader)},join_timeout={JOIN_SECONDS}",
            f"--local-addr={node.address}",
        ]
    return [
        sys.executable, "-m", "torch.distributed.run", *meeting,
        f"--nnodes={hardware.num_nodes}", f"--nproc-per-node={hardware.processes_per_node}",
        "-m", "--", TRAINER, *target.arguments(),
    ]  # fmt: skip


def _deepspeed_command(hardware: Hardware, target: Target) -> list[str]:
    """Return the command of deepspeed's launcher, which reaches the nodes by ssh (pdsh)."""
    endpoint = endpoint_of(hardware)
    host, _, port = (endpoint or "").rpartition(":")
    if hardware.num_nodes == 1:
        host = host or "127.0.0.1"  # it would ask for the address by ssh
    return [
        sys.executable, "-m", "deepspeed.launcher.runner",
        f"--hostfile={hardware.hostfile}",
        f"--num_nodes={hardware.num_nodes}", f"--num_gpus={hardware.processes_per_node}",
        *([f"--master_addr={host}"] if host else []),
        *([f"--master_port={port}"] if port else []),
        *(["--no_ssh_check"] if hardware.num_nodes == 1 else []),
        "--no_local_rank", "--module", TRAINER, *target.arguments(),
    ]  # fmt: skip


def endpoint_of(hardware: Hardware, environment: Mapping[str, str] = os.environ) -> str | None:
    """Return HOST:PORT of node 0, the environment's before the hardware file's; None: not set.

    Raises TrainingError where the environment's is none.
    """
    try:
        value = environment.get(ENDPOINT)
        return check_endpoint(value) if value else hardware.rdzv_endpoint
    except ValueError as error:
        raise TrainingError(f"{ENDPOINT}: {error}") from None


def find_node(hardware: Hardware, environment: Mapping[str, str] = os.environ) -> Node | None:
    """Return which node this machine is, or None where a run has one node.

    Node 0 is the machine that has the endpoint's address; STARLOOM_NODE_RANK, or in a Slurm job
    SLURM_NODEID, says it where addresses do not. Raises TrainingError where the endpoint is
    missing or a loopback address, which other machines cannot reach, and EndpointError where it is
    unknown to the resolver.
    """
    if not spans_nodes(hardware):
        return None
    endpoint = endpoint_of(hardware, environment)
    if endpoint is None:
        raise TrainingError(
            f"num_nodes is {hardware.num_nodes}: set rdzv_endpoint: HOST:{PORT} in the hardware "
            f"file (or {ENDPOINT}) to an address of node 0 that every node can reach"
        )
    host, _, port = endpoint.rpartition(":")
    addresses = _resolve(host, endpoint)
    if any(ipaddress.ip_address(a).is_loopback for a in addresses) and (
        environment.get(ALLOW_LOOPBACK) != "1"
    ):
        raise TrainingError(
            f"endpoint {endpoint} is a loopback address, which other nodes cannot reach; give "
            f"node 0's address in their network ({ALLOW_LOOPBACK}=1 allows it on one machine)"
        )
    rank = _rank(hardware, environment)
    leader = bool(addresses & own_addresses()) if rank is None else rank == 0
    address = _address_towards(next(iter(sorted(addresses))), int(port))
    return Node(address if rank is None else str(rank), leader, address, endpoint)


def _resolve(host: str, endpoint: str) -> set[str]:
    try:
        found = socket.getaddrinfo(host.strip("[]"), None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise EndpointError(
            f"endpoint {endpoint}: {host!r} cannot be resolved here ({error.strerror or error}); "
            f"give an address of node 0 that every node knows (rdzv_endpoint, or {ENDPOINT})"
        ) from None
    return {str(entry[4][0]).partition("%")[0] for entry in found}


def _rank(hardware: Hardware, environment: Mapping[str, str]) -> int | None:
    names = [RANK, "SLURM_NODEID"] if hardware.launcher == "slurm" else [RANK]
    for name in names:
        value = environment.get(name)
        if value:
            if not value.isdecimal():
                raise TrainingError(f"{name}={value!r}: expected 0 for node 0, 1, 2, ...")
            return int(value)
    return None


def own_addresses() -> set[str]:
    """Return the IP addresses of this machine."""
    families = (socket.AF_INET, socket.AF_INET6)
    return {
        entry.address.partition("%")[0]
        for entries in psutil.net_if_addrs().values()
        for entry in entries
        if entry.family in families
    }


def interface_of(address: str) -> str | None:
    """Return the name of the network interface that has an address of this machine."""
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address for entry in entries):
            return name
    return None


def node_environment(node: Node | None, parent: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return what the ranks of one node of several get: its name, and the interface for gloo."""
    if node is None:
        return {}
    interface = interface_of(node.address)
    given = "GLOO_SOCKET_IFNAME" in parent or interface is None
    return {NODE: node.name} | ({} if given else {"GLOO_SOCKET_IFNAME": str(interface)})


def _address_towards(host: str, port: int) -> str:
    """Return this machine's address on the way to another (connecting UDP sends nothing)."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, port))
        except OSError as error:
            raise EndpointError(f"node 0 ({host}) cannot be reached: {error}") from None
        return str(probe.getsockname()[0])


def slurm_script(hardware: Hardware, name: str, arguments: list[str], data: Path) -> str:
    """Return the sbatch script that runs `starloom ARGUMENTS` on every node of a job."""
    options: dict[str, str | int | bool] = {
        "job-name": f"starloom-{name}",
        "nodes": hardware.num_nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": hardware.processes_per_node * hardware.threads_per_process,
    }
    if hardware.device == "cuda":
        options["gpus-per-node"] = hardware.processes_per_node
    lines = [
        f"#SBATCH --{key}" if value is True else f"#SBATCH --{key}={value}"
        for key, value in (options | hardware.slurm).items()
        if value is not False
    ]
    script = hardware.environment_script
    source = [f"source {shlex.quote(script)}"] if script else []
    first = '$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'
    meeting = [f'export {ENDPOINT}="{first}:{PORT}"'] if hardware.num_nodes > 1 else []
    command = [sys.executable, "-m", "pipelines.cli", *arguments]
    return "\n".join(
        [
            "#!/bin/bash",
            *lines,
            "set -euo pipefail",
            *source,
            f"export STARLOOM_DATA={shlex.quote(str(data))}",
            *meeting,
            f"srun --kill-on-bad-exit=1 {shlex.join(command)}",
            "",
        ]
    )


def in_slurm_job(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether this process belongs to a Slurm job."""
    return bool(environment.get("SLURM_JOB_ID"))


def hostfile_problems(hardware: Hardware) -> list[str]:
    """Say what is wrong with a hostfile: `HOST slots=N` a line, enough of both."""
    if hardware.launcher != "deepspeed" or hardware.hostfile is None:
        return []
    try:
        text = Path(hardware.hostfile).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        return [f"hostfile {hardware.hostfile}: cannot be read ({error})"]
    problems, hosts = [], {}
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = re.fullmatch(r"\s*(\S+)\s+slots=(\d+)\s*(#.*)?", line)
        if match is None:
            problems.append(f"line {number}: {line.strip()!r} is not `HOST slots=N`")
        elif match[1] in hosts:
            problems.append(f"line {number}: {match[1]} is named twice")
        else:
            hosts[match[1]] = int(match[2])
    few = [host for host, slots in hosts.items() if slots < hardware.processes_per_node]
    if few:
        problems.append(
            f"processes_per_node is {hardware.processes_per_node}, but {', '.join(few)} has fewer "
            "slots"
        )
    if len(hosts) < hardware.num_nodes:
        problems.append(f"num_nodes is {hardware.num_nodes}, but it names {len(hosts)} host(s)")
    return [f"hostfile {hardware.hostfile}: " + "; ".join(problems)] if problems else []

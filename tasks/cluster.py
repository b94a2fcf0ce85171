"""What a Ray cluster needs around it: an address, a token, and the environment of its workers.

Invariant: nothing here reaches out before STARLOOM_RAY_ADDRESS names a cluster, and telemetry is
off wherever we start something.
"""

import importlib.util
import ipaddress
import os
import re
import socket
from collections.abc import Iterable, Mapping, MutableMapping
from pathlib import Path
from urllib.parse import urlsplit

import psutil
from prefect.settings import get_current_settings

from pipelines.errors import PreflightError
from pipelines.plan import data_root
from pipelines.training.environment import KEEP_MEMORY

ADDRESS = "STARLOOM_RAY_ADDRESS"
CONNECT_SECONDS = 5.0
# A worker makes one shard at a time on the one CPU it claimed.
ONE_THREAD = dict.fromkeys(
    ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"), "1"
)
PASSED_ON = ("STARLOOM_LID_MODEL", "HF_HUB_OFFLINE", "NO_PROXY", "no_proxy")


def ray_address(environment: Mapping[str, str] = os.environ) -> str | None:
    """Return STARLOOM_RAY_ADDRESS, None where it is not set; PreflightError where it is no address.

    auto: the cluster this machine is part of. HOST:PORT: the head of that cluster. Ray's client
    (ray://) is not taken: a worker belongs on a machine of the cluster, which has the files.
    """
    address = environment.get(ADDRESS, "").strip()
    if not address:
        return None
    if address != "auto" and not re.fullmatch(r"([\w.-]+|\[[0-9a-fA-F:]+\]):\d+", address):
        raise PreflightError(
            f"{ADDRESS}={address!r}: expected auto or HOST:PORT, the head of the cluster that this "
            "machine is part of"
        )
    return address


def check_cluster(environment: MutableMapping[str, str] = os.environ) -> str | None:
    """Return the address of a cluster that can be used, None where none is asked for.

    Sets what Ray reads in this process when it is imported. Raises PreflightError saying what is
    missing: the extra, the head, a token, an API that the other machines can reach.
    """
    address = ray_address(environment)
    if address is None:
        return None
    if importlib.util.find_spec("prefect_ray") is None:
        raise PreflightError(
            f"{ADDRESS} is set, but Ray is not installed: run .venv/bin/python -m pip install "
            "-c constraints.txt -e '.[ray]' here and on every machine of the cluster"
        )
    host = _host(address)
    if host is not None:
        _check_head(address, host)
        check_api([host])
    _set_up_driver(environment, is_remote=host is not None and not is_here(host))
    return address


def _host(address: str) -> str | None:
    """Return the host of an address, None for auto."""
    return None if address == "auto" else urlsplit(f"//{address}").hostname


def _check_head(address: str, host: str) -> None:
    """Raise PreflightError where nobody listens: Ray itself would try for minutes."""
    port = int(address.rpartition(":")[2])
    try:
        socket.create_connection((host, port), CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise PreflightError(
            f"{ADDRESS}={address}: no Ray head answers there ({error}); start one with "
            f"`ray start --head --port={port}` on {host}, or unset {ADDRESS} to use this machine"
        ) from error


def check_api(nodes: Iterable[str]) -> None:
    """Raise PreflightError where a node is another machine and cannot reach the Prefect API."""
    others = sorted({node for node in nodes if not is_here(node)})
    url = get_current_settings().api.url
    host = urlsplit(url).hostname if url else None
    if others and (host is None or is_loopback(host)):
        raise PreflightError(
            f"the cluster has other machines ({', '.join(others[:3])}), but PREFECT_API_URL is "
            f"{url or 'not set'}, which only this one can reach: start the server with --host and "
            "set PREFECT_API_URL to an address that all of them can reach (docs/scaling.md)"
        )


def is_loopback(host: str) -> bool:
    """Return whether a host name or address never leaves the machine (0.0.0.0 does not either)."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
    return address.is_loopback or address.is_unspecified


def is_here(host: str) -> bool:
    """Return whether a host name or address is this machine."""
    if is_loopback(host) or host == socket.gethostname():
        return True
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    own = {each.address for name in psutil.net_if_addrs().values() for each in name}
    return all(is_loopback(address) for address in found) or bool(found & own)


def _set_up_driver(environment: MutableMapping[str, str], *, is_remote: bool) -> None:
    """Set Ray's variables. A token that is there is used; without one, another host is refused."""
    environment["RAY_USAGE_STATS_ENABLED"] = "0"
    # Ray would repeat a task for ever that needs more memory than a machine has.
    environment.setdefault("RAY_task_oom_retries", "2")
    if "RAY_AUTH_MODE" in environment:
        return
    if has_token(environment):
        environment["RAY_AUTH_MODE"] = "token"
    elif is_remote:
        raise PreflightError(
            f"no Ray token is here: copy ~/.ray/auth_token of {environment[ADDRESS]} to this "
            "machine (`ray get-auth-token --generate` makes one before the cluster is started); "
            "RAY_AUTH_MODE=disabled does without, and lets whoever reaches the cluster run code"
        )


def has_token(environment: Mapping[str, str]) -> bool:
    """Return whether Ray's token is in one of the three places where Ray looks for it."""
    if environment.get("RAY_AUTH_TOKEN"):
        return True
    path = environment.get("RAY_AUTH_TOKEN_PATH")
    return (Path(path) if path else Path.home() / ".ray" / "auth_token").is_file()


def worker_environment(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the variables of the processes that make shards; no secret is among them.

    Ray stores and shows them: keys of sources belong into the environment of `ray start`.
    """
    return {
        **{name: environment[name] for name in PASSED_ON if environment.get(name)},
        **ONE_THREAD,
        **KEEP_MEMORY,
        "DO_NOT_TRACK": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "RAY_USAGE_STATS_ENABLED": "0",
        "STARLOOM_DATA": str(data_root()),
        "TOKENIZERS_PARALLELISM": "false",
    }

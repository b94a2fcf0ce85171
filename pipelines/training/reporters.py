"""Where metrics go besides metrics.jsonl: what `report_to` needs, and what it may see.

transformers has the callbacks; the packages themselves are the user's choice. A reporter's
variables (and with them its secret) reach the ranks only where it is asked for.
"""

import importlib.util
import netrc
import os
from collections.abc import Iterable, Mapping

from pipelines.errors import PreflightError
from pipelines.recipe import Recipe
from pipelines.runs import Run

PACKAGES = {
    "wandb": ("wandb",),
    "tensorboard": ("tensorboard", "tensorboardX"),
    "mlflow": ("mlflow",),
    "trackio": ("trackio",),
}
VARIABLES = {
    "wandb": ("WANDB_",),
    "tensorboard": ("TENSORBOARD_",),
    "mlflow": ("MLFLOW_", "DATABRICKS_"),
    "trackio": ("TRACKIO_",),
}
# A proxy's address may carry a password, so it goes where something is sent.
PROXIES = {"HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"}
WANDB_WITHOUT_KEY = ("offline", "disabled", "dryrun")
WANDB_HOST = "api.wandb.ai"


def reporter_problems(recipe: Recipe) -> list[str]:
    """Say which reporters of a recipe are not installed, or lack their login."""
    problems = []
    for name in recipe.training.report_to:
        if not any(_installed(package) for package in PACKAGES[name]):
            problems.append(
                f"training.report_to: {name} is not installed: `pip install {name}`, "
                "or take it out (metrics.jsonl is always written)"
            )
        elif name == "wandb" and not _wandb_login(os.environ):
            problems.append(
                "training.report_to: wandb needs the environment variable WANDB_API_KEY, "
                "`wandb login`, or WANDB_MODE=offline"
            )
    return problems


def check_reporters(run: Run) -> None:
    """Raise PreflightError naming what the reporters of a run lack on this machine."""
    problems = reporter_problems(run.recipe())
    if problems:
        raise PreflightError("; ".join(problems))


def passes(name: str, report_to: Iterable[str]) -> bool:
    """Return whether a variable of the environment is one that the asked reporters need."""
    asked = tuple(report_to)
    networked = [reporter for reporter in asked if reporter != "tensorboard"]
    prefixes = tuple(prefix for reporter in asked for prefix in VARIABLES[reporter])
    if name.upper() in PROXIES:
        return bool(networked)
    if name == "HF_TOKEN":
        return "trackio" in asked and "TRACKIO_SPACE_ID" in os.environ
    return bool(prefixes) and name.startswith(prefixes)


def prepare_reporters(run: Run) -> None:
    """Name this run to its reporters, so that all attempts draw one curve (the variables win)."""
    stamp = "".join(c for c in str(run.info().get("created", "")) if c.isdigit())
    defaults = {
        "WANDB_PROJECT": "starloom",
        "WANDB_RUN_ID": f"{run.name}-{stamp}",
        "WANDB_RESUME": "allow",
        "WANDB_DIR": str(run.path),
        "MLFLOW_EXPERIMENT_NAME": "starloom",
        "TENSORBOARD_LOGGING_DIR": str(run.path / "tensorboard"),
    }
    for name, value in defaults.items():
        if name.startswith(_prefixes(run.recipe())):
            os.environ.setdefault(name, value)


def _prefixes(recipe: Recipe) -> tuple[str, ...]:
    return tuple(prefix for name in recipe.training.report_to for prefix in VARIABLES[name])


def _installed(package: str) -> bool:
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None  # else a folder of that name


def _wandb_login(environment: Mapping[str, str]) -> bool:
    if environment.get("WANDB_API_KEY") or environment.get("WANDB_MODE") in WANDB_WITHOUT_KEY:
        return True
    try:
        return netrc.netrc().authenticators(WANDB_HOST) is not None
    except (OSError, netrc.NetrcParseError):
        return False

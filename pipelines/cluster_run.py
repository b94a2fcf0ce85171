"""What `starloom run` does besides a whole run on this machine.

It prints what would be executed, prepares data for a later start, writes the script of a Slurm job,
or trains this node's part of a run that another node leads.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

from pipelines.errors import PreflightError
from pipelines.overrides import parse_override
from pipelines.plan import Refs, data_root, open_store, prepare
from pipelines.preflight.checks import check, hardware_problems
from pipelines.preflight.machine import look_around
from pipelines.recipe import Recipe, load_hardware, load_recipe
from pipelines.runs import open_run
from pipelines.sources.fetch import fetch_missing
from pipelines.store import write_atomic
from pipelines.training.dry_run import check_hardware, describe, prepared
from pipelines.training.join import join
from pipelines.training.launchers import find_node, in_slurm_job, slurm_script

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Again:
    """The options of one `starloom run`, which mean the same run on another node or later."""

    recipe: str
    data: str | None = None
    overrides: tuple[str, ...] = ()
    smoke: bool = False
    force: bool = False
    publish: bool = False
    push: str | None = None

    def load(self) -> Recipe:
        """Return the recipe with its overrides."""
        changes = dict(parse_override(text) for text in self.overrides)
        return load_recipe(self.recipe, data=self.data, overrides=changes, smoke=self.smoke)

    def arguments(self) -> list[str]:
        """Return the arguments of `starloom`."""
        given = ["run", self.recipe, *(["--data", self.data] if self.data else [])]
        for override in self.overrides:
            given += ["--set", override]
        given += ["--push", self.push] if self.push else []
        return given + [f"--{n}" for n in ("smoke", "force", "publish") if getattr(self, n)]


def run_otherwise(again: Again, *, dry_run: bool, prepare_only: bool) -> str | None:
    """Do what is asked instead of a whole run here and return what to say; None: it is one."""
    recipe = again.load()
    if dry_run:
        return describe(recipe, again.arguments(), data_root()).rstrip("\n")
    if prepare_only:
        return _prepare_only(recipe)
    return _start_elsewhere(recipe, again)


def _prepare_only(recipe: Recipe) -> str:
    """Prepare the data and the run's folder; return its paths as assignments of the shell."""
    check(recipe, data_root())
    fetch_missing(recipe)
    store = open_store(recipe.name)
    refs: Refs = {}
    for ref in prepare(recipe, store):
        refs[ref.stage] = ref
        logger.info("%-10s %8d rows", ref.stage, ref.rows)
    return prepared(open_run(recipe, refs, data_root() / "runs"), store)


def _start_elsewhere(recipe: Recipe, again: Again) -> str | None:
    """Do this machine's part where it does not lead a run; return None where it does lead.

    Outside of a Slurm job the job's script is written; a node other than node 0 trains its part.
    Returns what to tell the user.
    """
    hardware = load_hardware(recipe.hardware)
    if hardware.launcher == "slurm" and not in_slurm_job():
        return f"submit  sbatch {_write_script(recipe, again.arguments())}"
    node = find_node(hardware)
    if node is None or node.leader:
        return None
    problems = hardware_problems(recipe, look_around())
    if problems:
        raise PreflightError(f"recipe {recipe.name}: " + "; ".join(problems))
    run = join(recipe, node, open_store(recipe.name), data_root() / "runs", force=again.force)
    return f"run     {run.name} (trained with node 0 at {node.endpoint}, which evaluates it)"


def _write_script(recipe: Recipe, arguments: list[str]) -> Path:
    hardware = load_hardware(recipe.hardware)
    check_hardware(recipe, hardware)
    path = data_root() / "slurm" / f"{recipe.name}.sbatch"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, slurm_script(hardware, recipe.name, arguments, data_root()))
    return path

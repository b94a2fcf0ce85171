"""Checks before any long work: what is missing is said in one line, all of it at once."""

import logging
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from pipelines.curate.language_model import find_model
from pipelines.errors import PreflightError, StarloomError
from pipelines.plan import open_store
from pipelines.preflight.dataset import (
    Dataset,
    find_dataset,
    run_problems,
    schedule_notes,
    trained_problems,
)
from pipelines.preflight.fitting import (
    Alternative,
    Asked,
    alternatives,
    busy_notes,
    memory_problems,
    method,
    shorten,
)
from pipelines.preflight.machine import Machine, look_around
from pipelines.preflight.sampling import Sample, sample_problems
from pipelines.preflight.source_access import access_problems
from pipelines.recipe import Recipe, load_hardware
from pipelines.runs import Run
from pipelines.settings.hardware import Hardware
from pipelines.sources import check_sources
from pipelines.store import Store
from pipelines.training.base_model import find_config, find_shape, model_problems
from pipelines.training.compile_checks import compile_problems
from pipelines.training.estimate import GIB, estimate_memory
from pipelines.training.hardware_checks import launch_problems
from pipelines.training.quantization import quantization_problems
from pipelines.training.reporters import reporter_problems
from pipelines.training.shapes import Shape
from pipelines.training.targets import target_problems

logger = logging.getLogger(__name__)

GB = 10**9
# Weights, their Adam moments and a gradient copy, in the checkpoint of the widest strategy.
CHECKPOINT_BYTES_PER_PARAMETER = 16
STAGES_BYTES = GB // 2


@dataclass(frozen=True, slots=True)
class Findings:
    """What was found out about a recipe on this machine; `problems` keep it from running."""

    recipe: Recipe
    hardware: Hardware
    machine: Machine
    shape: Shape | None
    dataset: Dataset | None
    sample: Sample | None
    problems: list[str]
    notes: list[str] = field(default_factory=list)
    instead: list[Alternative] = field(default_factory=list)


def check(
    recipe: Recipe,
    root: Path,
    *,
    train_here: bool = False,
    data_only: bool = False,
    asked: Asked | None = None,
) -> None:
    """Raise PreflightError naming everything this recipe lacks on this machine; warn of the rest.

    `train_here` also checks the recipe's hardware and memory; leave it False where another node
    trains. With `data_only` no model is needed, only its tokenizer. `asked` is how the recipe was
    asked for, from which the alternatives to one that does not fit are made.
    """
    found = examine(recipe, root, train_here=train_here, data_only=data_only, asked=asked)
    if found.problems:
        raise PreflightError(f"recipe {recipe.name}: {_in_one_line(found)}")
    for note in found.notes:
        logger.warning("%s", note)


def check_run(run: Run, store: Store) -> None:
    """Raise PreflightError where the stored dataset of a run does not fit the run's recipe.

    Warns of a schedule that can hardly be meant, now that its steps are known.
    """
    problems = run_problems(run, store)
    if problems:
        raise PreflightError(f"run {run.name}: " + "; ".join(problems))
    for note in [] if run.trained else schedule_notes(run, store):
        logger.warning("%s", note)


def examine(
    recipe: Recipe,
    root: Path,
    *,
    train_here: bool,
    data_only: bool = False,
    asked: Asked | None = None,
) -> Findings:
    """Check everything and return it, problems and all."""
    hardware, shape = load_hardware(recipe.hardware), find_shape(recipe)
    machine = look_around() if train_here else Machine()
    too_large: list[str] = []
    problems: list[str] = []
    busy: list[str] = []
    if train_here:
        too_large = hardware_problems(recipe, machine, shape)
        if shape is not None:
            too_large += memory_problems(recipe, shape, hardware, machine)
            busy = busy_notes(recipe, shape, hardware, machine)
        problems += [*too_large, *reporter_problems(recipe)]
    problems += [*_source_problems(recipe), *(access_problems(recipe) if asked else ())]
    problems += model_problems(recipe, weights=not data_only)
    problems += disk_problems(recipe, root, data_only=data_only)
    if not data_only:
        problems += [*_adapter_problems(recipe, shape), *position_problems(recipe, shape)]
        problems += quantization_problems(recipe, hardware, here=train_here)
        problems += compile_problems(recipe, hardware, here=train_here)
        problems += launch_problems(recipe, hardware, here=train_here)
    dataset, sample, data_problems, notes = _data(recipe)
    problems += data_problems
    instead = alternatives(asked or Asked(recipe.name), machine) if too_large else []
    return Findings(
        recipe, hardware, machine, shape, dataset, sample, problems, [*busy, *notes], instead
    )


def _data(recipe: Recipe) -> tuple[Dataset | None, Sample | None, list[str], list[str]]:
    """Look at the stored dataset, or where there is none, render a few records."""
    try:
        dataset, notes = find_dataset(recipe, open_store(recipe.name))
    except StarloomError as error:
        return None, None, [str(error)], []
    if dataset is not None:
        return dataset, None, trained_problems(dataset), notes
    sample, problems = sample_problems(recipe)
    return None, sample, problems, notes


def _in_one_line(found: Findings) -> str:
    text = "; ".join(found.problems)
    here = [each.text for each in found.instead if each.where == "here"]
    if here:
        text += f". Fits here: {', or '.join(here)}"
    for each in found.instead:
        if each.where != "here":
            text += f". Fits {each.where}: {each.text}"
    return text


def position_problems(recipe: Recipe, shape: Shape | None) -> list[str]:
    """Say that rows are longer than the base model's positions."""
    block, name = recipe.tokenization.block_size, recipe.model.model_name_or_path
    if name is None:
        return []
    config = {} if shape else find_config(name, recipe.model.revision) or {}
    positions = shape.positions if shape else config.get("max_position_embeddings")
    if not isinstance(positions, int) or block <= positions:
        return []
    problem = (
        f"tokenization.block_size {block} is above the {positions} positions of model "
        f"{name!r}; set it to {positions} or less"
    )
    return [problem]


def _adapter_problems(recipe: Recipe, shape: Shape | None) -> list[str]:
    """Check target modules against the base's architecture, where it is known."""
    if recipe.adapter is None:
        return []
    model_type = shape.model_type if shape else None
    name = recipe.model.model_name_or_path
    if model_type is None and name is not None:
        config = find_config(name, recipe.model.revision) or {}
        model_type = str(config.get("model_type", ""))
    return target_problems(recipe.adapter.target_modules, model_type) if model_type else []


def _source_problems(recipe: Recipe) -> list[str]:
    """Check that the raw input is here, and the model that the language filter needs."""
    problems = []
    try:
        check_sources(recipe)
    except PreflightError as error:
        problems.append(str(error))
    try:
        if recipe.curation.languages:
            find_model()
    except PreflightError as error:
        problems.append(str(error))
    return problems


def disk_problems(recipe: Recipe, root: Path, *, data_only: bool = False) -> list[str]:
    """Compare the free space at the data root with the estimate."""
    needed = STAGES_BYTES if data_only else estimate_disk(recipe)
    existing = next(path for path in (root, *root.parents) if path.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        return [f"{root}: not a folder that can be written to; set STARLOOM_DATA to one"]
    free = shutil.disk_usage(existing).free
    if free >= needed:
        return []
    problem = f"{root}: {free / GB:.1f} GB free, about {needed / GB:.1f} GB needed"
    return [f"{problem}; free some space or set STARLOOM_DATA to a folder on another disk"]


def estimate_disk(recipe: Recipe) -> int:
    """Return the bytes a run may need: data stages, checkpoints (one more while saving), model.

    An adapter's checkpoints hold the adapter; the model that is written at the end is whole.
    """
    shape = find_shape(recipe)
    if shape is None:
        return STAGES_BYTES
    trained = shape.adapter_parameters(recipe.adapter) if recipe.adapter else shape.parameters
    kept = recipe.training.save_total_limit + recipe.training.load_best_model_at_end + 1
    return STAGES_BYTES + kept * CHECKPOINT_BYTES_PER_PARAMETER * trained + 4 * shape.parameters


def count_parameters(recipe: Recipe) -> int:
    """Return the parameters of the recipe's model; 0 where its sizes are not known."""
    shape = find_shape(recipe)
    return shape.parameters if shape else 0


def hardware_problems(recipe: Recipe, machine: Machine, shape: Shape | None = None) -> list[str]:
    """Say where a machine has fewer GPUs than the recipe's hardware file names."""
    hardware = load_hardware(recipe.hardware)
    found = machine.gpus
    if hardware.device == "cpu" or found >= hardware.processes_per_node:
        return []
    problem = (
        f"hardware {recipe.hardware!r} needs {hardware.processes_per_node} GPU(s), {found} here"
    )
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        problem += f" with CUDA_VISIBLE_DEVICES={visible!r}"
    if shape is not None:
        each = estimate_memory(recipe, shape, hardware).total / GIB
        problem += f" (each with {each:.0f} GiB for {method(recipe)} of "
        problem += f"{shorten(shape.parameters)} parameters)"
    return [f"{problem}; choose another with --set hardware=NAME, or try `--smoke` on CPU"]

"""Does a run fit into the memory there is, and if not, which changes of it would.

Every alternative is a change that was applied to the recipe and estimated again, so that what is
offered passes the check that offers it.
"""

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import yaml

from pipelines.errors import StarloomError
from pipelines.hardware_files import hardware_names
from pipelines.preflight.machine import Machine
from pipelines.recipe import Recipe, load_hardware, load_recipe
from pipelines.settings.hardware import Hardware
from pipelines.training.base_model import find_shape
from pipelines.training.estimate import GIB, Memory, estimate_memory
from pipelines.training.shapes import KNOWN, Shape

USABLE = 0.95  # of a device's memory: the rest is the driver's, and for what is not foreseen
USUAL_GPU = 80e9  # bytes, where no GPU is here to ask
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
NUM_OFFERED = 2
DEMO = "quickstart"


@dataclass(frozen=True, slots=True)
class Asked:
    """A recipe as somebody asked for it: its name or path, and what was changed in it."""

    recipe: str
    data: str | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    smoke: bool = False

    def load(self) -> Recipe:
        """Return the resolved recipe; raises RecipeError."""
        return load_recipe(self.recipe, data=self.data, overrides=self.overrides, smoke=self.smoke)

    @property
    def command(self) -> str:
        """Return the command that runs it, ready to be pasted."""
        words = ["starloom", "run", self.recipe]
        if self.data is not None:
            words += ["--data", self.data]
        if self.smoke:
            words.append("--smoke")
        for key, value in self.overrides.items():
            words += ["--set", f"{key}={_flow(value)}"]
        return shlex.join(words)


@dataclass(frozen=True, slots=True)
class Alternative:
    """A change that fits: the command, what it is, and what one process of it needs."""

    asked: Asked
    what: str
    memory: Memory
    where: str = "here"

    @property
    def text(self) -> str:
        """Return it in one line."""
        return f"`{self.asked.command}` ({self.what}; {self.memory.total / GIB:.1f} GiB a process)"


def memory_limit(hardware: Hardware, machine: Machine) -> float | None:
    """Return the bytes that one process may take; None where the GPU is elsewhere and unknown."""
    if hardware.device == "cpu":
        return USABLE * machine.memory / hardware.processes_per_node
    if machine.gpus and machine.gpu_memory is not None:
        return USABLE * machine.gpu_memory
    given = getattr(hardware, "gpu_memory_gb", None)
    return None if given is None else USABLE * given * 1e9


def memory_problems(
    recipe: Recipe, shape: Shape, hardware: Hardware, machine: Machine
) -> list[str]:
    """Say how much too large a run is for the device, and for the machine that loads it."""
    memory = estimate_memory(recipe, shape, hardware)
    limit = memory_limit(hardware, machine)
    problems = []
    if limit is not None and memory.total > limit:
        device = "process" if hardware.device == "cpu" else "GPU"
        problems.append(
            f"memory: {method(recipe)} of {shorten(shape.parameters)} parameters needs about "
            f"{memory.total / GIB:.1f} GiB per {device} ({describe(memory)}), but "
            f"{limit / GIB:.1f} GiB can be used"
        )
    loading = memory.host * hardware.processes_per_node
    if hardware.device == "cuda" and machine.gpus and loading > USABLE * machine.memory:
        problems.append(
            f"main memory: {hardware.processes_per_node} processes need about "
            f"{loading / GIB:.0f} GiB to load the model, {machine.memory / GIB:.0f} GiB here"
        )
    return problems


def busy_notes(recipe: Recipe, shape: Shape, hardware: Hardware, machine: Machine) -> list[str]:
    """Say where a run fits a GPU, but not beside what other processes hold of it now."""
    limit = memory_limit(hardware, machine)
    if hardware.device == "cpu" or limit is None or machine.gpu_free is None:
        return []
    needed = estimate_memory(recipe, shape, hardware).total
    if not machine.gpu_free < needed <= limit:
        return []
    note = (
        f"memory: a GPU has {machine.gpu_free / GIB:.0f} GiB free now, the run needs about "
        f"{needed / GIB:.0f}: end what holds the rest (nvidia-smi lists it), or choose other GPUs "
        "with CUDA_VISIBLE_DEVICES"
    )
    return [note]


def describe(memory: Memory) -> str:
    """Return the parts of an estimate that count, largest first."""
    names = ("weights", "gradients", "optimizer", "activations", "logits", "buffers", "framework")
    parts = sorted(((getattr(memory, name), name) for name in names), reverse=True)
    return ", ".join(f"{name} {size / GIB:.1f}" for size, name in parts if size >= 0.05 * GIB)


def method(recipe: Recipe) -> str:
    """Return how a recipe trains, in words."""
    quantized = recipe.model.quantization_config
    bits = ("4-bit " if quantized.load_in_4bit else "8-bit ") if quantized else ""
    if recipe.adapter is None:
        return "full fine-tuning"
    kind = "DoRA" if recipe.adapter.use_dora else "rsLoRA" if recipe.adapter.use_rslora else "LoRA"
    return f"{bits}{kind}"


def alternatives(asked: Asked, machine: Machine) -> list[Alternative]:
    """Return two changes that fit this machine, the nearest to what was asked for first.

    Where there is no GPU, one that fits a GPU of 80 GB is added for a recipe that needs one.
    """
    recipe = asked.load()
    found: list[Alternative] = []
    for candidate in _candidates(asked, recipe, machine):
        fitting = _fit(candidate, machine)
        if fitting is not None:
            found.append(fitting)
        if len(found) == NUM_OFFERED:
            break
    if not machine.gpus and load_hardware(recipe.hardware).device == "cuda":
        elsewhere = replace(machine, gpus=1, gpu_memory=USUAL_GPU, memory=10 * USUAL_GPU)
        fits = (_fit(each, elsewhere) for each in _candidates(asked, recipe, elsewhere))
        first = next((each for each in fits if each is not None), None)
        if first is not None and not first.asked.smoke:
            found.append(replace(first, where=f"on one GPU of {USUAL_GPU / 1e9:.0f} GB"))
    return found


def _fit(candidate: tuple[Asked, str], machine: Machine) -> Alternative | None:
    """Return a candidate that is a valid recipe and fits the machine, else None."""
    asked, what = candidate
    try:
        recipe = asked.load()
    except StarloomError:
        return None
    shape, hardware = find_shape(recipe), load_hardware(recipe.hardware)
    if shape is None or not _has_gpus(hardware, machine):
        return None
    if memory_problems(recipe, shape, hardware, machine):
        return None
    return Alternative(asked, what, estimate_memory(recipe, shape, hardware))


def _has_gpus(hardware: Hardware, machine: Machine) -> bool:
    return hardware.device == "cpu" or (
        hardware.processes_per_node <= machine.gpus and hardware.num_nodes == 1
    )


def _candidates(asked: Asked, recipe: Recipe, machine: Machine) -> Iterator[tuple[Asked, str]]:
    """Yield changes, the nearest to what was asked for first."""
    if machine.gpus:
        yield from _same_method(asked, recipe)
        yield from _adapters(asked, recipe)
        yield from _smaller_bases(asked, recipe)
    elif load_hardware(recipe.hardware).device == "cpu":
        yield _changed(asked, _lighter(recipe)), "the same in smaller batches, recomputed"
    if not asked.smoke:
        yield Asked(asked.recipe, asked.data, {}, smoke=True), "a tiny model on the same data"
    yield Asked(DEMO), "the demo: a small model from scratch"


def _same_method(asked: Asked, recipe: Recipe) -> Iterator[tuple[Asked, str]]:
    lighter = _lighter(recipe)
    names = [name for name in hardware_names() if load_hardware(name).device == "cuda"]
    if lighter:
        yield _changed(asked, lighter), "the same in smaller batches, recomputed"
    for name in sorted(names, key=_how_sharded):
        if name != recipe.hardware:
            changes = {**lighter, **_same_step(recipe, lighter, name), "hardware": name}
            yield _changed(asked, changes), f"the same on hardware {name}"


def _adapters(asked: Asked, recipe: Recipe) -> Iterator[tuple[Asked, str]]:
    lighter = {**_lighter(recipe), "model.dtype": "bfloat16"}
    lora = {} if recipe.adapter else {"adapter": LORA}
    for quantized in (False, True):
        changes: dict[str, Any] = {**lora, **lighter, "hardware": "gpu"}
        changes |= _same_step(recipe, changes, "gpu")
        if quantized:
            changes["model.quantization_config"] = {"load_in_4bit": True}
        if quantized or not recipe.adapter or recipe.model.quantization_config:
            yield _changed(asked, changes), f"{'4-bit ' * quantized}LoRA of the same model"


def _smaller_bases(asked: Asked, recipe: Recipe) -> Iterator[tuple[Asked, str]]:
    """Yield models of the same family that are smaller, the largest first."""
    name, shape = recipe.model.model_name_or_path, find_shape(recipe)
    if name is None or shape is None:
        return
    owner = name.partition("/")[0]
    family = [
        (known.parameters, other)
        for other, known in KNOWN.items()
        if other.startswith(f"{owner}/") and known.model_type == shape.model_type
    ]
    for parameters, other in sorted(family, reverse=True):
        if parameters < shape.parameters:
            base = {"model.model_name_or_path": other, **_lighter(recipe), "hardware": "gpu"}
            base |= _same_step(recipe, base, "gpu")
            yield _changed(asked, base), f"a smaller model, {parameters / 1e9:.1f} B"


def _lighter(recipe: Recipe) -> dict[str, Any]:
    """Return what makes a step take less memory and leaves its result as it is."""
    training = recipe.training
    changes: dict[str, Any] = {}
    if training.per_device_train_batch_size > 1:
        changes["training.per_device_train_batch_size"] = 1
        changes["training.gradient_accumulation_steps"] = (
            training.gradient_accumulation_steps * training.per_device_train_batch_size
        )
    if training.per_device_eval_batch_size > 1:
        changes["training.per_device_eval_batch_size"] = 1
    if not training.gradient_checkpointing:
        changes["training.gradient_checkpointing"] = True
    return changes


def _same_step(recipe: Recipe, changes: Mapping[str, Any], hardware: str) -> dict[str, Any]:
    """Return the accumulation that keeps the rows of a step on another number of processes."""
    key = "training.gradient_accumulation_steps"
    before, after = load_hardware(recipe.hardware), load_hardware(hardware)
    accumulation = changes.get(key, recipe.training.gradient_accumulation_steps)
    ranks = before.num_nodes * before.processes_per_node
    scaled = max(1, round(accumulation * ranks / (after.num_nodes * after.processes_per_node)))
    return {key: scaled} if scaled != recipe.training.gradient_accumulation_steps else {}


def _changed(asked: Asked, changes: Mapping[str, Any]) -> Asked:
    return replace(asked, overrides={**asked.overrides, **changes})


def _how_sharded(name: str) -> tuple[bool, str]:
    """Sort what offloads to the slow main memory behind what does not."""
    return getattr(load_hardware(name), "offload", "none") != "none", name


def _flow(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10_000)
    return text.removesuffix("...\n").strip()


def shorten(number: float) -> str:
    """Return a count with three digits and its unit: 15.5 B, 3.9 M, 240."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f}"

"""`starloom import-config`: another script's YAML, and its DeepSpeed JSON, become a recipe.

Nothing is dropped in silence: each key is in the recipe or in the report, and the report says what
was renamed, what is ignored and why, and what contradicts itself.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from pipelines.errors import RecipeError, did_you_mean
from pipelines.importing.deepspeed import import_deepspeed, pick_hardware
from pipelines.importing.names import (
    COLUMNS,
    DATASET_NOTES,
    DATASETS,
    DIALOGUE_TEMPLATES,
    FINETUNE_PY,
    IGNORED,
    IGNORED_PREFIXES,
    KNOWN_MODELS,
    RENAMED,
    UPSTREAM_DEFAULTS,
)
from pipelines.overrides import load_yaml, set_dotted
from pipelines.recipe import Recipe
from pipelines.recipe_problems import explain
from pipelines.settings.training import Adapter, Training
from pipelines.training.architectures import LINEAR_LAYERS

SCHEDULES = ("cosine", "linear", "constant", "constant_with_warmup")
HEADINGS = {
    "model": "Model",
    "tokenizer": "Tokenizer",
    "sources": "Data",
    "template": "Rendering",
    "fim": "",
    "tokenization": "",
    "adapter": "Adapter",
    "training": "Training",
    "hardware": "What it runs on: a file of recipes/hardware",
}


@dataclass
class Import:
    """A recipe in the making: its values, what is said of each key, and what is left to read."""

    given: dict[str, Any]
    values: dict[str, Any] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)

    def say(self, kind: str, key: str, text: str) -> None:
        """Add a line to the report."""
        self.lines.append(f"{kind} {key}: {text}")

    def put(self, key: str, value: Any) -> None:
        """Set a dotted key of the recipe."""
        set_dotted(self.values, key, value)


def import_config(
    path: Path, deepspeed: Path | None = None, output: Path | None = None
) -> tuple[str, list[str]]:
    """Return a recipe as YAML, and the report: one line for each key that is not taken as it is.

    `output` is where the recipe will be, which its first line names. Raises RecipeError where a
    file cannot be read, or what it says makes no recipe.
    """
    given = _read(path, load_yaml)
    work = Import(dict(given))
    work.values["name"] = _name(given, path)
    work.values["description"] = f"Imported from {path.name}"
    _take_model(work)
    _take_data(work)
    _take_precision(work)
    _take_schedule(work)
    _take_adapter(work)
    strategy = _take_strategy(work)
    if deepspeed is None:
        _ask_for_deepspeed(work)
    _take_rest(work)
    _fill_defaults(work)
    _check(work, path)
    if deepspeed is not None:
        strategy = import_deepspeed(work, _read(deepspeed, json.loads), deepspeed.name)
    work.put("hardware", pick_hardware(work, strategy))
    _check(work, path)
    return _write(work.values, path, output), work.lines


def _read(path: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    try:
        values = parse(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read as UTF-8 text ({error})") from error
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(f"{path}: cannot be parsed: {error}".replace("\n", " ")) from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise RecipeError(f"{path}: expected keys and values, got {type(values).__name__}")
    return values


def _name(given: dict[str, Any], path: Path) -> str:
    """Return a name for the recipe: that of the model on the Hub, of the folder, or of the file."""
    source = given.get("hub_model_id") or given.get("output_dir") or path.stem
    name = re.sub(r"[^a-z0-9]+", "-", str(source).rstrip("/").rpartition("/")[2].lower())
    return name.strip("-") or "imported"


def _take_model(work: Import) -> None:
    for key in ("model_name_or_path", "model_path"):
        name = work.given.get(key)
        if isinstance(name, str) and name:
            work.put("model.model_name_or_path", name)
            return
    raise RecipeError("model_name_or_path: required, but not set")


def _take_data(work: Import) -> None:
    """Turn the named dataset into a source, and the template's name into a template."""
    given = work.given
    named = {key for key in ("data_path", "train_file") if given.get(key)}
    name = given.pop("dataset_name", None)
    file = next((given.pop(key) for key in ("train_file", "data_path") if given.get(key)), None)
    columns = {ours: given.pop(theirs) for theirs, ours in COLUMNS.items() if theirs in given}
    if name in DATASETS:
        source = {**DATASETS[name]}
        work.say("renamed", "dataset_name", f"{name} is the source of type {source['type']}")
        if name in DATASET_NOTES:
            work.say("note", "dataset_name", f"{name} {DATASET_NOTES[name]}")
    elif name or file:
        place = {"dataset": str(name)} if name else {"path": str(file)}
        source = {"type": "dataset", "id": "data", **place}
        work.say("note", "sources.0", "name the license of the rows: sources.0.license")
    else:
        source = {"type": "dataset", "id": "data", "path": "data.jsonl"}
        work.say("missing", "dataset_name", "no data is named; set sources.0.path")
    if columns and name not in DATASETS:
        source["columns"] = columns
    work.values["sources"] = [source]
    if name in FINETUNE_PY or columns.keys() & {"prompt", "completion"}:
        work.values["template"] = {"name": "question-answer", "train_on_prompt": True}
        told = "question-answer with train_on_prompt, as finetune.py"
    elif "data_path" in named:
        work.values["template"] = {"name": "alpaca"}
        told = "alpaca, as the script that names its data data_path"
    else:
        told = "none is named, so plain is taken; see template.name"
    _take_template(work, told)


def _take_template(work: Import, otherwise: str) -> None:
    variant = work.given.pop("dialogue_template", None)
    if variant is None:
        work.say("note", "template", otherwise)
        return
    if variant not in DIALOGUE_TEMPLATES:
        known = ", ".join(DIALOGUE_TEMPLATES)
        work.say("conflict", "dialogue_template", f"{variant!r} is none of {known}; default taken")
        variant = "default"
    work.values["template"] = {"name": "starchat", "variant": variant}
    work.say("renamed", "dialogue_template", f"template {{name: starchat, variant: {variant}}}")
    work.say(
        "note", "loss", "only the assistant's turns are trained; the original trained every token"
    )


def _take_precision(work: Import) -> None:
    given = work.given
    dtype = given.pop("torch_dtype", given.pop("dtype", None))
    fp16, bf16 = given.pop("fp16", None), given.pop("bf16", None)
    taken = "bfloat16" if fp16 or bf16 or dtype in ("float16", "bfloat16") else "float32"
    work.put("model.dtype", taken)
    if fp16 or dtype == "float16":
        work.say("conflict", "fp16", "float16 is not supported; bfloat16 is used")
    elif fp16 is not None:
        work.say("ignored", "fp16", "it is off")
    if bf16 is not None:
        work.say("renamed", "bf16", f"model.dtype: {taken}")
    _take_quantization(work)


def _take_quantization(work: Import) -> None:
    given, wide = work.given, []
    for bits in (4, 8):
        for key in (f"load_in_{bits}bit", f"use_{bits}bit_quantization"):
            if given.pop(key, False):
                wide.append(bits)
                work.put(f"model.quantization_config.load_in_{bits}bit", True)
                work.say("renamed", key, f"model.quantization_config.load_in_{bits}bit")
    for key in [k for k in given if "quantization_config" in RENAMED.get(k, "")]:
        if not wide:
            given.pop(key)
            work.say("ignored", key, "the base is not quantized")


def _take_schedule(work: Import) -> None:
    """Take what transformers renamed or reads in two ways: evaluation, warm-up, checkpointing."""
    given = work.given
    if "evaluation_strategy" in given:
        value = given.pop("evaluation_strategy")
        work.say("renamed", "evaluation_strategy", "eval_strategy since transformers 4.46")
        given["eval_strategy"] = value
    if given.get("warmup_steps") and given.get("warmup_ratio"):
        ratio = given.pop("warmup_ratio")
        work.say("conflict", "warmup_ratio", f"{ratio} is overruled by warmup_steps, as before")
    elif "warmup_ratio" in given:
        given.pop("warmup_steps", None)
    schedule = given.get("lr_scheduler_type")
    if schedule is not None and schedule not in SCHEDULES:
        given["lr_scheduler_type"] = "cosine"
        known = ", ".join(SCHEDULES)
        work.say("conflict", "lr_scheduler_type", f"{schedule!r} is none of {known}; cosine taken")
    if "no_gradient_checkpointing" in given:
        given["gradient_checkpointing"] = not given.pop("no_gradient_checkpointing")
        work.say("renamed", "no_gradient_checkpointing", "training.gradient_checkpointing")
    limit = given.get("save_total_limit", 2)
    if limit in (None, 0, 1):
        given.pop("save_total_limit")
        text = "one checkpoint" if limit == 1 else "all checkpoints"
        work.say("conflict", "save_total_limit", f"{limit} keeps {text}; the last 2 are kept")


def _take_adapter(work: Import) -> None:
    """Take LoRA's keys, or say that they are ignored where it is off."""
    given = work.given
    flags = []
    for key in ("use_peft", "use_peft_lora"):
        if key in given:
            flags.append(bool(given.pop(key)))
            work.say("renamed", key, "the section adapter, there or not")
    keys = [key for key in given if RENAMED.get(key, "").startswith("adapter.")]
    if flags == [False] or not (keys or flags):
        for key in keys:
            given.pop(key)
            work.say("ignored", key, "the adapter is off")
        return
    targets: Any = None
    for key in ("lora_target_modules", "target_modules"):
        if key in given:
            targets = given.pop(key) or targets
            work.say("renamed", key, "adapter.target_modules")
    if isinstance(targets, str):
        targets = [name.strip() for name in targets.split(",")]
    work.put("adapter.target_modules", _known_targets(work, targets or ["all-linear"]))


def _known_targets(work: Import, targets: Any) -> Any:
    """Return the target modules that the model's architecture has, where that is known."""
    known = LINEAR_LAYERS.get(_architecture(work.values["model"]["model_name_or_path"]) or "")
    names = isinstance(targets, list) and all(isinstance(name, str) for name in targets)
    if known is None or not names:
        return targets
    targets = list(dict.fromkeys(targets))
    kept = [name for name in targets if name in known or name == "all-linear"]
    for name in targets:
        if name not in kept:
            text = f"{name} dropped: the model has no such layer (it has: {', '.join(known)})"
            work.say("dropped", "target_modules", text)
    if not kept:
        work.say("conflict", "target_modules", "nothing is left of them; all-linear is taken")
    return kept or ["all-linear"]


def _architecture(name: str) -> str | None:
    config = Path(name) / "config.json"
    if config.is_file():
        return str(_read(config, json.loads).get("model_type"))
    return next((kind for known, kind in KNOWN_MODELS.items() if known in name.lower()), None)


def _take_strategy(work: Import) -> str:
    fsdp = work.given.pop("fsdp", None)
    if not fsdp:
        return "ddp"
    work.say("renamed", "fsdp", f"{fsdp!r} is the hardware file's strategy")
    return "fsdp2"


def _ask_for_deepspeed(work: Import) -> None:
    """Say that a DeepSpeed file is named, but not given: it decides what the script ran on."""
    file = work.given.get("deepspeed")
    if isinstance(file, str) and file:
        del work.given["deepspeed"]
        text = f"{file} is not read, so hardware does not follow it; give it too: "
        work.say("note", "deepspeed", f"{text}--deepspeed {file}")


def _take_rest(work: Import) -> None:
    """Take each key that is left by its name, or say why it is ignored."""
    # What says where to log or to go on is of their machine, though a key of ours as well.
    ours = Training.model_fields.keys() - IGNORED.keys()
    taken = {f"training.{key}": key for key in work.given if key in ours}
    for key, value in work.given.items():
        if key in ours:
            work.put(f"training.{key}", value)
        elif key in RENAMED:
            if RENAMED[key] in taken:
                text = f"{value} is not taken: {taken[RENAMED[key]]} says the same thing"
                work.say("conflict", key, text)
                continue
            taken[RENAMED[key]] = key
            work.put(RENAMED[key], value)
            if RENAMED[key].rpartition(".")[2] != key:
                work.say("renamed", key, RENAMED[key])
        else:
            work.say(*_ignore(key))


def _ignore(key: str) -> tuple[str, str, str]:
    reason = IGNORED.get(key) or next(
        (text for prefix, text in IGNORED_PREFIXES.items() if key.startswith(prefix)), None
    )
    if reason:
        return "ignored", key, reason
    known = [*Training.model_fields, *Adapter.model_fields, *RENAMED, *IGNORED]
    return "unknown", key, f"no key of a known script{did_you_mean(key, known)}; left out"


def _fill_defaults(work: Import) -> None:
    """Set what transformers takes for a key that is not given, where a recipe takes another."""
    training = work.values.setdefault("training", {})
    for key, value in UPSTREAM_DEFAULTS.items():
        if key not in training:
            training[key] = value
            work.say("default", key, f"{value}, as transformers takes it where it is not given")


def _check(work: Import, path: Path) -> None:
    try:
        Recipe.model_validate(work.values)
    except ValidationError as error:
        raise RecipeError(f"{path}: " + "; ".join(explain(Recipe, error))) from error


def _write(values: dict[str, Any], path: Path, output: Path | None) -> str:
    file = output or Path(f"{values['name']}.yaml")
    parts = [f"# Imported from {path.name}: read it, then `starloom run {file.name}`"]
    parts += [_dump({key: values[key]}) for key in ("name", "description")]
    for key, heading in HEADINGS.items():
        if key in values:
            parts += [f"\n# {heading}" if heading else "", _dump({key: values[key]})]
    return "\n".join(part for part in parts if part) + "\n"


def _dump(values: dict[str, Any]) -> str:
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True).rstrip()

"""Checks before any long work: what is missing is said in one line, all of it at once."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from pipelines.curate.language_model import find_model
from pipelines.errors import PreflightError
from pipelines.recipe import Recipe, load_hardware
from pipelines.sources import check_sources
from pipelines.training.quantization import quantization_problems
from pipelines.training.reporters import reporter_problems
from pipelines.training.targets import target_problems

GB = 10**9
# Weights, their Adam moments and a gradient copy, in the checkpoint of the widest strategy.
CHECKPOINT_BYTES_PER_PARAMETER = 16
STAGES_BYTES = GB // 2


def check(recipe: Recipe, root: Path, *, train_here: bool = False) -> None:
    """Raise PreflightError naming everything this recipe lacks on this machine.

    `train_here` also checks the recipe's hardware; leave it False where another node trains.
    """
    problems = [*_source_problems(recipe), *_model_problems(recipe), *disk_problems(recipe, root)]
    problems += _adapter_problems(recipe)
    problems += quantization_problems(recipe, load_hardware(recipe.hardware), here=train_here)
    if train_here:
        problems += [*hardware_problems(recipe), *reporter_problems(recipe)]
    if problems:
        raise PreflightError(f"recipe {recipe.name}: " + "; ".join(problems))


def _adapter_problems(recipe: Recipe) -> list[str]:
    """Check target modules against the base's architecture, where its config.json is here."""
    if recipe.adapter is None:
        return []
    model_type = _model_type(recipe)
    return target_problems(recipe.adapter.target_modules, model_type) if model_type else []


def _model_type(recipe: Recipe) -> str | None:
    name, revision = recipe.model.model_name_or_path, recipe.model.revision
    if name is None:
        return recipe.model.config.model_type if recipe.model.config else None
    path: Any = Path(name).expanduser() / "config.json"
    if not path.is_file():
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            path = try_to_load_from_cache(name, "config.json", revision=revision)
        except HFValidationError:  # a path, and no folder there: said elsewhere
            return None
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return None
    return str(config.get("model_type")) if isinstance(config, dict) else None


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


def disk_problems(recipe: Recipe, root: Path) -> list[str]:
    """Compare the free space at the data root with the estimate."""
    needed = estimate_disk(recipe)
    existing = next(path for path in (root, *root.parents) if path.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        return [f"{root}: not a folder that can be written to; set STARLOOM_DATA to one"]
    free = shutil.disk_usage(existing).free
    if free >= needed:
        return []
    problem = f"{root}: {free / GB:.1f} GB free, about {needed / GB:.1f} GB needed"
    return [f"{problem}; free some space or set STARLOOM_DATA to a folder on another disk"]


def estimate_disk(recipe: Recipe) -> int:
    """Return the bytes a run may need: data stages, checkpoints (one more while saving), model."""
    parameters = count_parameters(recipe)
    kept = recipe.training.save_total_limit + recipe.training.load_best_model_at_end
    checkpoints = (kept + 1) * CHECKPOINT_BYTES_PER_PARAMETER
    return STAGES_BYTES + parameters * (checkpoints + 4)


def count_parameters(recipe: Recipe) -> int:
    """Return the parameters of a model from `config`; 0 where unknown.

    Per layer: queries, keys and values n(n + 2n/h), output n^2, the MLP's two matrices 8n^2 (three,
    12n^2, where it is gated), biases and norms about 13n. Gated families have a head of their own.
    """
    config = recipe.model.config
    if config is None:
        return 0
    n, vocab = config.n_embd, recipe.tokenizer.train_vocab_size or 49_152
    head = n // config.n_head
    gated = config.model_type in ("llama", "qwen2")
    layer = n * (n + 2 * head) + (13 if gated else 9) * n * n + 13 * n
    positions = config.n_positions if config.model_type == "gpt_bigcode" else 0
    return config.n_layer * layer + (vocab * (2 if gated else 1) + positions) * n


def hardware_problems(recipe: Recipe) -> list[str]:
    """Say where this machine has fewer GPUs than the recipe's hardware file names."""
    hardware = load_hardware(recipe.hardware)
    if hardware.device == "cpu":
        return []
    found = count_gpus()
    if found >= hardware.processes_per_node:
        return []
    problem = (
        f"hardware {recipe.hardware!r} needs {hardware.processes_per_node} GPU(s), {found} here"
    )
    return [f"{problem}; choose another with --set hardware=NAME, or try `--smoke` on CPU"]


def count_gpus() -> int:
    """Return the number of NVIDIA GPUs the driver lists, without importing torch."""
    if shutil.which("nvidia-smi") is None:
        return 0
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def _model_problems(recipe: Recipe) -> list[str]:
    """Check that the base model is a readable folder, cached, or open to us on the hub."""
    name = recipe.model.model_name_or_path
    if name is None:
        return []
    if Path(name).is_dir():
        return _folder_problems(Path(name))
    if name.startswith((".", "/", "~")):
        return [f"model.model_name_or_path: no folder {name!r}"]
    return _hub_problems(name, recipe.model.revision)


def _folder_problems(folder: Path) -> list[str]:
    if not (folder / "config.json").is_file():
        return [f"model folder {folder}: no config.json, so it is not a transformers model"]
    if not list(folder.glob("*.safetensors")):
        return [f"model folder {folder}: no *.safetensors (pickle weights are refused)"]
    return []


def _hub_problems(name: str, revision: str | None) -> list[str]:
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    if isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
        return []
    page = f"https://huggingface.co/{name}"
    local = "or set model.model_name_or_path to a local folder, or try `--smoke`"
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return [f"model {name!r} is not in the local cache and HF_HUB_OFFLINE is set; {local}"]
    try:
        HfApi().model_info(name, revision=revision, timeout=10)
    except GatedRepoError:
        return [f"model {name!r} is gated: accept its license on {page}, `hf auth login`, {local}"]
    except RepositoryNotFoundError:
        return [f"model {name!r} does not exist or needs a login: see {page}; {local}"]
    except (HfHubHTTPError, OSError) as error:
        return [f"model {name!r}: the hub cannot be reached ({type(error).__name__}); {local}"]
    except Exception as error:  # noqa: BLE001 - httpx errors share no base with OSError
        return [f"model {name!r}: the hub cannot be reached ({type(error).__name__}); {local}"]
    return []

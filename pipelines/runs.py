"""A training run's folder: `data/runs/<recipe>-<digest>/`, named by what decides its result.

The run key is made of the dataset's digest, the training part of the recipe and the code digest of
training, so the same cause finds the finished run again. Files appear in this order: run.json and
recipe.yaml, checkpoints/ and metrics.jsonl while training, model/ (before anything that can fail),
training.json, loss.png, then scorecard, samples, report, card and lineage from the evaluation.
"""

import fcntl
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from pipelines.errors import StarloomError, did_you_mean
from pipelines.fingerprint import code_digest, git_sha
from pipelines.manifest import digest_of, sha256_file
from pipelines.recipe import Recipe, load_hardware
from pipelines.settings.hardware import LAUNCH_KEYS
from pipelines.settings.training import WATCH_KEYS
from pipelines.store import StageRef, ref_to_dict, write_atomic

TRAINER = "pipelines.training.trainer"
EVALUATOR = "pipelines.evals.evaluate"
PREFERRED = "preferred"
LOCK = ".lock"  # held by whoever trains the run, until the last rank is gone


@dataclass(frozen=True, slots=True)
class Run:
    """One run folder, and which of its models is meant: `model/`, or `preferred/` where asked."""

    path: Path
    weights: str = "model"

    @property
    def name(self) -> str:
        """Return the folder's name, which names the run everywhere; RUN/preferred for that."""
        return self.path.name if self.weights == "model" else f"{self.path.name}/{self.weights}"

    @property
    def model(self) -> Path:
        """Return the folder of the trained weights and tokenizer."""
        return self.path / self.weights

    def preferred(self) -> "Run":
        """Return the same run with the model that the preference stage has made of its own."""
        return Run(self.path, PREFERRED)

    @property
    def checkpoints(self) -> Path:
        """Return the folder of the checkpoints."""
        return self.path / "checkpoints"

    def info(self) -> dict[str, Any]:
        """Return run.json: key, key parts, references of all data stages."""
        return self.read("run.json") or {}

    def recipe(self) -> Recipe:
        """Return the resolved recipe that the run was made with."""
        return Recipe.model_validate(yaml.safe_load((self.path / "recipe.yaml").read_text()))

    def refs(self) -> dict[str, StageRef]:
        """Return the references of the data stages."""
        return {name: StageRef(**ref) for name, ref in self.info()["stages"].items()}

    def read(self, file: str) -> dict[str, Any] | None:
        """Return a JSON file of the run, or None where it is not there or cut."""
        try:
            data = json.loads((self.path / file).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return data if isinstance(data, dict) else None

    def write(self, file: str, data: Mapping[str, Any]) -> None:
        """Write a JSON file of the run, whole or not at all."""
        write_atomic(self.path / file, json.dumps(data, indent=1, ensure_ascii=False) + "\n")

    @property
    def trained(self) -> bool:
        """Return whether training reached its last step and its weights are all there."""
        result = self.read("training.json")
        finished = bool(result and result["status"] == "finished")
        if self.weights == PREFERRED:
            result = self.read(f"{PREFERRED}.json")
        if not (finished and result and self.model.is_dir()):
            return False
        sizes = result.get("model_files", {}).items()
        return all(_size(self.model / name) == size for name, size in sizes)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def run_key_parts(recipe: Recipe, refs: Mapping[str, StageRef]) -> dict[str, Any]:
    """Return the components of a run's key."""
    return {
        "dataset": refs["pack"].digest,
        "tokenizer": refs["tokenizer"].digest,
        "model": recipe.model.model_dump(mode="json"),
        "base": _base_content(recipe),
        "adapter": recipe.adapter.model_dump(mode="json") if recipe.adapter else None,
        "training": recipe.training.model_dump(mode="json", exclude=set(WATCH_KEYS)),
        "hardware": load_hardware(recipe.hardware).model_dump(
            mode="json", exclude=set(LAUNCH_KEYS)
        ),
        "code": code_digest(TRAINER),
    }


def _base_content(recipe: Recipe) -> dict[str, str]:
    """Return {file: sha256} of a base model in a local folder; a hub id has its revision."""
    name = recipe.model.model_name_or_path
    if name is None or not Path(name).is_dir():
        return {}
    files = [Path(name) / "config.json", *Path(name).glob("*.safetensors")]
    return {path.name: sha256_file(path) for path in sorted(files) if path.is_file()}


def open_run(
    recipe: Recipe, refs: Mapping[str, StageRef], root: Path, *, force: bool = False
) -> Run:
    """Return the run folder for a recipe and its data stages, making it where it is new.

    `force` sets a finished run aside (never deletes it), so that training starts again; an
    unfinished one is resumed, so that a forced run that was killed goes on when it is forced again.
    """
    parts = run_key_parts(recipe, refs)
    key = digest_of(parts)
    run = Run(root / f"{recipe.name}-{key[:12]}")
    if force and run.trained:  # an unfinished one is resumed
        _set_aside(run)
    run.path.mkdir(parents=True, exist_ok=True)
    made = run.read("run.json") or {
        "git_sha": git_sha(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": os.uname().nodename,
    }
    # The same key leaves evaluation, prices and the folders of equal data stages open.
    write_atomic(
        run.path / "recipe.yaml",
        yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True),
    )
    stages = {name: ref_to_dict(ref) for name, ref in refs.items()}
    launch = load_hardware(recipe.hardware).model_dump(mode="json", include=set(LAUNCH_KEYS))
    now = {"key": key, "key_parts": parts, "recipe": recipe.name, "stages": stages}
    run.write("run.json", {**made, **now, "launch": launch})
    return run


def _set_aside(run: Run) -> None:
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
    with (run.path / LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StarloomError(
                f"run {run.name} is being trained: wait for it or cancel it before force"
            ) from None
        run.path.rename(run.path.with_name(f"{run.name}.replaced-{stamp}"))


def find_run(root: Path, name: str) -> Run:
    """Return a run by name, unique prefix, path, or "latest"; an error names those there are.

    With "/preferred" behind it, the run with the model of its preference stage.
    """
    if name.rstrip("/").endswith(f"/{PREFERRED}"):
        run = find_run(root, name.rstrip("/").removesuffix(f"/{PREFERRED}"))
        if not run.preferred().trained:
            raise StarloomError(
                f"run {run.name} has no preferred model: `starloom prefer {run.name}` makes it"
            )
        return run.preferred()
    found = sorted(
        (p.parent for p in root.glob("*/run.json") if ".replaced-" not in p.parent.name),
        key=lambda p: p.stat().st_mtime,
    )
    if Path(name).joinpath("run.json").is_file():
        return Run(Path(name).resolve())
    if name == "latest" and found:
        return Run(found[-1])
    matches = [path for path in found if path.name == name] or [
        path for path in found if path.name.startswith(name)
    ]
    if len(matches) == 1:
        return Run(matches[0])
    names = [path.name for path in found]
    if matches:
        raise StarloomError(
            f"{name!r} names {len(matches)} runs: {', '.join(m.name for m in matches)}"
        )
    known = (
        f"there are: {', '.join(names)}"
        if names
        else "there is none yet: `starloom run quickstart`"
    )
    raise StarloomError(f"no run {name!r} in {root}{did_you_mean(name, names)} ({known})")

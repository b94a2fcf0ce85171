"""The stages of a recipe, in order: what `starloom run` walks and what the flows execute.

A stage is a module with
    params(recipe)               -> dict   what of the recipe and raw input decides its result
    build(recipe, inputs, work)  -> Built  makes its shards below work.path
    DEPENDS                      -> tuple  distributions whose version its bytes depend on
Nothing else may enter a result, so the key made of these names the result.
"""

import importlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

from pipelines.engine import Built, Cluster, Input, Work
from pipelines.errors import PreflightError
from pipelines.fingerprint import code_digest, git_sha, versions
from pipelines.recipe import Recipe
from pipelines.store import StageRef, StageSpec, Store


class StageModule(Protocol):
    """What a stage's module offers."""

    DEPENDS: tuple[str, ...]

    def params(self, recipe: Recipe) -> dict[str, Any]:
        """Return the part of the recipe that decides the result."""

    def build(self, recipe: Recipe, inputs: Mapping[str, Input], work: Work) -> Built:
        """Make the shards."""


@dataclass(frozen=True, slots=True)
class Stage:
    """A named step, the module that does it and the stages whose results it reads."""

    name: str
    module: str
    upstream: tuple[str, ...] = ()


STAGES = (
    Stage("collect", "pipelines.sources.collect"),
    Stage("language", "pipelines.curate.language", ("collect",)),
    Stage("quality", "pipelines.curate.quality", ("language",)),
    Stage("redact", "pipelines.curate.redact", ("quality",)),
    Stage("dedup", "pipelines.curate.dedup", ("redact",)),
    Stage("decontaminate", "pipelines.curate.decontaminate", ("dedup",)),
    Stage("split", "pipelines.curate.split", ("decontaminate",)),
    Stage("tokenizer", "pipelines.render.vocabulary", ("split",)),
    Stage("format", "pipelines.render.format", ("split", "tokenizer")),
    Stage("tokenize", "pipelines.render.encode", ("format", "tokenizer")),
    Stage("pack", "pipelines.render.pack", ("tokenize", "tokenizer")),
)
RUN_STEPS = ("train", "evaluate", "gate", "card")

Refs = dict[str, StageRef]


def data_root() -> Path:
    """Return the folder that holds store, runs, models and state (STARLOOM_DATA, or ./data)."""
    default = Path(__file__).resolve().parent.parent / "data"
    return Path(os.environ.get("STARLOOM_DATA") or default).resolve()


def chosen_workers() -> int:
    """Return STARLOOM_WORKERS, 0 where it is not set; PreflightError where it is no number."""
    wanted = os.environ.get("STARLOOM_WORKERS") or "0"
    if not wanted.isdigit():
        raise PreflightError(f"STARLOOM_WORKERS={wanted!r}: expected a number of processes")
    return int(wanted)


def open_store(
    recipe: str = "", *, workers: int = 0, flow_run_id: str = "", cluster: Cluster | None = None
) -> Store:
    """Open the stage store below the data root; `workers` 0 means one per CPU.

    Shards are made on the cluster where one is given, on this machine otherwise.
    """
    context = {"recipe": recipe, "git_sha": git_sha(), "flow_run_id": flow_run_id}
    count = workers or chosen_workers() or len(os.sched_getaffinity(0))
    return Store(data_root() / "store", workers=count, context=context, cluster=cluster)


def get_stage(name: str) -> Stage:
    """Return a data stage by name; KeyError where there is none."""
    return {stage.name: stage for stage in STAGES}[name]


def software_of(stage: Stage) -> tuple[str, dict[str, str]]:
    """Return the digest of a stage's code and the versions of what its bytes depend on."""
    return code_digest(stage.module), versions(*_module(stage).DEPENDS)


def stage_spec(stage: Stage, recipe: Recipe, refs: Mapping[str, StageRef]) -> StageSpec:
    """Return what the stage's key is made of, given the finished upstream stages."""
    code, installed = software_of(stage)
    return StageSpec(
        stage=stage.name,
        params=_module(stage).params(recipe),
        code=code,
        upstream={name: refs[name] for name in stage.upstream},
        versions=installed,
    )


def build_stage(
    stage: Stage, recipe: Recipe, refs: Mapping[str, StageRef], store: Store
) -> StageRef:
    """Return the finished stage, building it where it is not in the store yet."""

    def builder(work: Work) -> Built:
        inputs = {}
        for name in stage.upstream:
            manifest = store.manifest(refs[name])
            inputs[name] = Input(store.path(refs[name]), manifest.shards, manifest.report)
        return _module(stage).build(recipe, inputs, work)

    return store.build(stage_spec(stage, recipe, refs), builder)


def prepare(recipe: Recipe, store: Store) -> Iterator[StageRef]:
    """Build all data stages in order, yielding each as it is finished. The last is the dataset."""
    refs: Refs = {}
    for stage in STAGES:
        refs[stage.name] = build_stage(stage, recipe, refs, store)
        yield refs[stage.name]


def _module(stage: Stage) -> StageModule:
    return cast(StageModule, importlib.import_module(stage.module))

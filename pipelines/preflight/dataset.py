"""The packed dataset of a recipe or a run: is it there, whole, and made for this recipe.

The store names a result by its cause, so a recipe finds a dataset only where tokenizer, template
and block size are its own. A run folder carries references instead, which may be older than the
recipe beside them: those are compared.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.errors import StarloomError
from pipelines.manifest import Manifest, canonical, find_damage
from pipelines.plan import STAGES, stage_spec
from pipelines.recipe import Recipe
from pipelines.render import format as format_stage
from pipelines.runs import Run
from pipelines.sources import get_source
from pipelines.store import StageRef, Store
from pipelines.training.duration import count_steps
from pipelines.training.environment import hardware_of
from pipelines.training.schedule import schedule_problems

TRAIN = "train"
# Finding a stored dataset hashes the raw input; more than this takes longer than a preflight may.
HASHED_BYTES = 2**30
UNREADABLE = (OSError, ValueError, KeyError, TypeError)
AGAIN = "run the same command again to build it"


@dataclass(frozen=True, slots=True)
class Dataset:
    """A packed dataset in the store: rows and tokens of a pass over its train split."""

    folder: Path
    rows: int
    tokens: int
    trained_tokens: int


def describe(folder: Path, manifest: Manifest) -> Dataset:
    """Return the sizes of a packed dataset."""
    shards = [shard for shard in manifest.shards if shard.split == TRAIN]
    return Dataset(
        folder,
        sum(shard.rows for shard in shards),
        sum(shard.tokens for shard in shards),
        sum(shard.trained_tokens for shard in shards),
    )


def find_dataset(recipe: Recipe, store: Store) -> tuple[Dataset | None, list[str]]:
    """Return the recipe's dataset where it is stored, and what is damaged of its stages.

    A damaged stage is built again by a run, so that it is no problem, only work.
    """
    raw = raw_bytes(recipe)
    if raw is None or raw > HASHED_BYTES or not (store.root / "pack").is_dir():
        return None, []
    refs: dict[str, StageRef] = {}
    damaged: list[str] = []
    manifest = None
    for stage in STAGES:
        try:
            spec = stage_spec(stage, recipe, refs)
        except StarloomError:
            return None, damaged
        folder = store.root / stage.name / spec.key[:16]
        if not folder.is_dir():
            return None, damaged
        damage = find_damage(folder, lambda *_: False)
        if damage:
            return None, [*damaged, f"{folder}: {damage}; a run builds it again"]
        manifest = Manifest.read(folder)
        refs[stage.name] = StageRef(
            stage.name, spec.key, manifest.digest, str(folder.relative_to(store.root)),
            manifest.counts.rows_out, manifest.tokens, manifest.cost.seconds, cached=True,
        )  # fmt: skip
    assert manifest is not None
    return describe(folder, manifest), damaged


def raw_bytes(recipe: Recipe, expanded: Mapping[str, float] | None = None) -> int | None:
    """Return the bytes of the recipe's raw input, None where some of it is not on this machine.

    `expanded` maps suffixes of compressed files to how much larger their content is.
    """
    total = 0.0
    for source in recipe.sources:
        try:
            found = get_source(source).locate(source)
            for path in found.paths:
                total += path.stat().st_size * (expanded or {}).get(path.suffix, 1.0)
        except (StarloomError, OSError):
            return None
    return int(total)


def trained_problems(dataset: Dataset) -> list[str]:
    """Say that a dataset has nothing to train on."""
    if dataset.rows and dataset.trained_tokens:
        return []
    problem = (
        f"dataset {dataset.folder}: {dataset.rows} rows with {dataset.trained_tokens} trained "
        "tokens: nothing would be learned; `starloom preview RECIPE` shows what is trained and why "
        "(check template, train_on_prompt and tokenization.block_size)"
    )
    return [problem]


def run_problems(run: Run, store: Store) -> list[str]:
    """Say where the dataset and tokenizer that a run names do not fit its recipe."""
    try:
        recipe, refs = run.recipe(), run.refs()
        folders = {name: store.path(refs[name]) for name in ("tokenizer", "pack")}
    except UNREADABLE as error:
        return [f"run {run.name}: run.json or recipe.yaml is not readable ({type(error).__name__})"]
    problems = []
    for name, folder in folders.items():
        # Tokenizers are small; the trainer hashes the rows itself, once.
        hashed = name == "tokenizer"
        damage = find_damage(folder, lambda *_, hashed=hashed: hashed)
        if damage:
            problems.append(f"{folder}: {damage}; {AGAIN}")
    if problems:
        return problems
    pack, tokenizer = (Manifest.read(folders[name]) for name in ("pack", "tokenizer"))
    problems += trained_problems(describe(folders["pack"], pack))
    made_with = pack.upstream.get("tokenizer")
    if made_with is not None and made_with != tokenizer.digest:
        problems.append(
            f"{folders['pack']}: packed with tokenizer {made_with[:12]}, but the run names "
            f"{tokenizer.digest[:12]} ({folders['tokenizer']}): token ids would mean something "
            f"else; {AGAIN}"
        )
    return problems + _setting_problems(recipe, pack, store, folders["pack"])


def schedule_notes(run: Run, store: Store) -> list[str]:
    """Say what is odd about a run's schedule over the steps that it will take."""
    recipe, folder = run.recipe(), store.path(run.refs()["pack"])
    rows = describe(folder, Manifest.read(folder)).rows
    return schedule_problems(recipe, count_steps(recipe, hardware_of(run), rows))


def _setting_problems(recipe: Recipe, pack: Manifest, store: Store, folder: Path) -> list[str]:
    """Compare what the shards were made with to what the recipe says now."""
    problems = []
    packed = _params(pack).get("block_size")
    wanted = recipe.tokenization.block_size
    if packed is not None and packed != wanted:
        problems.append(
            f"{folder}: rows of {packed} tokens, but tokenization.block_size is {wanted}; {AGAIN}"
        )
    formatted = _upstream(_upstream(pack, "tokenize", store), "format", store)
    made_with = _params(formatted).get("template") if formatted else None
    template = format_stage.params(recipe)["template"]
    if made_with is not None and canonical(made_with) != canonical(template):
        differing = sorted(
            key for key in {*template, *made_with} if template.get(key) != made_with.get(key)
        )
        problems.append(
            f"{folder}: rendered with another template than the recipe's: they differ in "
            f"{', '.join(f'template.{key}' for key in differing)}; {AGAIN}"
        )
    return problems


def _params(manifest: Manifest) -> Mapping[str, Any]:
    found: Mapping[str, Any] = manifest.key_parts.get("params", {})
    return found


def _upstream(manifest: Manifest | None, stage: str, store: Store) -> Manifest | None:
    folder = manifest.upstream_keys.get(stage) if manifest else None
    if folder is None:
        return None
    try:
        return Manifest.read(store.root / folder)
    except UNREADABLE:
        return None  # gone since: nothing to compare with

"""A few records through the recipe's own rendering: do template and tokenizer fit, is any trained.

The stages themselves run, in a folder that is then removed, so that what they refuse is refused
here, before the whole corpus is read.
"""

import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipelines.engine import Built, Job, Outcome, Params, Work
from pipelines.errors import StarloomError
from pipelines.manifest import Counts
from pipelines.plan import Refs, build_stage, get_stage
from pipelines.preflight.dataset import raw_bytes
from pipelines.recipe import Recipe
from pipelines.records import Row, body_text, write_rows
from pipelines.sources.preview import read_sample
from pipelines.store import StageRef, StageSpec, Store
from pipelines.training.base_model import TOKENIZER_FILE, find_file

RECORDS = 24  # of each source
SAMPLED_BYTES = 2**28  # of raw input: some formats are read whole before their first record
UNTRAINED = "nothing_trained"


@dataclass(frozen=True, slots=True)
class Sample:
    """What became of a few records: counts, bytes of their texts, the control tokens by name."""

    records: int
    bytes: int
    examples: int
    tokens: int
    trained_tokens: int
    dropped: dict[str, int]
    control_ids: dict[str, int]


def sample_problems(recipe: Recipe) -> tuple[Sample | None, list[str]]:
    """Return a sample, and what rendering it shows to be wrong.

    None where tokenizer or records are not on this machine yet: then neither is judged.
    """
    if not _has_tokenizer(recipe):
        return None, []
    rows = _read(recipe)
    if rows == []:
        return None, [_no_record()]
    if rows is None and recipe.tokenizer.train_vocab_size:
        return None, []
    try:
        sample = _render(recipe, rows or [])
    except StarloomError as error:
        return None, [f"template {recipe.template.name!r} and tokenizer: {error}"]
    return sample, _untrained(recipe, sample)


def _read(recipe: Recipe) -> list[Row] | None:
    """Return the first records of each source; None where one is not here, or too large to open."""
    size = raw_bytes(recipe)
    if size is None or size > SAMPLED_BYTES:
        return None
    try:
        return [row for source in recipe.sources for row in read_sample(source, RECORDS)]
    except StarloomError:  # said by the sources' own checks, or when they are read
        return None


def _no_record() -> str:
    return (
        "sources: not one record with something to train on can be made of what they hold, so that "
        "nothing would be learned; `starloom preview PATH` shows what is wrong with which rows"
    )


def _untrained(recipe: Recipe, sample: Sample) -> list[str]:
    """Say that a recipe trains nothing: none of the sampled examples has a trained token."""
    if sample.trained_tokens or not (sample.examples or sample.dropped):
        return []
    if sample.dropped and set(sample.dropped) != {UNTRAINED} and not sample.examples:
        return []  # left out for other reasons, such as their length: others may be shorter
    problem = (
        f"template {recipe.template.name!r}: none of the tokens of the first {sample.records} "
        "records is trained, so that nothing would be learned; see `starloom preview "
        f"{recipe.name}` (answers have to be assistant turns or completions, or set "
        "template.train_on_prompt: true)"
    )
    return [problem]


def _has_tokenizer(recipe: Recipe) -> bool:
    if recipe.tokenizer.train_vocab_size:
        return True
    model = recipe.model
    name = recipe.tokenizer.name_or_path or model.model_name_or_path
    assert name is not None, "the recipe's validator asks for one of them"
    revision = model.revision if name == model.model_name_or_path else None
    # A folder without the file is a problem, which the stage itself names.
    return Path(name).expanduser().is_dir() or bool(find_file(name, revision, TOKENIZER_FILE))


def _render(recipe: Recipe, rows: Sequence[Row]) -> Sample:
    with tempfile.TemporaryDirectory(prefix="starloom-preflight-") as name:
        store = Store(Path(name), workers=1)
        refs: Refs = {"split": _store(store, rows)}
        for stage in ("tokenizer", "format", "tokenize") if rows else ("tokenizer",):
            refs[stage] = build_stage(get_stage(stage), recipe, refs, store)
        control_ids = store.manifest(refs["tokenizer"]).report["control_ids"]
        dropped: Counter[str] = Counter()
        if not rows:
            return Sample(0, 0, 0, 0, 0, {}, control_ids)
        for stage in ("format", "tokenize"):
            dropped.update(store.manifest(refs[stage]).counts.dropped)
        shards = store.manifest(refs["tokenize"]).shards
    return Sample(
        records=len(rows),
        bytes=sum(len(body_text(row).encode()) for row in rows),
        examples=sum(shard.rows for shard in shards),
        tokens=sum(shard.tokens for shard in shards),
        trained_tokens=sum(shard.trained_tokens for shard in shards),
        dropped=dict(dropped),
        control_ids=control_ids,
    )


def _store(store: Store, rows: Sequence[Row]) -> StageRef:
    """Put records where the split stage would leave them, all to train on."""

    def write(inputs: Sequence[Path], output: Path, params: Params) -> Outcome:
        write_rows(output, rows)
        return Outcome(Counts(len(rows), len(rows), len(rows)))

    def build(work: Work) -> Built:
        return Built((work.one(write, Job("records-00000.parquet", (), "train"), {}),))

    return store.build(StageSpec("split", {}, ""), build)

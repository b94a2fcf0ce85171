"""Recipes and stores for tests of the stages from collect to split."""

from pipelines.engine import Built, Job, Outcome
from pipelines.manifest import Counts
from pipelines.plan import build_stage, get_stage
from pipelines.recipe import Recipe
from pipelines.records import new_record, read_rows, write_rows
from pipelines.store import StageSpec, Store

STAGES = ("collect", "language", "quality", "redact", "dedup", "decontaminate", "split")


def curation_recipe(*sources, **sections):
    """Return a recipe with these sources and data sections, and the smallest model."""
    return Recipe.model_validate(
        {
            "name": "test",
            "model": {"config": {"n_positions": 1024}},
            "tokenizer": {"train_vocab_size": 512},
            "sources": sources or [{"type": "repository", "id": "s", "path": "."}],
            **sections,
        }
    )


def folder_source(path, **keys):
    """Return a repository source that reads a folder."""
    return {"type": "repository", "id": "s", "path": str(path), "license": "MIT", **keys}


def write_files(root, files):
    """Write {relative path: text or bytes} below a folder and return it."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def record(record_id, **fields):
    """Return a record of source `s` that is its own group unless it says otherwise."""
    return new_record(**{"id": record_id, "group": record_id, "source": "s", **fields})


def store_stage(store, stage, *shards):
    """Put lists of rows into the store as the shards of a finished stage; return its reference."""

    def build(work):
        made = []
        for number, rows in enumerate(shards):

            def write(inputs, output, params, rows=rows):
                count = write_rows(output, rows)
                return Outcome(Counts(rows_in=count, rows_out=count, used=count))

            made.append(work.one(write, Job(f"records-{number:05d}.parquet", ()), {}))
        return Built(tuple(made))

    key = [[row["id"] for row in rows] for rows in shards]
    return store.build(StageSpec(stage, {"rows": key}, "test"), build)


def run_stage(root, stage, recipe, *shards, workers=1):
    """Build one stage on made-up rows of the stage before it; return (store, reference)."""
    store = Store(root, workers=workers)
    [upstream] = get_stage(stage).upstream
    refs = {upstream: store_stage(store, upstream, *shards)}
    return store, build_stage(get_stage(stage), recipe, refs, store)


def run_stages(root, recipe, *, until="split", workers=1):
    """Build the stages up to `until` from the recipe's sources; return (store, references)."""
    store, refs = Store(root, workers=workers), {}
    for name in STAGES[: STAGES.index(until) + 1]:
        refs[name] = build_stage(get_stage(name), recipe, refs, store)
    return store, refs


def rows_of(store, ref, split=None):
    """Return all rows of a finished stage, in order."""
    return [row for _, path in store.shards(ref, split) for row in read_rows(path)]

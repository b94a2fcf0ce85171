"""A run whose nine data stages and trained model are tiny, real, and known row by row.

24 records: 0-17 from `toy`, 18-23 from `kit` (which names no authors). Left out on the way: two
unreadable files, records 0 and 1 (language), 2 (quality), 3 (duplicate) and 10 (too long). Held
out: 4-6 (test) and 7-9 (validation). Trained on: 11-23.
"""

import json

import pyarrow as pa

from pipelines.engine import Built, Job, Outcome
from pipelines.manifest import Counts
from pipelines.plan import STAGES
from pipelines.records import new_record, write_rows
from pipelines.render.encode import encode_pieces, load_tokenizer
from pipelines.render.templates import get_template
from pipelines.runs import open_run
from pipelines.store import StageSpec, Store
from tests.assets.training_runs import SCHEMA, make_recipe, write_tokenizer

CONTEXT = 96
SPLITS = {"train": range(10, 24), "validation": range(7, 10), "test": range(4, 7)}
TRAINED = range(11, 24)


def make_recipe_of_pairs(**overrides):
    """Return the toy recipe with a context that its pairs fit in."""
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": CONTEXT}
    values = {
        "model__config": shape,
        "tokenization__block_size": CONTEXT,
        "evaluation__num_samples": 2,
        "evaluation__max_new_tokens": 12,
        "evaluation__min_improvement": 0.5,
    }
    return make_recipe(**values | overrides)


def make_records(license_of=lambda number: "BSD-3-Clause"):
    """Return records 0 to 23."""
    records = []
    for i in range(24):
        source = "toy" if i < 18 else "kit"
        records.append(
            new_record(
                id=f"{source}:{i}",
                group=f"{source}:{i // 2}",
                source=source,
                revision="1.0",
                url=f"https://example.org/{source}/{i // 2}",
                author=f"author-{i % 3}" if source == "toy" else None,
                license=license_of(i),
                prompt=f"count to {i % 5}",
                completion="one two three four five"[: 4 * (i % 5 + 1)],
            )
        )
    return records


def build_all_stages(store, recipe, records):
    """Build every stage of the plan; return {name: reference}."""
    tokenizer_dir = write_tokenizer(store.root.parent / "tokenizer")
    refs = {}
    for stage in STAGES:
        upstream = {name: refs[name] for name in stage.upstream}
        spec = StageSpec(stage.name, {"licenses": [r["license"] for r in records]}, "", upstream)
        refs[stage.name] = store.build(spec, _builder(stage.name, recipe, records, tokenizer_dir))
    return refs


def _builder(name, recipe, records, tokenizer_dir):
    def rows(number, lost=None, reason="dropped", kind="dropped"):
        left_out = {kind: {reason: lost}} if lost else {}
        return Counts(rows_in=number + (lost or 0), rows_out=number, used=number, **left_out)

    stages = {
        "collect": lambda work: _one_shard(work, records, rows(24, 2, "not_utf8", "quarantined")),
        "language": lambda work: _one_shard(work, records[2:], rows(22, 2, "language:fr")),
        "quality": lambda work: _one_shard(work, records[3:], rows(21, 1, "too_short")),
        "redact": lambda work: _one_shard(work, records[3:], rows(21)),
        "dedup": lambda work: _one_shard(work, records[4:], rows(20, 1, "duplicate")),
        "decontaminate": lambda work: _one_shard(work, records[4:], rows(20)),
        "split": lambda work: _split(work, records),
        "tokenizer": lambda work: _tokenizer(work, tokenizer_dir),
        "format": lambda work: _one_shard(work, records[4:], rows(20)),
        "tokenize": lambda work: _one_shard(work, records[4:], rows(19, 1, "too_long")),
        "pack": lambda work: _pack(work, recipe, records, tokenizer_dir),
    }
    report = {
        "collect": {
            "sources": {
                "toy": {"revision": "1.0", "license": "BSD-3-Clause", "files": 9, "records": 18},
                "kit": {"revision": "2.0", "license": "BSD-3-Clause", "files": 3, "records": 6},
            }
        }
    }
    return lambda work: Built(stages[name](work), report.get(name, {}))


def _one_shard(work, records, counts):
    def write(inputs, output, params):
        write_rows(output, records)
        return Outcome(counts)

    return (work.one(write, Job("records-00000.parquet", ()), {}),)


def _split(work, records):
    def write(inputs, output, params):
        number = write_rows(output, [records[i] for i in params["numbers"]])
        return Outcome(Counts(rows_in=number, rows_out=number, used=number))

    return tuple(
        work.one(write, Job(f"{split}-00000.parquet", (), split), {"numbers": numbers})
        for split, numbers in SPLITS.items()
    )


def _tokenizer(work, folder):
    def copy(inputs, output, params):
        output.write_bytes((folder / params["name"]).read_bytes())
        return Outcome(Counts())

    names = sorted(path.name for path in folder.iterdir())
    return tuple(work.one(copy, Job(name, ()), {"name": name}) for name in names)


def _pack(work, recipe, records, tokenizer_dir):
    """Two documents a row."""
    tokenizer, template = load_tokenizer(tokenizer_dir), get_template(recipe.template)

    def write(inputs, output, params):
        numbers = [i for i in params["numbers"] if i != 10]
        rows = []
        for first in range(0, len(numbers), 2):
            chosen = [records[i] for i in numbers[first : first + 2]]
            examples = [encode_pieces(tokenizer, template.render(record)) for record in chosen]
            rows.append(
                {
                    "input_ids": [i for example in examples for i in example.input_ids],
                    "labels": [i for example in examples for i in example.labels],
                    "lengths": [len(example.input_ids) for example in examples],
                    "record_ids": [record["id"] for record in chosen],
                }
            )
        with pa.OSFile(str(output), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:
            writer.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), max_chunksize=3)
        labels = [label for row in rows for label in row["labels"]]
        trained = sum(label != -100 for label in labels)
        counts = Counts(rows_in=len(numbers), rows_out=len(rows), used=len(numbers))
        return Outcome(counts, tokens=len(labels), trained_tokens=trained)

    return tuple(
        work.one(write, Job(f"{split}-00000.arrow", (), split), {"numbers": numbers})
        for split, numbers in SPLITS.items()
    )


def make_finished_run(root, recipe=None, *, records=None, steps=40):
    """Return (run, store) of a run that trained for a second."""
    recipe = recipe or make_recipe_of_pairs()
    store = Store(root / "store")
    refs = build_all_stages(store, recipe, records or make_records())
    run = open_run(recipe, refs, root / "runs")
    _train(run, store, recipe, steps)
    (run.path / "loss.png").write_bytes(b"")
    return run, store


def _train(run, store, recipe, steps):
    import torch

    from pipelines.training.collate import Collator, PackedDataset
    from pipelines.training.loss import evaluate_loss
    from pipelines.training.models import build_model, save_trained

    refs = run.refs()
    packed, tokenizer_dir = store.path(refs["pack"]), store.path(refs["tokenizer"])
    model = build_model(recipe, tokenizer_dir)
    train = PackedDataset(packed, "train")
    batch = Collator(pad_id=4)([train[i] for i in range(len(train))])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        logits = model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
        loss = torch.nn.functional.cross_entropy(
            logits.logits[:, :-1].transpose(1, 2), batch["labels"][:, 1:]
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    end = evaluate_loss(model, PackedDataset(packed, "validation"), 4, "cpu")
    save_trained(model, run.model, tokenizer_dir, recipe.model.dtype)
    result = {
        "status": "finished",
        "global_step": steps,
        "max_steps": steps,
        "train_loss": 1.25,
        "eval": [
            {"step": 0, "loss": 9.0, "tokens": end.tokens},
            {"step": steps, "loss": end.loss, "tokens": end.tokens},
        ],
        "seconds": 2.0,
        "cpu_seconds": 3.0,
        "peak_rss": 500_000_000,
        "tokens_seen": 12_345,
        "parameters": sum(p.numel() for p in model.parameters()),
        "trainable_parameters": sum(p.numel() for p in model.parameters()),
        "world_size": 1,
    }
    (run.path / "training.json").write_text(json.dumps(result))

"""The optional stage after training: prefer the better of two answers, on the run's own records.

Pairs come from the train split of the run's data, rendered by its template and tokenizer, so that
held-out questions stay held out. The result lies in `preferred/` of the run, beside its `model/`.
"""

import os
import shutil
from collections import Counter
from typing import Any

from pipelines.errors import TrainingError
from pipelines.records import read_rows
from pipelines.render.encode import in_batches, load_tokenizer
from pipelines.render.pairs import Pair, encode_pairs
from pipelines.render.templates import get_template
from pipelines.runs import Run
from pipelines.store import Store, sync_folder
from pipelines.training.preference import COLUMNS, Preference, train_preferences

PREFERRED, RESULT = "preferred", "preferred.json"


def prefer_answers(run: Run, store: Store, settings: Preference) -> dict[str, Any]:
    """Train a finished run's model on its pairs; return and write what came of it.

    Raises TrainingError where the run is not trained, or its records hold no pairs; PreflightError
    without trl.
    """
    if not run.trained:
        raise TrainingError(f"run {run.name} is not trained to its end yet; start it again first")
    pairs, dropped = read_pairs(run, store)
    columns = {name: [getattr(pair, name) for pair in pairs] for name in COLUMNS}
    temporary = run.path / f"{PREFERRED}.tmp-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    dtype = run.recipe().model.dtype
    result = train_preferences(run.model, columns, temporary, settings, dtype)
    target = run.path / PREFERRED
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)
    sync_folder(run.path)
    written = {
        **result,
        "pairs": len(pairs),
        "dropped": dropped,
        **settings.model_dump(mode="json"),
    }
    run.write(RESULT, written)
    return written


def read_pairs(run: Run, store: Store) -> tuple[list[Pair], dict[str, int]]:
    """Return the pairs of a run's train split, and the rows without one by reason."""
    recipe, refs = run.recipe(), run.refs()
    tokenizer = load_tokenizer(run.model)
    template = get_template(recipe.template, run.model)
    pairs: list[Pair] = []
    dropped: Counter[str] = Counter()
    for _, path in store.shards(refs["split"], "train"):
        rows = (row for row in read_rows(path) if row["text"] is None)
        for batch in in_batches(rows, lambda row: len(row["meta"] or "")):
            found, without = encode_pairs(
                tokenizer, template, batch, recipe.tokenization.block_size
            )
            pairs += found
            dropped.update(without)
    return pairs, dict(dropped)
